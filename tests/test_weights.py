"""Weights that are released and restored: which ones, when, and what stays."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from snakemake.iocontainers import Wildcards

from conftest import ROOT
from d2o import preflight, records, verify, weights
from d2o.errors import D2OError
from d2o.plan import Plan
from test_plan import CONFIG


@pytest.fixture(autouse=True)
def _in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


TRAININGS = {"model": "end", "step2/model": "middle", "rounds/1/policy": "round"}


def trained(run: Path, contents: dict[str, str], adapter: bool = False) -> Path:
    """A run's folder with models, each of one file of weights."""
    for name, content in contents.items():
        with records.artifact(run / name) as draft:
            draft.path.mkdir()
            (draft.path / "model.safetensors").write_text(content)
            (draft.path / "config.json").write_text("{}")
            if adapter:
                (draft.path / weights.ADAPTER).mkdir()
                (draft.path / weights.ADAPTER / "adapter_model.safetensors").write_text(content)
    return run


def there(run: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(run)) for path in run.rglob("model.safetensors"))


def test_weights_go_and_all_else_stays(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    before = {path for path in run.rglob("*") if path.name != "model.safetensors"}
    weights.release("nothing", run)
    assert there(run) == [] and before < set(run.rglob("*"))
    told = json.loads((run / weights.RELEASED).read_text())
    assert set(told["released"]) == {f"{name}/model.safetensors" for name in TRAININGS}


@pytest.mark.parametrize(("keep", "stays"), [("adapter", True), ("nothing", False)])
def test_an_adapter_stays_where_it_is_kept_and_comes_back_where_not(keep, stays, tmp_path):
    run = trained(tmp_path / "seed0", {"model": "end"}, adapter=True)
    adapter = run / "model" / weights.ADAPTER / "adapter_model.safetensors"
    weights.release(keep, run)
    assert adapter.exists() == stays
    assert there(run) == []
    trained(run / "again", {"model": "end"}, adapter=True)
    weights.restore(run)
    assert adapter.read_text() == "end" and there(run) == ["model"]
    assert verify.verify(run)[0] == []


def test_the_same_training_brings_them_back(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    manifests = {path: path.read_bytes() for path in run.rglob("manifest.json")}
    weights.release("nothing", run)
    again = trained(run / "again", {"model": "end", "step2/model": "middle", "tensorboard": ""})
    with records.artifact(again / "train.jsonl") as draft:
        draft.path.write_text("")
    weights.restore(run)
    assert there(run) == ["model", "step2/model"] and not again.exists()
    assert {path: path.read_bytes() for path in manifests} == manifests, "made once, whatever came back"
    assert weights.lacking(run / "model") is None
    weights.release("nothing", run)
    assert there(run) == [] and not list(run.glob("restored*")), "or Snakemake would never restore them again"
    assert verify.verify(run)[0] == []


def test_what_the_second_training_did_not_write_stays(tmp_path):
    run = trained(tmp_path / "seed0", {"model": "end"})
    weights.release("nothing", run)
    thesis = trained(run / "again", {"model": "end"}) / "thesis.txt"
    thesis.write_text("mine")
    elsewhere = trained(tmp_path / "seed1", {"model": "other"})
    (run / "again" / "tensorboard").symlink_to(elsewhere / "model")
    weights.restore(run)
    assert there(run) == ["model"] and there(elsewhere) == ["model"]
    assert {path.name for path in (run / "again").iterdir()} == {"thesis.txt", "tensorboard"}


def test_snapshots_that_are_no_longer_asked_for_do_not_come_back(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    weights.release("nothing", run)
    trained(run / "again", {"model": "end"})
    weights.restore(run)
    assert there(run) == ["model"]


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_release_that_was_killed_is_made_again_and_forgets_nothing(calls, tmp_path, monkeypatch):
    run, unlink, counted = trained(tmp_path / "seed0", TRAININGS), Path.unlink, []

    def killed(path, missing_ok=False):
        if path.suffix == ".safetensors":
            counted.append(path)
            if len(counted) > calls:
                raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        weights.release("nothing", run)
    weights.release("nothing", run)
    told = json.loads((run / weights.RELEASED).read_text())
    assert set(told["released"]) == {f"{name}/model.safetensors" for name in TRAININGS}
    assert verify.verify(run)[0] == []


def test_a_restore_that_was_killed_goes_on(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    weights.release("nothing", run)
    again = trained(run / "again", {"model": "end", "step2/model": "middle"})
    (again / "model" / "model.safetensors").rename(run / "model" / "model.safetensors")
    weights.restore(run)
    assert there(run) == ["model", "step2/model"]


def test_other_weights_are_refused(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    weights.release("nothing", run)
    trained(run / "again", {"model": "end", "step2/model": "another"})
    with pytest.raises(D2OError, match=r"step2/model: trained again it has other weights .* delete .*manifest\.json"):
        weights.restore(run)
    assert there(run) == ["again/model", "again/step2/model"]


@pytest.mark.parametrize(
    ("folder", "way_out"),
    [
        ("model", r"released; train it again: snakemake --cores all \S+/seed0/restored\.json$"),
        ("step2/model", r"released; train it again: snakemake --cores all \S+/seed0/restored\.json$"),
        ("rounds/1/policy", r"released; delete \S+/rounds/1/policy/manifest\.json, and the round is trained again"),
    ],
)
def test_a_model_without_weights_says_the_way_out(folder, way_out, tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    assert weights.lacking(run / folder) is None
    (run / folder / "model.safetensors").unlink()
    made_with = run / folder.removeprefix("step2/") / "manifest.json"  # a snapshot comes with its training's model
    assert weights.lacking(run / folder).endswith(f"its weights are gone; delete {made_with} and run again")
    weights.release("nothing", run)
    assert re.search(way_out, weights.lacking(run / folder))
    (run / folder / "manifest.json").write_text("half")
    way_out = f"manifest.json: damaged; delete {made_with} and run again"
    assert way_out in weights.lacking(run / folder)


def job(rule: str, inputs: list[Path], outputs: list[str] = [], **params: Path) -> SimpleNamespace:  # noqa: B006
    """A job with the attributes of Snakemake's."""
    return SimpleNamespace(rule=SimpleNamespace(name=rule), input=inputs, output=outputs, params=params)


def test_a_model_that_a_job_loads_is_looked_at_before_the_first_job(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    weights.release("nothing", run)
    end, snapshot, policy = (run / name / "manifest.json" for name in TRAININGS)
    assert len([*preflight._released([job("answer_questions", [end, tmp_path / "q.parquet"])])]) == 1
    assert "step2" in next(iter(preflight._released([job("answer_prompts", [end], model=snapshot)])))
    assert len([*preflight._released([job("fetch_model", [end])])]) == 1, "a model that is made of a run"
    assert "rounds/1/policy" in next(iter(preflight._released([job("sample_round", [policy])])))
    assert not [*preflight._released([job("merge_round", [policy])])], "its digest is enough"
    for rule in ("write_report", "write_card", "train", "all"):
        assert not [*preflight._released([job(rule, [end])])], "its manifest is enough"
    trains = job("train_method", [tmp_path / "n.parquet"], [str(end)])
    assert not [*preflight._released([trains, job("answer_prompts", [end], model=snapshot)])]


# Which trainings ---------------------------------------------------------------------------------


def plan(models: Mapping[str, Any] = {}, **experiments: Any) -> Plan:
    """The test config with a tuned method and these experiments."""
    own = {"datasets": ["demo"], "models": ["smollm2"], "methods": ["initial", "dpo"], "tasks": []}
    methods = CONFIG["methods"] | {"tuned": CONFIG["methods"]["dpo"] | {"tune": {"beta": [0.1, 0.5]}}}
    chosen = {name: own | changes for name, changes in experiments.items()}
    tuning = {"metric": "human/margin"}
    dataset = {"demo": CONFIG["datasets"]["demo"] | {"validation_prompts": 4}}
    config = CONFIG | {"methods": methods, "experiments": chosen, "tuning": tuning, "datasets": dataset}
    return Plan(config | {"models": CONFIG["models"] | models}, "config.yaml")


RUN = "results/demo/smollm2/dpo/seed0"


def names(method: str = "dpo", **others: str) -> Wildcards:
    return Wildcards(fromdict={"dataset": "demo", "model": "smollm2", "method": method, "seed": "0"} | others)


def test_by_default_everything_is_kept():
    assert plan(one={}).targets("released") == []
    with pytest.raises(SystemExit, match="no experiment asks for this; set `keep: nothing` in one"):
        plan(one={}).asked("released")(None)


def test_a_training_goes_after_all_that_any_experiment_makes_from_it():
    one = plan(one={"keep": "nothing", "tasks": ["mmlu"]})
    assert one.targets("released") == [f"{RUN}/released.json"]
    made = ["responses.parquet", "heldout_logprobs.parquet", "tasks/mmlu.parquet"]
    assert one.made_from_weights(names()) == [f"{RUN}/{name}" for name in made]
    two = plan(one={"keep": "nothing"}, two={"keep": "nothing", "tasks": ["mmlu"]})
    assert two.targets("released") == [f"{RUN}/released.json"], "once"
    assert two.made_from_weights(names()) == [f"{RUN}/{name}" for name in made]


def test_a_report_waits_for_no_other_experiment():
    def released(plan: Plan) -> list[str]:
        return [path for path in plan.report_inputs(names(experiment="one")) if path.endswith("released.json")]

    assert released(plan(one={"keep": "nothing"})) == [f"{RUN}/released.json"]
    assert released(plan(one={"keep": "nothing"}, two={"keep": "nothing", "tasks": ["mmlu"]})) == []
    assert len(released(plan(one={"keep": "nothing"}, two={"keep": "nothing", "seeds": [1]}))) == 1


def test_a_model_that_another_experiment_keeps_stays():
    assert plan(one={"keep": "nothing"}, two={}).targets("released") == []
    assert len(plan(one={"keep": "nothing"}, two={"seeds": [1]}).targets("released")) == 1
    assert plan(one={"keep": "nothing"}, two={"keep": "adapter"}).keep(names()) == "adapter"
    assert plan(one={"keep": "nothing"}, two={"keep": "nothing"}).keep(names()) == "nothing"


def test_a_model_that_others_start_from_stays():
    run = {"dataset": "demo", "model": "smollm2", "method": "dpo", "seed": 0}
    one = plan({"next": {"run": run}}, one={"keep": "nothing", "seeds": [0, 1]})
    assert one.targets("released") == [f"{RUN}/released.json".replace("seed0", "seed1")]


def test_trials_go_once_the_best_is_chosen():
    one = plan(one={"keep": "nothing", "methods": ["initial", "tuned"], "seeds": [3]})
    targets = one.targets("released")
    assert len(targets) == 3 and sum(".trial-" in path and "/seed0/" in path for path in targets) == 2
    trial = next(name for name in one.settings.methods if ".trial-" in name)
    assert one.made_from_weights(names(trial)) == ["results/demo/smollm2/tuned/tuned.json"]
    failed = plan(one={"keep": "nothing", "methods": ["initial", "tuned"], "failed": {"tuned": "diverged"}})
    assert failed.targets("released") == [], "its trials are not trained for that"
    named = plan(one={"keep": "nothing", "methods": ["initial", trial]})
    folder = f"results/demo/smollm2/{trial}/seed0"
    assert named.targets("released") == [f"{folder}/released.json"]
    made = ["responses.parquet", "heldout_logprobs.parquet"]
    assert named.made_from_weights(names(trial)) == [f"{folder}/{name}" for name in made], "an experiment of its own"
