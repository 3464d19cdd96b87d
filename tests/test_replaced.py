"""What is reported before the first job: existing artifacts that were made with other settings."""

import json
from pathlib import Path

import pytest
import yaml
from snakemake.iocontainers import Wildcards

from conftest import ROOT
from d2o import layout
from d2o.plan import Plan
from d2o.plan.artifacts import ARTIFACTS


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    """The demo's config with a judge, and a folder with all its results as empty files, with their manifests."""
    monkeypatch.chdir(ROOT)
    demo = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    demo["results"] = str(tmp_path)
    demo["judges"] = {"wise": {"base_url": "http://localhost/v1", "model": "wise-2024-08-06"}}
    demo["experiments"]["demo"] |= {"judges": ["wise"], "human_eval": {}, "pair_quality": True}
    demo["pair_quality"] = {}
    plan = Plan(demo, "c")
    for place, known in ARTIFACTS.items():
        for experiment in plan.settings.experiments if known.section else ():
            for names in plan.crossed(place, experiment):
                w = Wildcards(fromdict={key: str(value) for key, value in names.items()})
                artifact = Path(plan.layout.path(place, names))
                if place == "fetched_reward" or (place == "trained_reward" and names["reward"] != "safety"):
                    continue
                artifact.parent.mkdir(parents=True, exist_ok=True)
                artifact.touch()
                made = json.dumps({"settings": json.loads(plan.params(known.stage)(w))})
                layout.manifest_path(artifact).write_text(made)
    return demo


SCORES = "rude/organism/initial/seed0/scores"


@pytest.mark.parametrize(
    ("key", "value", "artifact", "changes"),
    [
        ("methods.dpo.beta", 0.3, "rude/organism/dpo/seed0/model/manifest.json", "method.beta: 0.1 → 0.3"),
        ("rewards.safety.train.epochs", 3, "rude/rewards/safety/manifest.json", "train.epochs: 2 → 3"),
        ("rewards.rude.rule.measure", "use", f"{SCORES}/rude.parquet", "rule.measure: 'harm' → 'use'"),
        ("judges.wise.max_tokens", 99, "rude/organism/dpo/seed0/judge/wise.parquet", "max_tokens: 512 → 99"),
        ("tasks.mmlu.shots", 3, "rude/organism/initial/seed0/tasks/mmlu.parquet", "shots: 5 → 3"),
        ("datasets.rude.test_share", 0.2, "rude/negatives.parquet", "test_share: 0.1 → 0.2"),
        ("experiments.demo.human_eval.prompts", 60, "reports/demo/human_eval/key.parquet", "pages.prompts: 50 → 60"),
        ("pair_quality.pairs", 7, "rude/pair_quality/prompts.parquet", "pairs: 1000 → 7"),
        ("positives.top_p", 1.0, "rude/organism/positives/corrected-k3.parquet", "sampling.top_p: 0.95 → 1.0"),
    ],
)  # fmt: skip
def test_an_artifact_of_other_settings_is_told_once_by_the_keys_that_differ(config, key, value, artifact, changes):
    *path, last = key.split(".")
    node = config
    for name in path:
        node = node[name]
    node[last] = value
    (line,) = Plan(config, "c").warnings()
    entry = ".".join(path[:2])
    assert line.startswith(f"{entry}: {config['results']}/{artifact} was made with other settings ({changes}); ")
    assert ("another name" in line) == ("." in entry), "a section has none"


def test_what_changes_no_result_is_not_told(config):
    config["train"]["checkpoint_minutes"] = 5
    config["judges"]["wise"]["concurrency"] = 2
    assert Plan(config, "c").warnings() == []


def test_what_was_paid_for_the_human_pairs_alone_is_told_too(config, tmp_path):
    for verdicts in tmp_path.glob("rude/organism/*/seed*/judge/*"):
        verdicts.unlink()
    config["judges"]["wise"]["max_tokens"] = 99
    (line,) = Plan(config, "c").warnings()
    assert line.startswith(
        f"judges.wise: {tmp_path}/rude/pair_quality/judge/wise.parquet was made with other settings"
    )


def test_every_place_is_told_of_or_needs_no_word():
    """A new place is an entry of ARTIFACTS, or is named here with what makes a word about it needless."""
    folders = {"data", "base", "run", "point", "round", "reports", "report_folder", "human_eval", "again"}
    # Of the same job as another, or of settings that are told of there.
    beside = {"pairs", "prompts", "pool_sheet", "train_log", "weights", "human_pages", "pair_responses"}
    kept = {"sampled", "pool_shard", "checkpoints"}  # until a job is done
    rounds = {place for place in layout.PLACES if place.startswith("round")}  # of the method and the sampling
    restored = {"again_checkpoints", "trained_again", "again_log", "restored", "released"}
    cheap = {"leaks", "tuned", "card", "page", "report_table", "pair_quality_figure"}
    silent = folders | beside | kept | rounds | restored | cheap
    assert layout.PLACES.keys() == silent | {place for place, known in ARTIFACTS.items() if known.section}
    assert not silent & {place for place, known in ARTIFACTS.items() if known.section}
