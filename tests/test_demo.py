"""The shipped configs on SmolLM2 at a smaller size: what a new user sees."""

import copy

import pytest
import yaml

from conftest import ROOT
from d2o import records
from test_pipeline import Project

pytestmark = pytest.mark.slow


def shrunk(name: str, methods: list[str], **dataset) -> dict:
    """A shipped config with fewer prompts, samples, tokens and questions."""
    config = copy.deepcopy(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text()))
    (experiment,) = config["experiments"].values()
    experiment["methods"] = methods
    (entry,) = config["datasets"].values()
    entry.update(dataset)
    config["positives"].update(k=2, max_tokens=16)
    config["responses"].update(max_tokens=16)
    config["benchmarks"]["mmlu"].update(subjects=["geography"], limit=4, shots=1)
    config["train"].update(steps=2, groups_per_step=4)
    return config


def test_demo_and_thumbs_down_share_the_model_and_end_in_reports(tiny_model, tmp_path):
    project = Project(tmp_path, tiny_model)
    project.configure(shrunk("config", ["initial", "d2o"], train_prompts=8, test_prompts=4))
    project.snakemake("all")
    report = tmp_path / "results" / "reports" / "demo"
    assert "d2o" in (report / "table.md").read_text()
    run = tmp_path / "results" / "demo" / "smollm2" / "d2o" / "seed0"
    assert records.read_manifest(run / "model")["steps"] == 2
    pool = records.read_table(tmp_path / "results/demo/smollm2/positives/corrected.parquet", records.POOL)
    assert len(pool) == 16
    assert all(row["text"] for row in pool)

    # A log of negatives alone; the model is not fetched again.
    fetched = (tmp_path / "results" / "models" / "smollm2" / "manifest.json").read_text()
    project.configure(shrunk("thumbs-down", ["initial", "d2o"], train_prompts=8, test_prompts=4))
    project.snakemake("all")
    assert (tmp_path / "results" / "models" / "smollm2" / "manifest.json").read_text() == fetched
    assert (tmp_path / "results" / "reports" / "thumbs-down" / "report.html").exists()
