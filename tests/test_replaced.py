"""What is reported before the first job: existing artifacts that were made with other settings."""

import json
from pathlib import Path

import pytest
import yaml
from snakemake.iocontainers import Wildcards

from conftest import ROOT
from d2o import layout
from d2o.plan import Plan, checks


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    """The demo's config with a judge, and a folder with all its results as empty files, with their manifests."""
    monkeypatch.chdir(ROOT)
    demo = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    demo["results"] = str(tmp_path)
    demo["judges"] = {"wise": {"base_url": "http://localhost/v1", "model": "wise-2024-08-06"}}
    demo["experiments"]["demo"] |= {"judges": ["wise"], "human_eval": {}}
    plan = Plan(demo, "c")
    for _, stage, place in checks._MADE_BY:
        for experiment in plan.settings.experiments:
            for names in plan.crossed(place, experiment):
                w = Wildcards(fromdict={key: str(value) for key, value in names.items()})
                artifact = Path(plan.layout.path(place, names))
                if place == "fetched_reward" or (place == "trained_reward" and names["reward"] != "safety"):
                    continue
                artifact.parent.mkdir(parents=True, exist_ok=True)
                artifact.touch()
                made = json.dumps({"settings": json.loads(plan.params(stage)(w))})
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
