"""The real Snakemake on the real rules with a tiny model: which jobs run, which run again, and which do not."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, edited
from d2o import records, schemas
from test_judge import Server

pytestmark = pytest.mark.slow

CONFIG = {
    "experiments": {
        "tiny": {
            "datasets": ["demo"], "models": ["tiny"], "methods": ["initial", "sft", "dpo", "d2o"],
            "rewards": ["safety"], "tasks": ["mmlu"],
        }
    },
    "datasets": {
        "demo": {
            "format": "pku-saferlhf-beta", "train": ["tests/data/preferences.jsonl"],
            "train_prompts": 12, "test_prompts": 4, "test_share": 0.25,
        }
    },
    "methods": {
        "d2o": {"loss": "d2o", "positives": "self", "negatives": True},
        "dpo": {"loss": "dpo", "positives": "human", "negatives": True},
        "sft": {"loss": "sft", "positives": "self"},
    },
    "rewards": {"safety": {"train": {"backbone": "tiny", "layers": 1, "epochs": 1}}},
    "tasks": {"mmlu": {"path": "demo/mmlu", "shots": 1, "limit": 2, "subjects": ["geography", "arithmetic"]}},
    "positives": {"k": 2, "temperature": 0.8, "max_tokens": 12, "exclude": []},
    "responses": {"max_tokens": 12},
    "engine": {"eager": True, "kv_cache_gib": 1, "max_num_seqs": 16},
    "forward": {"precision": "fp32", "max_prompt_tokens": 128, "max_response_tokens": 64},
    "train": {"groups_per_step": 4, "learning_rate": 0.001, "zero_stage": 0},
    "compute": {"threads": 1, "memory_gb": 4, "minutes": 30},
}  # fmt: skip

# Keys in the environment of every run here.
KEYS = {"OPENAI_API_KEY": "sk-planted-4f1c", "HF_TOKEN": "hf_planted_83ab"}


class Project:
    """A checkout in a folder of its own."""

    def __init__(self, folder: Path, tiny_model: Path, source: Path = ROOT):
        self.folder = folder
        for name in ("workflow", "profiles", "envs", "organisms", "demo", "config", "tests/data"):
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source / name, folder / name, ignore=ignore)
        shutil.copy(source / "Snakefile", folder)
        self.configure(CONFIG | {"models": {"tiny": {"path": str(tiny_model), "context": 512}}})

    def configure(self, config: dict) -> None:
        self.config = config
        (self.folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))

    def snakemake(self, *arguments: str, check: bool = True) -> str:
        """Run Snakemake; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
            cwd=self.folder, capture_output=True, text=True, env=os.environ | KEYS | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        printed = done.stdout + done.stderr
        assert not any(key.strip() in printed for key in KEYS.values())
        assert done.returncode == 0 or not check, printed[-6000:]
        return printed

    def would_run(self, *targets: str) -> dict[str, int]:
        """Rules that a run would execute now, and how often."""
        printed = self.snakemake(*targets, "-n", "--quiet", "host")
        if "Nothing to be done" in printed:
            return {}
        table = printed[printed.index("Job stats:") :].split("\n\n")[0]
        counts = {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
        return {name: n for name, n in counts.items() if name not in {"total", "all", *targets}}


@pytest.fixture(scope="module")
def project(tiny_model, tmp_path_factory) -> Project:
    """A project after one whole run. A test that changes it restores it."""
    project = Project(tmp_path_factory.mktemp("project"), tiny_model)
    printed = project.snakemake("all")
    assert "profiles/default" in printed
    assert re.search(r"The report: .*results/reports/tiny/report\.html", printed)
    assert "better, ▼ worse than the initial model" in printed  # the screen of results
    return project


@pytest.fixture
def restored(project):
    """The project, whose sources and config are restored afterwards."""
    config = project.config
    yield project
    project.configure(config)


@pytest.mark.parametrize("path", ["reports/nope/report.html", "demo/tiny/d2o/seed0/scores/nope.parquet"])
def test_a_path_with_a_name_of_no_entry_has_no_rule(path, project):
    printed = project.snakemake(f"results/{path}", "-n", check=False)
    assert f"No rule to produce results/{path}" in printed
    assert "Traceback" not in printed


def test_every_artifact_is_there_and_says_what_made_it(project):
    results = project.folder / "results"
    run = results / "demo" / "tiny" / "d2o" / "seed0"
    assert len(records.read_table(run / "responses.parquet", schemas.SAMPLES)) == 4
    assert len(records.read_table(run / "scores" / "safety.parquet", schemas.SCORES)) == 4
    assert len(records.read_table(run / "tasks" / "mmlu.parquet", schemas.TASK_VALUES)) == 4
    assert records.read_manifest(results / "demo" / "leaks" / "mmlu.parquet")["counts"]["questions"] == 4
    assert len((run / "train.jsonl").read_text().splitlines()) == 3
    manifest = records.read_manifest(run / "model")
    assert manifest["settings"]["method"]["loss"] == "d2o"
    assert set(manifest["inputs"]) == {
        "results/models/tiny/manifest.json",
        "results/demo/negatives.parquet",
        "results/demo/tiny/positives/corrected-k2.parquet",
        "results/demo/tiny/reference_logprobs/corrected-k2.parquet",
        "results/demo/tiny/reference_logprobs/negatives.parquet",
    }
    page = (results / "reports" / "tiny" / "report.html").read_text()
    assert all(method in page for method in ("initial", "sft", "dpo", "d2o"))
    leftovers = [path for path in results.rglob("*") if path.name.endswith(".tmp") or path.name == "checkpoints"]
    assert leftovers == []
    assert all(path.stat().st_size for path in results.rglob("logs/train.log"))


def test_a_second_run_does_nothing(project):
    assert "Nothing to be done" in project.snakemake("all")


def test_cards_and_a_bundle_of_a_real_run(project):
    project.snakemake("cards")
    assert project.would_run("cards") == project.would_run() == {}
    text = (project.folder / "results/demo/tiny/d2o/seed0/card.md").read_text()
    assert "arXiv 2403.03419, Eq. 3" in text and '"loss": "d2o"' in text and "| `models.tiny` | initial model" in text
    assert str(project.folder) not in text
    for arguments in (["bundle", "tiny", "--output", "tiny.zip"], ["verify", "tiny.zip"]):
        line = [sys.executable, "-m", "d2o", *arguments]
        done = subprocess.run(line, cwd=project.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(project.folder / "tiny.zip") as bundle:
        names = {*bundle.namelist()}
    assert {f"cards/demo/tiny/{method}/seed0.md" for method in ("sft", "dpo", "d2o")} <= names
    made = ("models/tiny/", "demo/tiny/d2o/seed0/model/", "demo/rewards/safety/", "demo/rows.parquet.")
    assert {f"manifests/{of}manifest.json" for of in made} <= names


def test_touching_everything_reruns_nothing(project):
    for name in ("tests", "demo", "workflow", "config", "Snakefile"):
        top = project.folder / name
        for path in [top, *top.rglob("*")]:
            path.touch()
    assert project.would_run() == {}
    (project.folder / "results" / "demo" / "tiny" / "positives" / "corrected-k2.parquet").touch()
    (project.folder / "results" / "demo" / "negatives.parquet").touch()
    assert project.would_run() == {}


def test_a_fresh_checkout_beside_the_results_reruns_nothing(project, tiny_model, tmp_path):
    fresh = Project(tmp_path, tiny_model, source=project.folder)
    shutil.copytree(project.folder / "results", tmp_path / "results", symlinks=True)
    shutil.copytree(project.folder / ".snakemake" / "metadata", tmp_path / ".snakemake" / "metadata")
    assert fresh.would_run() == {}


def test_beta_of_one_method_reruns_that_method_only(restored):
    methods = CONFIG["methods"] | {"dpo": CONFIG["methods"]["dpo"] | {"beta": 0.5}}
    restored.configure(restored.config | {"methods": methods})
    per_run = {"answer_prompts": 1, "answer_questions": 1, "compute_heldout_logprobs": 1, "score_responses": 1}
    assert restored.would_run() == {"train_method": 1, "write_report": 1} | per_run


def test_how_jobs_run_makes_nothing_again_and_reaches_the_next_ones(restored):
    """The minutes between checkpoints, an engine's cache, a checksum, the shards of a pool: each through its key."""
    watched = {"checkpoint_minutes": 7.0, "keep_checkpoints": 3, "alarms": {"stop": []}, "trackers": []}
    changes = {
        "train": CONFIG["train"] | watched,
        "engine": CONFIG["engine"] | {"max_num_seqs": 7, "kv_cache_gib": 2},
        "positives": CONFIG["positives"] | {"shards": 3},
        "datasets": {"demo": CONFIG["datasets"]["demo"] | {"max_bad_share": 0.5}},
        "compute": CONFIG["compute"] | {"minutes": 7},
    }
    restored.configure(restored.config | changes)
    assert restored.would_run() == {}
    for rule, target, keys in [
        ("train_method", "model/manifest.json", r'"train":\{"checkpoint_minutes":7.0,"keep_checkpoints":3,'),
        ("answer_prompts", "responses.parquet", r'"engine":\{"max_num_seqs":7,.*"kv_cache_gib":2,'),
    ]:
        command = restored.snakemake("-n", "-p", "--forcerun", rule, "--", f"results/demo/tiny/dpo/seed0/{target}")
        assert re.search(r"--execution '?\{" + keys, command)


def test_snapshots_are_answered_and_scored(restored):
    methods = CONFIG["methods"] | {"dpo": CONFIG["methods"]["dpo"] | {"train": {"snapshots": [1, 2]}}}
    restored.configure(restored.config | {"methods": methods})
    per_model = {"answer_prompts": 3, "answer_questions": 3, "compute_heldout_logprobs": 3, "score_responses": 3}
    assert restored.would_run() == {"train_method": 1, "write_report": 1} | per_model
    path = "results/demo/tiny/dpo/seed0/step2/responses.parquet"
    assert "--model results/demo/tiny/dpo/seed0/step2/model/manifest.json" in restored.snakemake("-n", "-p", path)


def test_the_best_trial_by_validation_is_trained(restored):
    config = restored.config
    still = {"tune": {"train.learning_rate": [0.0, 0.001], "beta": [0.2]}}
    methods = config["methods"] | {"dpo-tuned": config["methods"]["dpo"] | still}
    datasets = {"tuning": config["datasets"]["demo"] | {"validation_prompts": 6}}
    experiment = {"datasets": ["tuning"], "models": ["tiny"], "methods": ["initial", "dpo-tuned"], "comparisons": []}
    restored.configure(
        config | {"methods": methods, "datasets": datasets, "experiments": {"tuning": experiment},
                  "tuning": {"metric": "human/margin"}}
    )  # fmt: skip
    assert restored.would_run("report")["train_method"] == 3  # two trials, and the training that is compared
    restored.snakemake("report")
    base = restored.folder / "results" / "tuning" / "tiny"
    choice = json.loads((base / "dpo-tuned" / "tuned.json").read_text())
    assert choice["chosen"] == {"train.learning_rate": 0.001, "beta": 0.2}
    assert [trial["n"] for trial in choice["trials"]] == [6, 6]
    assert choice["trials"][0]["mean"] < choice["trials"][1]["mean"]
    made = records.read_manifest(base / "dpo-tuned" / "seed0" / "model")["settings"]
    assert (made["train"]["learning_rate"], made["method"]["beta"], made["method"]["tune"]) == (0.001, 0.2, {})
    folder = restored.folder / "results" / "reports" / "tuning"
    page = (folder / "report.html").read_text()
    assert "beta 0.2, train.learning_rate 0.001" in page and (folder / "figures" / "trials.svg").exists()
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = {row["prompts"] for row in rows if row["difference"]}
    assert {row["prompts"] for row in rows} == {"test", "validation"} and told == {"test"}
    assert "Nothing to be done" in restored.snakemake("report")


def test_weights_are_released_and_come_back_for_a_further_task(restored):
    config = restored.config
    own = {"datasets": ["demo"], "models": ["tiny"], "methods": ["initial", "dpo"], "rewards": ["safety"]}
    once = config | {"experiments": {"gone": own | {"keep": "nothing"}}}
    restored.configure(once)
    assert restored.would_run() == {"release_weights": 1, "write_report": 1}
    restored.snakemake()
    run = restored.folder / "results" / "demo" / "tiny" / "dpo" / "seed0"
    responses, manifest = run / "responses.parquet", run / "model" / "manifest.json"
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in (responses, manifest)]
    assert not list((run / "model").glob("*.safetensors")) and restored.would_run() == {}
    # A task that was not asked before: the remedy is reported before any job, and makes nothing else again.
    restored.configure(once | {"experiments": {"gone": own | {"keep": "nothing", "tasks": ["plain"]}},
                               "tasks": {"plain": {**CONFIG["tasks"]["mmlu"], "limit": 1}}})  # fmt: skip
    printed = restored.snakemake(check=False)
    assert "nothing was started" in printed and "Execute" not in printed
    (command,) = set(re.findall(r"train it again: snakemake --cores all (\S+)", printed))
    assert restored.would_run(command) == {"train_again": 1, "restore_weights": 1}
    restored.snakemake(command)
    assert restored.would_run() == {
        "fetch_questions": 1, "find_leaks": 1, "answer_questions": 2, "release_weights": 1, "write_report": 1,
    }  # fmt: skip
    restored.snakemake()
    assert not list((run / "model").glob("*.safetensors")) and not (run / "again").exists()
    assert before == [(path.stat().st_mtime_ns, path.read_bytes()) for path in (responses, manifest)]
    page = restored.folder / "results" / "reports" / "gone" / "report.html"
    page.unlink()
    restored.snakemake()  # no weights are asked for
    assert page.exists() and not list((run / "model").glob("*.safetensors"))
    restored.snakemake(command)  # for the other tests
    restored.configure(config)
    assert restored.would_run() == {}


def test_more_shards_sample_nothing_again(restored):
    config = restored.config
    pool = restored.folder / "results" / "demo" / "tiny" / "positives"
    before = (pool / "corrected-k2.parquet").read_bytes()
    sampled = sum(path.read_text().count("\n") for path in (pool / "corrected.sampled").glob("*.jsonl"))
    assert sampled == 2 * len(
        {row["prompt_id"] for row in records.read_table(pool / "corrected-k2.parquet", schemas.POOL)}
    )
    restored.configure(restored.config | {"positives": CONFIG["positives"] | {"shards": 3}})
    assert restored.would_run() == {}
    (pool / "corrected-k2.parquet").unlink()
    (pool / "corrected-k2.parquet.manifest.json").unlink()
    printed = restored.snakemake("positives")
    assert "3 of 5 steps" in printed and "answers" not in printed, "three shards, and no engine is started"
    assert (pool / "corrected-k2.parquet").read_bytes() == before
    assert restored.would_run() == {}
    restored.configure(config)  # one shard again, as other tests expect
    (pool / "corrected-k2.parquet").unlink()
    (pool / "corrected-k2.parquet.manifest.json").unlink()
    assert "answers" not in restored.snakemake("positives")
    assert (pool / "corrected-k2.parquet").read_bytes() == before


def test_a_larger_pool_retrains_the_methods_that_take_all_of_it(restored):
    """A method with a `k` of its own already has its samples; references are computed only for the new answers."""
    tiny = CONFIG["experiments"]["tiny"]
    first = {"extends": "d2o", "k": 1}
    config = restored.config | {"methods": CONFIG["methods"] | {"d2o-first": first}}
    config["experiments"] = {"tiny": tiny | {"methods": [*tiny["methods"], "d2o-first"]}}
    restored.configure(config)
    restored.snakemake("train")
    restored.configure(config | {"positives": CONFIG["positives"] | {"k": 3}})
    new = {"sample_positives": 1, "merge_positives": 1, "compute_reference_logprobs": 1}
    assert restored.would_run("train") == new | {"train_method": 2}, "d2o and sft"
    table = "results/demo/tiny/reference_logprobs/corrected-k{}.parquet"
    restored.snakemake(table.format(3))
    small, large = (records.read_table(restored.folder / table.format(k), schemas.LOGPROBS) for k in (2, 3))
    assert all(row in large for row in small), "to the last digit: they are not computed again"
    log = (restored.folder / "results/demo/tiny/logs/reference_logprobs-corrected-k3.log").read_text()
    assert f"{len(large) - len(small)}/{len(large) - len(small)}" in log


def test_two_configs_over_one_folder_are_told_of_each_other(restored):
    """Before the first job; with another folder both keep their results."""
    tiny = restored.config["models"]["tiny"]
    restored.configure(restored.config | {"models": {"tiny": tiny | {"context": 256}}})
    told = restored.snakemake("-n", "models")
    assert "models.tiny: results/models/tiny/manifest.json was made with other settings (context: 512 → 256)" in told
    assert "set `results` to another folder" in told
    restored.configure(restored.config | {"results": "elsewhere/mine"})
    told = restored.snakemake("-n", "models")
    assert "was made with other settings" not in told and "elsewhere/mine/models/tiny/manifest.json" in told


def test_the_pipeline_is_a_module_of_another(restored, tmp_path):
    """Its rules, with their own config and folder, beside the rules of another workflow."""
    config = yaml.safe_dump(restored.config | {"results": "aligned"})
    (tmp_path / "aligned.yaml").write_text(config)
    for name in ("tests", "demo"):
        (tmp_path / name).symlink_to(restored.folder / name)
    (tmp_path / "Snakefile").write_text(
        f"""
import yaml

module d2o:
    snakefile: {str(restored.folder / "Snakefile")!r}
    config: yaml.safe_load(open("aligned.yaml"))

use rule * from d2o as d2o_*

rule count:
    input: rules.d2o_extract_negatives.output.negatives.format(dataset="demo")
    output: "count.txt"
    shell: "python -c 'import theirs' && wc -c {{input}} > {{output}}"
"""
    )
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "theirs.py").touch()
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "count"]
    theirs = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=theirs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "count.txt").read_text().endswith("aligned/demo/negatives.parquet\n")


def test_a_clock_that_was_ahead_stops_no_run(restored):
    """Else Snakemake fails every job that reads what was made then."""
    results = restored.folder / "results"
    for path in (results / "demo" / "prompts.parquet", results / "demo" / "tiny" / "d2o" / "seed0" / "train.jsonl"):
        os.utime(path, (2e9, 2e9))
    (results / "reports" / "tiny" / "report.html").unlink()
    restored.snakemake("all")
    assert restored.would_run("all") == {}


def test_online_rounds_go_on_after_their_last_finished_rule(restored):
    methods = CONFIG["methods"] | {
        "online": {"extends": "d2o", "online": {"start": 1, "every": 1, "share": 0.5}, "train": {"steps": 2}}
    }
    tiny = CONFIG["experiments"]["tiny"]
    config = restored.config | {"methods": methods}
    config["experiments"] = {"tiny": tiny | {"methods": [*tiny["methods"], "online"]}}
    restored.configure(config)
    rounds = {
        "train_to_round": 1,
        "sample_round": 1,
        "merge_round": 1,
        "compute_round_logprobs": 1,
        "train_method": 1,
    }
    assert restored.would_run("train") == rounds

    folder = restored.folder / "results" / "demo" / "tiny" / "online" / "seed0"
    restored.snakemake("results/demo/tiny/online/seed0/rounds/1/positives.parquet")
    fresh = records.read_table(folder / "rounds" / "1" / "positives.parquet", schemas.POOL)
    asked = records.read_table(folder / "rounds" / "1" / "negatives.parquet", schemas.NEGATIVES)
    assert {row["prompt_id"] for row in fresh} == {row["prompt_id"] for row in asked}
    assert {row["sample"] for row in fresh} == {0}
    assert restored.would_run("train") == {"compute_round_logprobs": 1, "train_method": 1}

    restored.snakemake("train")
    assert "train: going on after step 1" in (folder / "logs" / "train.log").read_text()
    log = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [(row["step"], row["fresh_share"], row["fresh_age"]) for row in log] == [(1, 0.0, 0), (2, 0.5, 0)]
    assert not (folder / "checkpoints").exists()
    assert restored.would_run("train") == {}


def of_runs(count: int) -> dict[str, int]:
    """The jobs that rerun after `count` models are made again."""
    return {
        "answer_prompts": count,
        "compute_heldout_logprobs": count,
        "score_responses": count,
        "answer_questions": count,
    }


REPORT = {"write_report": 1}
TRAINED = {"train_method": 3} | of_runs(3) | REPORT
EVERYTHING = {
    "fetch_model": 1, "read_dataset": 1, "extract_negatives": 1, "sample_positives": 1, "merge_positives": 1,
    "compute_reference_logprobs": 2, "train_method": 3, "train_reward": 1, "fetch_questions": 1, "find_leaks": 1,
} | of_runs(4) | REPORT  # fmt: skip
# An edit of one line, and all that it reruns: one method in four is the initial model.
EDITS = [
    ("scores.py", "def score(", "@staticmethod\ndef score(", {"score_responses": 4} | REPORT),
    ("tasks.py", "def multiple_choice(", "@staticmethod\ndef multiple_choice(", {"answer_questions": 4} | REPORT),
    ("negatives/task_leaks.py", "def find(", "@staticmethod\ndef find(", {"find_leaks": 1} | REPORT),
    ("report/figures.py", "def effect_data(", "@staticmethod\ndef effect_data(", REPORT),
    (
        "schemas.py",
        "TASK_VALUES = pa.schema([",
        'TASK_VALUES = pa.schema([("x", pa.string()), ',
        {"answer_questions": 4} | REPORT,
    ),
    ("train/schedule.py", "def rate(", "@staticmethod\ndef rate(", TRAINED),
    ("rounds.py", "max(1, round(", "max(2, round(", TRAINED),
    ("runs.py", "{**s.train.model_dump(), ", "{**s.train.model_dump(), **{}, ", REPORT),
    ("losses.py", "def dpo(", "@staticmethod\ndef dpo(", {"train_method": 1} | of_runs(1) | REPORT),
    (
        "logprobs.py",
        "def _logprobs(",
        "@staticmethod\ndef _logprobs(",
        {"compute_reference_logprobs": 2, "train_method": 2} | of_runs(2) | {"compute_heldout_logprobs": 4} | REPORT,
    ),
    ("records.py", "def artifact(", "@staticmethod\ndef artifact(", EVERYTHING),
    ("trials.py", "**keys}, ", "**keys, **{}}, ", TRAINED),
    # A new column affects only the report.
    (
        "metrics.py",
        "STYLE_METRICS = (",
        'STYLE_METRICS = (\n    Metric("answers/new", "new", STYLE, itemgetter("new")),',
        REPORT,
    ),
    # Labels with which the report measures the rules of refusals.
    ("report/labelled.jsonl", '"kind": "none"', '"kind": "full"', REPORT),
    # A loss, a parameter, a format, a schema, an architecture, a template that nothing here uses; values that reach
    # stages as params; a comment.
    ("losses.py", "LOSSES = {", 'def new():\n    """New."""\n\n\nLOSSES = {\n    "new": new,', {}),
    (
        "settings/__init__.py",
        "    ema: MovingAverages | None",
        '    zeta: float | None = Field(None, description="new")\n    ema: MovingAverages | None',
        {},
    ),
    ("contracts.py", "CONTRACTS = {", 'CONTRACTS = {\n    "new": Contract("none", True, True),', {}),
    ("formats.py", "FORMATS = {", 'FORMATS = {\n    "new": Format(lambda row, labels: [], ("text",)),', {}),
    ("schemas.py", "QUESTIONS = ", "NEW = pa.schema([])\nQUESTIONS = ", {}),
    ("forward/policy.py", "SHARING = (", 'SHARING = ("new", ', {}),
    ("chat/templates/alpaca.jinja", "USER: ", "User: ", {}),
    # What guards a result, speeds it up or reports it.
    ("locks.py", "; wait for its end", "; wait for it to end", {}),
    ("forward/memory.py", "mallopt(_M_MMAP_MAX, 0)", "mallopt(_M_MMAP_MAX, 1)", {}),
    ("train/watch.py", "self._mlflow.end_run()", 'self._mlflow.end_run("FINISHED")', {}),
    ("cli.py", "import", "import ast\nimport", {}),
    ("losses.py", "def dpo(", "# A remark.\ndef dpo(", {}),
]


@pytest.mark.parametrize(("file", "old", "new", "reruns"), EDITS)
def test_an_edit_reruns_what_it_touches_and_nothing_else(restored, file, old, new, reruns):
    with edited(restored.folder / "workflow" / "d2o" / file, old, new):
        assert restored.would_run() == reruns


@pytest.mark.parametrize(
    ("section", "change", "reruns"),
    [
        ("responses", {"max_tokens": 13}, {"answer_prompts": 4, "score_responses": 4} | REPORT),
        ("train", {"epochs": 2}, TRAINED),
        ("pair_quality", {"pairs": 7}, REPORT),
        (
            "engine",
            {"backend": "transformers"},
            {"sample_positives": 1, "merge_positives": 1, "compute_reference_logprobs": 1, "train_method": 2}
            | of_runs(2)
            | {"answer_prompts": 4, "score_responses": 4}
            | REPORT,
        ),
        ("tasks", {"mmlu": CONFIG["tasks"]["mmlu"] | {"shots": 2}}, {"answer_questions": 4} | REPORT),
        (
            "rewards",
            {"safety": {"train": {"backbone": "tiny", "layers": 1, "epochs": 2}}},
            {"train_reward": 1, "score_responses": 4} | REPORT,
        ),
        ("rewards", {"safety": CONFIG["rewards"]["safety"] | {"toxic_above": 0.5}}, REPORT),
    ],
)
def test_a_key_reruns_what_depends_on_it_and_nothing_else(restored, section, change, reruns):
    restored.configure(restored.config | {section: CONFIG.get(section, {}) | change})
    assert restored.would_run() == reruns


def test_a_further_task_asks_its_questions_and_makes_nothing_again_but_the_report(restored):
    science = {"path": "demo/mmlu", "shots": 1, "limit": 2, "subjects": ["everyday_science"]}
    config = restored.config | {"tasks": CONFIG["tasks"] | {"science": science}}
    config["experiments"] = {"tiny": CONFIG["experiments"]["tiny"] | {"tasks": ["mmlu", "science"]}}
    restored.configure(config)
    assert restored.would_run() == {"fetch_questions": 1, "find_leaks": 1, "answer_questions": 4} | REPORT


def test_what_annotators_send_makes_the_table_again_and_nothing_else(restored):
    experiment = restored.config["experiments"]["tiny"]
    asked = {"human_eval": {"prompts": 4, "annotators": 2, "checks": 1}}
    restored.configure(restored.config | {"experiments": {"tiny": experiment | asked}})
    assert restored.would_run("human_eval") == {"write_human_pages": 1}
    assert restored.would_run() == {"write_human_pages": 1, "read_human_verdicts": 1, "write_report": 1}
    restored.snakemake("all")
    folder = restored.folder / "results/reports/tiny/human_eval"
    pages = sorted(path.name for path in (folder / "pages").glob("*.html"))
    assert pages == ["annotator-1.html", "annotator-2.html"]
    items = records.read_table(folder / "key.parquet", schemas.HUMAN_KEY)
    rows = [(r["version"], 1, r["item"], q, r["check"] or "1") for r in items for q in schemas.HUMAN_QUESTIONS
            if r["annotator"] == 1]  # fmt: skip
    (restored.folder / "human_eval").mkdir()
    with (restored.folder / "human_eval" / "annotator-1 (1).csv").open("w", newline="") as file:
        csv.writer(file).writerows([["version", "annotator", "item", "question", "verdict"], *rows])
    assert restored.would_run() == {"read_human_verdicts": 1, "write_report": 1}
    restored.snakemake("all")
    assert "1 of 2 annotators have sent verdicts" in (folder.parent / "report.html").read_text()
    passed = experiment | {"human_eval": asked["human_eval"] | {"passed": 0.5}}
    restored.configure(restored.config | {"experiments": {"tiny": passed}})
    assert restored.would_run() == {"read_human_verdicts": 1, "write_report": 1}


def test_an_edited_data_file_reruns_what_comes_from_it(restored):
    with edited(restored.folder / "tests" / "data" / "preferences.jsonl", "e", "a"):
        reruns = restored.would_run()
    assert {
        "read_dataset",
        "extract_negatives",
        "sample_positives",
        "merge_positives",
        "train_method",
    } <= reruns.keys()
    assert "fetch_model" not in reruns


def test_a_deleted_score_file_is_remade_alone(project):
    path = project.folder / "results" / "demo" / "tiny" / "dpo" / "seed0" / "scores" / "safety.parquet"
    before = records.read_table(path, schemas.SCORES)
    path.unlink()
    assert project.would_run("scores") == {"score_responses": 1}
    project.snakemake("scores")
    assert records.read_table(path, schemas.SCORES) == before
    project.snakemake("all")
    assert project.would_run() == {}


def test_one_stage_alone(restored):
    """`snakemake scores` for a new method makes what the scores need and nothing else."""
    methods = CONFIG["methods"] | {"d2o-k1": {"extends": "d2o", "k": 1}}
    tiny = CONFIG["experiments"]["tiny"]
    config = restored.config | {"methods": methods}
    config["experiments"] = {"tiny": tiny | {"methods": [*tiny["methods"], "d2o-k1"]}}
    restored.configure(config)
    assert restored.would_run("scores") == {"train_method": 1, "answer_prompts": 1, "score_responses": 1}


def test_a_filter_scores_the_pool_and_trains_on_the_best(restored):
    best = {"extends": "d2o", "filter": {"reward": "safety", "best": 1}}
    tiny = CONFIG["experiments"]["tiny"]
    config = restored.config | {"methods": CONFIG["methods"] | {"d2o-best": best}}
    config["experiments"] = {"tiny": tiny | {"methods": [*tiny["methods"], "d2o-best"]}}
    restored.configure(config)
    assert restored.would_run("train") == {"train_method": 1, "score_positives": 1}
    restored.snakemake("train")
    folder = restored.folder / "results" / "demo" / "tiny"
    whole, best = (records.read_manifest(folder / name / "seed0" / "model") for name in ("d2o", "d2o-best"))
    # One positive fewer than the two positives and a negative before; duplicates are one response.
    assert best["groups"] == whole["groups"] and best["responses"] == 2 * best["groups"] < whole["responses"]


def test_the_printed_command_does_the_same_work_in_a_shell(project):
    path = project.folder / "results" / "demo" / "tiny" / "reference_logprobs" / "negatives.parquet"
    before = records.read_table(path, schemas.LOGPROBS)
    printed = project.snakemake("-n", "-p", "--force", str(path.relative_to(project.folder)))
    command = next(line for line in printed.splitlines() if "python -m d2o" in line).removeprefix("Shell command: ")
    path.unlink()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=project.folder, check=True, capture_output=True, env=environment)
    assert records.read_table(path, schemas.LOGPROBS) == before
    assert project.would_run() == {}


def test_snakemake_report(project):
    project.snakemake("--report", "report.zip")
    assert (project.folder / "report.zip").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"positives": {"k": 0}},
            "config/config.yaml: positives.k: Input should be greater than or equal to 1, not 0",
        ),
        ({"postives": {}}, "config/config.yaml: postives: unknown key; did you mean 'positives'?"),
    ],
)
def test_a_wrong_config_stops_snakemake_with_one_line(restored, change, message):
    restored.configure(restored.config | change)
    assert message in restored.snakemake("-n", check=False)


def test_a_failed_stage_leaves_nothing_under_a_final_name(restored):
    """A model folder without a tokenizer fails clearly, and the error names it."""
    broken = restored.folder / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(restored.config["models"]["tiny"]["path"]) / name, broken)
    restored.configure(restored.config | {"models": {"tiny": {"path": "broken", "context": 512}}})
    kept = json.loads((restored.folder / "results" / "models" / "tiny" / "manifest.json").read_text())
    printed = restored.snakemake("models", check=False)
    assert "no tokenizer; save one there with tokenizer.save_pretrained" in printed
    assert not (restored.folder / "results" / "models" / "tiny" / "manifest.json").exists()
    restored.configure(restored.config | {"models": {"tiny": {"path": kept["settings"]["path"], "context": 512}}})
    restored.snakemake("models")


def _echo(request: BaseHTTPRequestHandler) -> None:
    request.answer(401, json.dumps({"error": {"message": f"unknown: {request.headers['Authorization']}"}}).encode())


def test_no_key_of_the_environment_is_written(restored, monkeypatch):
    """Not in results, logs, manifests or Snakemake's own records, nor by a job that fails when a server echoes it."""
    server = Server(lambda text: _echo)
    tiny = restored.config["experiments"]["tiny"] | {"judges": ["wise"]}
    wise = server.settings().model_dump(exclude_defaults=True)
    restored.configure(restored.config | {"experiments": {"tiny": tiny}, "judges": {"wise": wise}})
    restored.snakemake("responses")
    responses = restored.folder / "results/demo/tiny/d2o/seed0/responses.parquet"
    rows = records.read_table(responses, schemas.SAMPLES)
    with records.artifact(
        responses, records.read_manifest(responses)["settings"]
    ) as draft:  # changed, because equal answers are not judged
        records.write_table(draft.path, schemas.SAMPLES, [row | {"text": row["text"] + "!"} for row in rows])
    for end in ("", "\n"):  # a key read from a file may end in a newline
        monkeypatch.setitem(KEYS, "OPENAI_API_KEY", KEYS["OPENAI_API_KEY"] + end)
        assert "refuses the key; put a valid one into" in restored.snakemake("judge", check=False)
    server.close()
    monkeypatch.undo()
    files = [path for path in restored.folder.rglob("*") if path.is_file()]
    assert any(".snakemake" in path.parts for path in files) and any(path.suffix == ".log" for path in files)
    told = [path for path in files if any(key.encode() in path.read_bytes() for key in KEYS.values())]
    assert not told
