"""Weights that are released and restored: which ones, when, and what stays."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from snakemake.iocontainers import Wildcards

from conftest import ROOT
from d2o import records, weights
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
    weights.release("nothing", run, [], run / "released" / "one.json")
    assert there(run) == [] and before < set(run.rglob("*"))
    told = json.loads((run / "released" / "one.json").read_text())
    assert set(told["released"]) == {f"{name}/model.safetensors" for name in TRAININGS}


@pytest.mark.parametrize(("keep", "stays"), [("adapter", True), ("nothing", False)])
def test_an_adapter_stays_where_it_is_kept(keep, stays, tmp_path):
    run = trained(tmp_path / "seed0", {"model": "end"}, adapter=True)
    weights.release(keep, run, [], run / "one.json")
    assert (run / "model" / weights.ADAPTER / "adapter_model.safetensors").exists() == stays
    assert there(run) == []


def test_weights_stay_as_long_as_another_experiment_needs_them(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    answers = run / "tasks" / "mmlu.parquet"
    weights.release("nothing", run, [answers], run / "one.json")
    assert there(run) == sorted(TRAININGS)
    assert json.loads((run / "one.json").read_text()) == {"released": [], "waiting_for": [str(answers)]}
    answers.parent.mkdir()
    answers.touch()
    weights.release("nothing", run, [answers], run / "two.json")
    assert there(run) == []


def test_the_same_training_brings_them_back(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    manifests = {path: path.read_bytes() for path in run.rglob("manifest.json")}
    weights.release("nothing", run, [], run / "released" / "one.json")
    again = trained(run / "again", {"model": "end", "step2/model": "middle"})
    weights.restore(run, again)
    assert there(run) == ["model", "step2/model"] and not again.exists()
    assert {path: path.read_bytes() for path in manifests} == manifests, "made once, whatever came back"
    assert weights.lacking(run / "model") is None
    weights.release("nothing", run, [], run / "released" / "one.json")
    assert there(run) == [] and not (run / "restored.json").exists(), "or Snakemake would never restore them again"


def test_a_kill_between_two_files_is_gone_on_from(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    weights.release("nothing", run, [], run / "released" / "one.json")
    again = trained(run / "again", {"model": "end", "step2/model": "middle"})
    (again / "model" / "model.safetensors").rename(run / "model" / "model.safetensors")
    weights.restore(run, again)
    assert there(run) == ["model", "step2/model"]


def test_other_weights_are_refused(tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    weights.release("nothing", run, [], run / "released" / "one.json")
    again = trained(run / "again", {"model": "end", "step2/model": "another"})
    with pytest.raises(D2OError, match=r"step2/model: trained again it has other weights .* delete .*manifest\.json"):
        weights.restore(run, again)
    assert there(run) == ["again/model", "again/step2/model"]


@pytest.mark.parametrize(
    ("folder", "way_out"),
    [
        ("model", r"snakemake --cores all \S+/seed0/restored\.json$"),
        ("step2/model", r"snakemake --cores all \S+/seed0/restored\.json$"),
        ("rounds/1/policy", r"delete \S+/rounds/1/policy/manifest\.json"),
    ],
)
def test_a_model_without_weights_says_the_way_out(folder, way_out, tmp_path):
    run = trained(tmp_path / "seed0", TRAININGS)
    assert weights.lacking(run / folder) is None
    weights.release("nothing", run, [], run / "released" / "one.json")
    assert re.search(way_out, weights.lacking(run / folder))


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


def test_by_default_everything_is_kept():
    assert plan(one={}).targets("released") == []


def test_each_training_goes_after_what_is_made_from_it():
    one = plan(one={"keep": "nothing", "tasks": ["mmlu"]})
    assert one.targets("released") == [f"{RUN}/released/one.json"]

    names = Wildcards(
        fromdict={"dataset": "demo", "model": "smollm2", "method": "dpo", "seed": "0", "experiment": "one"}
    )
    made = ["responses.parquet", "heldout_logprobs.parquet", "tasks/mmlu.parquet"]
    assert one.made_from_weights(names) == [f"{RUN}/{name}" for name in made]
    assert one.waiting(names) == ""
    two = plan(one={"keep": "nothing"}, two={"keep": "nothing", "tasks": ["mmlu"]})
    assert f"--waiting {RUN}/tasks/mmlu.parquet" in two.waiting(names)
    other = plan(one={"keep": "nothing"}, two={"keep": "nothing", "seeds": [1]})
    assert other.waiting(names) == "", "another training"


def test_a_model_that_another_experiment_keeps_stays():
    assert plan(one={"keep": "nothing"}, two={}).targets("released") == []
    assert len(plan(one={"keep": "nothing"}, two={"seeds": [1]}).targets("released")) == 1


def test_a_model_that_others_start_from_stays():
    run = {"dataset": "demo", "model": "smollm2", "method": "dpo", "seed": 0}
    one = plan({"next": {"run": run}}, one={"keep": "nothing", "seeds": [0, 1]})
    assert one.targets("released") == [RUN.replace("seed0", "seed1") + "/released/one.json"]


def test_trials_go_once_the_best_is_chosen():
    one = plan(one={"keep": "nothing", "methods": ["initial", "tuned"], "seeds": [3]})
    targets = one.targets("released")
    assert len(targets) == 3 and sum(".trial-" in path and "/seed0/" in path for path in targets) == 2
    trial = next(name for name in one.settings.methods if ".trial-" in name)
    names = Wildcards(
        fromdict={"dataset": "demo", "model": "smollm2", "method": trial, "seed": "0", "experiment": "one"}
    )
    assert one.made_from_weights(names) == ["results/demo/smollm2/tuned/tuned.json"]
