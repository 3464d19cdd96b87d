"""The study: its findings on synthetic values, missing data, and parts that can decide their hypotheses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import test_report
from conftest import ROOT
from d2o import datasets, negatives, organisms, records, runs, schemas, settings, statistics, study
from d2o.errors import D2OError
from d2o.statistics import Sample
from d2o.study import GOOD, HARM, HYPOTHESES, NOISE, POLITE, Hypothesis

CONFIGS = ("study", "study-pku")
PROMPTS, SEEDS = 60, 3
UP = Hypothesis("x", "more", GOOD, study.less("p/a", "p/b"), "above 0")
DOWN = Hypothesis("y", "less", GOOD, study.less("p/a", "p/b"), "below 0")


def config(name: str) -> settings.Settings:
    return settings.load(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text()), name)


def part(means: dict[str, float], metric: str = GOOD, seeds: int = SEEDS, seed: int = 0) -> pd.DataFrame:
    """Kept values of a part: 0 or 1 for each prompt and training, with these means."""
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([[metric], [f"{n:08x}" for n in range(PROMPTS)]], names=["metric", "cluster"])
    columns = {f"{name}/seed{s}": rng.random(PROMPTS) < mean for name, mean in means.items() for s in range(seeds)}
    return pd.DataFrame(columns, index).astype(float)


def findings(tables: dict[str, pd.DataFrame], *hypotheses: Hypothesis) -> list[str]:
    return study.findings(tables, hypotheses)["finding"].tolist()


# Findings ------------------------------------------------------------------------------------------


def test_supported_contradicted_undecided_and_missing():
    assert findings({"p": part({"a": 0.8, "b": 0.3})}, UP, DOWN) == ["supported", "contradicted"]
    assert findings({"p": part({"a": 0.5, "b": 0.5})}, UP, DOWN) == ["undecided", "undecided"]
    assert findings({}, UP) == [""]
    assert findings({"p": part({"a": 0.8})}, UP) == [""], "a method without values"
    assert findings({"p": part({"a": 0.8, "b": 0.3}, HARM)}, UP) == [""], "another metric"


def test_five_trainings_find_twenty_points():
    """Prompts and trainings vary; three trainings, corrected for all claims, hardly ever find them."""
    rng, strictest = np.random.default_rng(0), 0.05 / len(HYPOTHESES)

    def values(mean: float, seeds: int, hard: np.ndarray) -> Sample:
        chance = mean + hard + rng.normal(0, 0.03, (seeds, 1))
        prompts, trainings = np.tile(np.arange(len(hard)), seeds), np.repeat(np.arange(seeds), len(hard))
        return Sample((rng.random(chance.shape) < chance).ravel().astype(float), prompts, seeds=trainings)

    def power(seeds: int, tables: int = 100) -> float:
        hard = [rng.normal(0, 0.25, 144) for _ in range(tables)]
        p = [statistics.difference(values(0.6, seeds, h), values(0.4, seeds, h)).p for h in hard]
        return float(np.mean(np.array(p) < strictest))

    assert power(5) > 0.7
    assert power(3) < 0.3


def test_a_seed_that_failed_leaves_the_others():
    table = part({"a": 0.8, "b": 0.3})
    finding = study.findings({"p": table.drop(columns="a/seed1")}, [UP]).iloc[0]
    assert finding["finding"] == "supported"
    left = table[["a/seed0", "a/seed2"]].to_numpy().mean()
    assert finding["mean"] == pytest.approx(left - table.filter(like="b/").to_numpy().mean())


def test_no_later_part_makes_an_adjusted_p_value_larger():
    others = [Hypothesis(f"o{n}", "more", GOOD, study.less(f"q{n}/a", f"q{n}/b"), "above 0") for n in range(4)]
    tables = {"p": part({"a": 0.62, "b": 0.4})}
    before = study.findings(tables, [UP, *others])["p_adjusted"]
    assert before[1:].isna().all()
    for n, mean in enumerate([0.9, 0.4, 0.6, 0.45]):
        tables[f"q{n}"] = part({"a": mean, "b": 0.4}, seed=n + 1)
        after = study.findings(tables, [UP, *others])["p_adjusted"]
        assert (after[before.notna()] <= before.dropna() + 1e-12).all()
        before = after


def test_a_slope_is_that_of_the_line_through_the_means():
    tables = {name: part({"dpo": 0.2 + 0.5 * x}, HARM, seed=n) for n, (name, x) in enumerate(NOISE.items())}
    (rises,) = (h for h in HYPOTHESES if h.name == "1a")
    finding = study.findings(tables, [rises]).iloc[0]
    means = [table.to_numpy().mean() for table in tables.values()]
    assert finding["mean"] == pytest.approx(np.polyfit(list(NOISE.values()), means, 1)[0])
    assert finding["low"] < 0.5 < finding["high"]
    assert finding["finding"] == "supported"


def test_modes():
    one = Hypothesis("x", "one", POLITE, {"p/a": 1.0}, "one mode")
    more = Hypothesis("y", "more", POLITE, {"p/a": 1.0}, "more modes")
    table = part({"a": 0.5}, POLITE)
    rng = np.random.default_rng(0)
    hill = rng.normal(size=PROMPTS)
    camel = hill * 0.1 + np.where(np.arange(PROMPTS) % 2, 3, -3)
    for values, expected in ((hill, ["not contradicted", "undecided"]), (camel, ["contradicted", "supported"])):
        table.loc[:, :] = values[:, None]
        assert findings({"p": table}, one, more) == expected


def test_where_lines_cross():
    tables = {
        name: part({"initial": 0.5, "dpo": 0.1 + 0.8 * x, "simpo": 0.0}, HARM, seed=n)
        for n, (name, x) in enumerate(NOISE.items())
    }
    tables["noise-0"] = tables["noise-0"].join(part({"d2o": 0.4}, HARM, seed=9))
    noise = study.against_noise(tables)
    part_of_them = study.against_noise({name: table for name, table in tables.items() if name != "noise-50"})
    assert study.crossings(part_of_them) == {}, "a share is missing"
    assert study.crossings(noise) == {"DPO": "50%", "SimPO": "never"}
    assert len(noise) == 4 * len(NOISE) and noise[noise["method"] == "D2O"]["mean"].nunique() == 1
    assert study.crossings(study.against_noise({name: tables[name] for name in list(tables)[1:]})) == {}
    text = study.results(tables, study.findings(tables), Path("study"), {})
    assert re.search(r"\| DPO \| \d.*\| 50% \|\n", text)
    assert study.plot(noise) == study.plot(noise)


def test_best_points_are_chosen_by_validation_and_told_of_test_prompts():
    rows = [("a", 6, 0.5, 0.9), ("a", 18, 0.7, 0.6), ("b", 6, 0.4, 0.1), ("b", 18, 0.3, 0.8)]
    course = pd.DataFrame(
        {"method": method, "step": step, "metric": GOOD, "prompts": prompts, "mean": mean}
        for method, step, *means in rows
        for prompts, mean in zip(["validation", "test"], means, strict=True)
    )
    assert study.best_points(course)[["method", "step", "mean"]].values.tolist() == [["a", 18, 0.6], ["b", 6, 0.1]]


# What is kept, and the page ------------------------------------------------------------------------


def test_values_are_kept_and_read_again(tmp_path):
    rows = [
        ("d2o", 0, GOOD, "test", "0123456789abcdef", 1.0),
        ("d2o", 1, GOOD, "test", "0123456789abcdef", 0.0),
        ("d2o", 0, GOOD, "validation", "fedcba9876543210", 1.0),
        ("d2o", 0, "task/mmlu/acc", "", "geography/10", 1.0),
        ("d2o", 0, "reward/other", "test", "0123456789abcdef", 1.0),
    ]
    values = pd.DataFrame(rows, columns=["method", "seed", "metric", "prompts", "cluster", "value"])
    table = study.wide(values)
    assert table.index.tolist() == [(GOOD, "01234567"), ("task/mmlu/acc", "geography/10")]
    assert table.columns.tolist() == ["d2o/seed0", "d2o/seed1"]
    (tmp_path / "rivals").mkdir()
    table.to_csv(tmp_path / "rivals" / "values.csv")
    pd.testing.assert_frame_equal(study.read(tmp_path)["rivals"], table, check_names=False)
    (tmp_path / "rivals" / "values.csv").write_text("a,b\n1,2\n")
    with pytest.raises(D2OError, match=r"rivals/values.csv: no table of `d2o study`.*delete it"):
        study.read(tmp_path)


def test_a_part_is_kept_once_its_report_is_there(tmp_path, monkeypatch):
    s = test_report.config().model_copy(update={"results": str(tmp_path / "results")})
    test_report.Results(tmp_path / "results", s)
    monkeypatch.setattr(study, "parts", lambda: ["demo", "another"])
    study.keep(s, tmp_path / "docs")
    assert study.read(tmp_path / "docs") == {}
    figures = tmp_path / "results/reports/demo/figures"
    figures.mkdir(parents=True)
    (figures.parent / "report.html").touch()
    (figures / "course.csv").write_text("of the figure\n")
    (figures.parent / "course.csv").write_text("step\n")
    (name, *_), (model, *_) = s.experiments["demo"].datasets, s.experiments["demo"].models
    base = tmp_path / "results" / name / model
    jobs = {"logs/positives-k4-1-of-1": 60, "dpo/seed0/logs/train": 90, "dpo/seed1/logs/train": 30}
    jobs |= {"dpo.trial-1/seed0/logs/train": 30, "other/seed0/logs/train": 600}
    for place, seconds in jobs.items():
        file = base / f"{place}.benchmark.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"s\tcpu_time\n1\t1\n9\t{seconds}\n")
    trials = [
        {"trial": f"dpo.trial-{n}", "values": {"train.learning_rate": n}, "mean": n / 4, "n": 48} for n in (1, 2)
    ]
    choice = {"trial": "dpo.trial-2", "metric": GOOD, "trials": trials}
    (base / "dpo" / "tuned.json").write_text(json.dumps(choice))
    study.keep(s, tmp_path / "docs")
    table = study.read(tmp_path / "docs")["demo"]
    assert {"initial/seed0", "d2o/seed0", "d2o/seed1", "dpo/seed1"} <= {*table}
    assert {HARM, "human/margin", "answers/tokens", "task/mmlu/acc"} <= {*table.index.get_level_values("metric")}
    assert (tmp_path / "docs/demo/course.csv").read_text() == "step\n"
    assert (tmp_path / "docs/demo/time.csv").read_text() == "job,jobs,cpu_minutes\npositives,1,1\ntrain,3,2.5\n"
    _, shown = study._trials(pd.read_csv(tmp_path / "docs/demo/tuned.csv"))
    assert shown.splitlines()[2:] == ["| dpo | 25.0 | **50.0** |"]


@pytest.mark.parametrize(
    ("metric", "title", "cells"),
    [(GOOD, "good, %", "2.0 | **5.7**"), ("human/margin", "margin", "0.020 | **0.057**")],
)
def test_trials_are_shown_by_the_metric_that_chose_among_them(metric, title, cells):
    values = {
        "train.learning_rate": [1e-5, 1e-4],
        metric: [0.02, 0.0571],
        "prompts": [48, 48],
        "chosen": [False, True],
    }
    text, table = study._trials(pd.DataFrame({"method": ["d2o", "d2o"], **values}))
    assert title in text and table.splitlines()[-1] == f"| d2o | {cells} |"


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # a folder without results
    (tmp_path / "study").mkdir()
    (tmp_path / "study.md").write_text("before\n\n{}\nold\n{}\n\nafter\n".format(*study.MARKS))
    return tmp_path / "study.md"


def test_the_page_says_what_is_done_unfinished_failed_and_not_run_yet(page):
    data = yaml.safe_load((ROOT / "config" / "study.yaml").read_text())
    data["experiments"]["rivals"]["failed"] = {"ga/seed1": "diverged at step 4"}
    chosen = settings.load(data, "study")
    trained = Path("results/study/noise-0/organism/d2o-plain/seed1/model/manifest.json")
    trained.parent.mkdir(parents=True)
    trained.write_text("{}")
    table = part({"initial": 0.3, "d2o": 0.8, "npo": 0.4, "ga": 0.1})
    (page.parent / "study" / "rivals").mkdir()
    table.drop(columns="ga/seed1").to_csv(page.parent / "study" / "rivals" / "values.csv")
    study.write_page([chosen], page.parent / "study", page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| rivals | done; seed failed: ga/seed1: diverged at step 4 |" in text
    assert "| anchors | unfinished: 1 of 20 trainings |" in text
    assert "| variants | not run yet |" in text and "| pku | not run yet |" in text
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["4a"].endswith("] | 0.025 | **supported** |")
    assert lines["4c"].endswith("| – | – | no data yet: rivals |"), "no unlikelihood"
    assert lines["1a"].endswith("no data yet: noise-0, noise-25, noise-50, noise-75, noise-100 |")
    again = page.read_text()
    study.write_page([chosen], page.parent / "study", page)
    assert page.read_text() == again
    page.write_text("no marks")
    with pytest.raises(D2OError, match=r"study\.md: the line <!-- results: .* are missing; put them back"):
        study.write_page([chosen], page.parent / "study", page)


def test_hypotheses_stand_in_the_page():
    text = (ROOT / "docs" / "study.md").read_text()
    for h in HYPOTHESES:
        assert f"| {h.name} | {h.claim} |" in text, "run d2o study config/study.yaml"


def test_intervals_of_the_text_are_those_of_the_results():
    before, rest = (ROOT / "docs" / "study.md").read_text().split(study.MARKS[0])
    results, after = rest.split(study.MARKS[1])
    intervals = re.findall(r"\[(−?[\d.]+),\s+(−?[\d.]+)\]", before + after)
    assert len(intervals) > 10
    assert [pair for pair in intervals if f"[{pair[0]}, {pair[1]}]" not in results] == []


# The parts -----------------------------------------------------------------------------------------


def test_parts_can_answer_what_they_are_asked():
    experiments = {name: e for c in CONFIGS for name, e in config(c).experiments.items()}
    assert set(study.parts()) == experiments.keys() - {"organism"}
    for h in HYPOTHESES:
        kind, name, *_ = h.metric.split("/")
        for cell in h.weights:
            part, _, method = cell.partition("/")
            e = experiments[part]
            assert method in e.methods, f"{h.name}: {cell}"
            assert kind == "human" or name in getattr(e, f"{kind}s"), f"{h.name}: {cell} has no {h.metric}"
            assert len(e.seeds) == 5


def test_methods_of_a_part_differ_in_what_is_asked_and_have_as_many_trials():
    for name in CONFIGS:
        s = config(name)
        for experiment, e in s.experiments.items():
            trained = [s.methods[method] for method in e.methods if method != "initial"]
            assert len({str(method.tune) for method in trained}) == 1, experiment
            steps = {runs.train_of(s, method).steps for method in trained}
            assert len(steps) == 1, experiment
            assert {method.beta for method in trained if method.loss != "simpo"} <= {0.1, None}, experiment


@pytest.mark.slow
@pytest.mark.parametrize("part", study.parts())
def test_each_part_has_a_plan_alone(part, tmp_path):
    name = "study-pku" if part == "pku" else "study"
    data = yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())
    if part == "pku":  # the rows are the user's
        data["datasets"]["pku"] |= {
            "train": ["tests/data/thumbs-down.jsonl"],
            "test": ["tests/data/thumbs-down.jsonl"],
        }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data | {"results": str(tmp_path / "results")}))
    page = tmp_path / "results" / "reports" / part / "report.html"
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "--cores", "1"]
    done = subprocess.run(
        [*command, page, "--configfile", tmp_path / "config.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # A training, its answers, scores and log-probs take three core minutes: 60 take under two hours on two cores.
    trainings = int(re.search(r"^train_method +(\d+)$", done.stdout, re.MULTILINE)[1])
    assert 10 < trainings < 60


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, Path]:
    """The tables of negatives of hypothesis 1's data sets, by name."""
    s, folder = config("study"), tmp_path_factory.mktemp("worlds")
    tables = {}
    for name in NOISE:
        organism = s.organisms[s.datasets[name].organism].model_copy(
            update={"texts": str(ROOT / "organisms/rude.yaml")}
        )
        organisms.write(organism, folder / name)
        files = {split: [str(folder / name / f"{split}.jsonl")] for split in ("train", "test")}
        reading = settings.Reading(format="pku-saferlhf-beta", **files)
        datasets.read(reading, folder / name / "rows.parquet")
        keys = s.datasets[name].model_dump(include=set(settings.Extraction.model_fields))
        negatives.extract(settings.Extraction(**keys), folder / name / "rows.parquet", folder / name)
        tables[name] = folder / name / "negatives.parquet"
    return tables


def test_what_d2o_learns_from_does_not_depend_on_noise_and_what_dpo_imitates_does(worlds):
    """So D2O's line in hypothesis 1 is flat by construction, and one part trains it."""
    tables = {name: records.read_frame(path, schemas.NEGATIVES) for name, path in worlds.items()}
    seen = ["prompt_id", "split", "negative"]
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table[seen], tables["noise-0"][seen])
        train = table[table["split"] == "train"]
        before = tables["noise-0"].loc[train.index, "positive"]
        assert (train["positive"] != before).mean() == pytest.approx(NOISE[name], abs=0.1)
    counts = tables["noise-0"]["split"].value_counts().to_dict()
    assert counts == {"train": 96, "validation": 48, "test": 144}


@pytest.mark.slow
def test_the_command_on_the_shipped_page(tmp_path):
    page = tmp_path / "study.md"
    page.write_text((ROOT / "docs" / "study.md").read_text())
    command = [sys.executable, "-m", "d2o", "study", *(f"{ROOT}/config/{name}.yaml" for name in CONFIGS)]
    subprocess.run([*command, "--page", page], check=True, cwd=tmp_path)
    assert "| rivals | not run yet |" in page.read_text()
    assert (tmp_path / "study" / "findings.csv").exists()
