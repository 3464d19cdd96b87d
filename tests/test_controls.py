"""Null controls: what the report shows where nothing was learnt (docs/controls.md)."""

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml

from conftest import ROOT
from d2o.metrics import SCORED, Metric
from d2o.report import tables
from d2o.settings import Experiment

# Number of simulated tables: the standard error of a share of 5 % among them is 1.5 points.
TABLES = 200
METHODS = ["a", "b", "c"]
EXPERIMENT = Experiment(
    datasets=["d"], models=["m"], methods=["initial", *METHODS], seeds=[0, 1, 2], comparisons=[["a", "b"], ["a", "c"]]
)
# The last metric is compared with a number.
METRICS = {m.key: m for m in [Metric(f"reward/{n}", str(n), SCORED, None, "higher") for n in range(3)]}
METRICS["judge/j/win_rate"] = Metric("judge/j/win_rate", "win rate", SCORED, None, "higher", neutral=0.5)


def null_values(rng: np.random.Generator, prompts: int = 40) -> pd.DataFrame:
    """Three methods with three seeds, all as good as the initial model; trainings vary, and so do prompts."""
    parts = []
    for key, metric in METRICS.items():
        hard = rng.normal(size=prompts)
        for method in EXPERIMENT.methods:
            for seed in EXPERIMENT.seeds[:1] if method == "initial" else EXPERIMENT.seeds:
                luck = 0.0 if method == "initial" else rng.normal(0, 0.3)
                if metric.neutral is not None:
                    values = (rng.random(prompts) < 1 / (1 + np.exp(-luck))).astype(float)
                else:
                    values = hard + luck + rng.normal(size=prompts)
                columns = {"metric": key, "method": method, "seed": seed, "cluster": np.arange(prompts)}
                parts.append(pd.DataFrame(columns | {"value": values}))
    return pd.concat(parts).assign(dataset="d", model="m", prompts="test", stratum="")


@pytest.mark.slow
def test_tables_of_nothing_have_no_arrows_and_intervals_that_hold_it():
    rng = np.random.default_rng(0)
    arrows, primary, held = 0, [], []
    for _ in range(TABLES):
        values = null_values(rng)
        shown = tables.readable(tables.estimates(values, METRICS), METRICS)
        arrows += (shown["sign"] != "").any()
        compared = tables.comparisons(values, METRICS, EXPERIMENT)
        primary.append(
            (compared[compared["kind"] == "primary"]["p_adjusted"] < 0.05).groupby(compared["metric"]).any()
        )
        held += ((compared["low"] <= 0) & (compared["high"] >= 0)).tolist()
        held += ((shown["difference_low"] <= 0) & (shown["difference_high"] >= 0))[shown["p"].notna()].tolist()
    # A whole table is wrong in 5 of 100 cases; so is the family of a metric's primary comparisons.
    assert arrows / TABLES < 0.05 + 3 * 0.016
    assert np.mean(primary) < 0.05 + 3 * 0.008
    assert 0.935 < np.mean(held) < 0.99


@pytest.mark.slow
def test_a_pipeline_of_controls_reads_neutral(tiny_model, tmp_path):
    config = yaml.safe_load((ROOT / "config" / "controls.yaml").read_text())
    config["results"] = str((tmp_path / "results").relative_to(tmp_path))
    config["models"]["smollm2"] = {"path": str(tiny_model), "context": 512}
    config["organisms"]["shuffled"] |= {"texts": str(ROOT / "organisms/rude.yaml"), "prompts": 24}
    config["rewards"]["rude"]["rule"]["organism"] = str(ROOT / "organisms/rude.yaml")
    config["rewards"]["shuffled"]["train"]["layers"] = 1
    config["forward"]["precision"] = "fp32"
    config["experiments"]["controls"]["methods"] = ["initial", "d2o-still", "dpo-still"]
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "controls.yaml").write_text(yaml.safe_dump(config))
    command = ["-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", tmp_path, "--cores", "2",
               "--configfile", tmp_path / "controls.yaml"]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    folder = tmp_path / "results/reports/controls"
    table, compared = (pd.read_csv(folder / f"{name}.csv") for name in ("table", "comparisons"))
    # Learning rate 0: the same answers, scores and log-probs as the initial model's, to the last digit.
    differences = table["difference"].dropna()
    assert len(differences) > 20 and (differences == 0).all() and (table["p_adjusted"].dropna() == 1).all()
    assert (compared["difference"] == 0).all() and (compared["p"] == 1).all()
    text = (folder / "table.md").read_text()
    assert not any(sign in text.split("## ", 1)[1].split("▲ better")[0] for sign in "▲▼△▽") and "undecided" in text
    run = tmp_path / "results/shuffled/smollm2"
    for method in ("d2o-still", "dpo-still"):
        for seed in (0, 1):
            lines = (run / method / f"seed{seed}/train.jsonl").read_text().splitlines()
            assert all(json.loads(line)["loss"] == pytest.approx(math.log(2), abs=1e-5) for line in lines)
    # A scorer that sees only the prompt, or learnt from shuffled labels, cannot tell answers apart.
    prompt = table[(table["metric"] == "reward/prompt") & (table["seed"] == "all")]
    assert prompt["mean"].nunique() == 1
    made = json.loads((tmp_path / "results/shuffled/rewards/shuffled/manifest.json").read_text())
    assert made["pair_accuracy_low"] < 0.5 < made["pair_accuracy_high"]
    assert "shuffled</b> are weak evidence" in (folder / "report.html").read_text()
