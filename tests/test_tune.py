"""The choice among trials: on the validation prompts that all of them answered, and what it depends on."""

import json

import pytest
import yaml

from conftest import ROOT
from d2o import records, schemas, settings, trials, tune
from d2o.errors import D2OError
from d2o.plan import Plan
from d2o.settings import Reward, TuneStage, Tuning
from test_plan import CONFIG, wildcards

TRIALS = {"dpo.trial-a": {"beta": 0.1}, "dpo.trial-b": {"beta": 0.2}}


def choice(folder, scores: dict[str, dict[str, float]], better: str = "higher") -> dict:
    """The choice where trials have these scores by prompt; prompts that begin with `t` are test prompts."""
    prompts = sorted({prompt for of_trial in scores.values() for prompt in of_trial})
    messages = [{"role": "user", "content": "?"}]
    origins = ["test" if prompt.startswith("t") else "validation" for prompt in prompts]
    rows = [{"prompt_id": p, "messages": messages, "origin": o} for p, o in zip(prompts, origins, strict=True)]
    tables = {"prompts": (schemas.PROMPTS, rows), "negatives": (schemas.NEGATIVES, [])}
    for trial, of_trial in scores.items():
        rows = [{"prompt_id": prompt, "sample": 0, "score": score} for prompt, score in of_trial.items()]
        tables[f"m/{trial}/seed0/scores/r"] = (schemas.SCORES, rows)
    for name, (schema, rows) in tables.items():
        path = folder / "d" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with records.artifact(path) as draft:
            records.write_table(draft.path, schema, rows)
    reward = Reward(source={"path": "r"}, better=better)
    stage = TuneStage(tuning=Tuning(metric="reward/r"), trials=TRIALS, reward=reward)
    tune.choose(stage, folder, "d", "m", folder / "tuned.json")
    return json.loads((folder / "tuned.json").read_text())


@pytest.mark.parametrize(("better", "best"), [("higher", 0.2), ("lower", 0.1)])
def test_the_best_trial_on_validation_prompts_is_chosen(tmp_path, better, best):
    # On the test prompt the order is reversed.
    scores = {"dpo.trial-a": {"p1": 1.0, "p2": 2.0, "t1": 99.0}, "dpo.trial-b": {"p1": 2.0, "p2": 2.0, "t1": 0.0}}
    tuned = choice(tmp_path, scores, better)
    assert tuned["chosen"] == {"beta": best}
    assert [trial["mean"] for trial in tuned["trials"]] == [1.5, 2] and tuned["trials"][0]["n"] == 2


def test_trials_are_compared_on_the_prompts_that_all_of_them_have(tmp_path):
    nan = float("nan")
    scores = {"dpo.trial-a": {"p1": 1.0, "p2": 9.0, "p3": nan}, "dpo.trial-b": {"p1": 2.0, "p3": 0.0}}
    tuned = choice(tmp_path, scores)
    assert tuned["chosen"] == {"beta": 0.2} and [trial["n"] for trial in tuned["trials"]] == [1, 1]
    with pytest.raises(D2OError, match="d: no validation prompt has a value of reward/r for every trial"):
        choice(tmp_path / "none", {"dpo.trial-a": {"p1": nan}, "dpo.trial-b": {"p1": 1.0}})


def plan(**changes) -> Plan:
    tuned = {"tune": {"beta": [0.1, 0.2]}}
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["methods"] = {"dpo": CONFIG["methods"]["dpo"] | tuned}
    config["experiments"]["demo"]["methods"] = ["initial", "dpo"]
    config["experiments"]["demo"] |= changes.pop("experiment", {})
    config["datasets"]["demo"]["validation_prompts"] = 5
    config["rewards"]["safety"] |= changes.pop("safety", {})
    return Plan(config | {"tuning": {"metric": "reward/safety"}} | changes, "c")


def test_a_trial_that_failed_is_not_chosen_and_holds_nothing_up(monkeypatch):
    monkeypatch.chdir(ROOT)
    first, second = trials.names("dpo", {"beta": [0.1, 0.2]})
    w = wildcards(method="dpo")
    assert [first in path or second in path for path in plan().trial_inputs(w)["trials"]] == [True, True]
    [left] = plan(experiment={"failed": {first: "diverged"}}).trial_inputs(w)["trials"]
    assert second in left
    made = json.loads(plan(experiment={"failed": {first: "diverged"}}).params("tune")(w))
    assert made["trials"] == {second: {"beta": 0.2}}
    with pytest.raises(D2OError, match=r"methods\.dpo\.tune: all of its trials failed"):
        plan(experiment={"failed": {first: "diverged", second: "diverged"}})
    # Where the whole method failed, no trial of it is asked for.
    assert plan(experiment={"failed": {"dpo": "diverged"}}).targets("tuned") == []


def test_what_the_report_makes_of_a_score_retrains_nothing(monkeypatch):
    monkeypatch.chdir(ROOT)
    w = wildcards(method="dpo")
    assert plan().params("tune")(w) == plan(safety={"safe_at": 0.0, "toxic_above": 1.0}).params("tune")(w)


@pytest.mark.parametrize("metric", ["human/margins", "answers/tokens", "human/implicit_accuracy"])
def test_a_metric_that_cannot_choose_is_told_before_any_trial(monkeypatch, metric):
    monkeypatch.chdir(ROOT)
    with pytest.raises(D2OError, match=f"tuning.metric: '{metric}' says not which trial is better"):
        plan(tuning={"metric": metric})


def test_a_training_takes_the_values_that_were_chosen(tmp_path):
    with records.artifact(tmp_path / "tuned.json") as draft:
        draft.path.write_text('{"chosen": {"beta": 0.4, "train.learning_rate": 0.5}}')
    method = {"loss": "dpo", "positives": "human", "negatives": True}
    stage = trials.tuned(settings.TrainStage(method=method), tmp_path / "tuned.json")
    assert (stage.method.beta, stage.train.learning_rate, stage.train.decay) == (0.4, 0.5, "cosine")
    (tmp_path / "tuned.json").write_text('{"chosen": {"beta": 0.4, "train.learning_rate": 0.7}}')
    with pytest.raises(D2OError, match=r"tuned\.json: gone or damaged since it was written"):
        trials.tuned(settings.TrainStage(method=method), tmp_path / "tuned.json")
