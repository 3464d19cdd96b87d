"""Figure 1: which human pairs are chosen, and the measures on them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from d2o import identities, pair_quality, records, report, schemas, settings
from d2o.errors import D2OError
from d2o.metrics import Archive
from d2o.report import figures
from d2o.report.pair_quality import as_csv, bars, measure


def pair(prompt: int, answer: int, split: str = "train") -> dict:
    messages = [{"role": "user", "content": f"Question {prompt}?"}]
    return {
        "prompt_id": identities.prompt_id(messages),
        "split": split,
        "messages": messages,
        "negative": f"bad {prompt} {answer}",
        "positive": f"good {prompt} {answer}",
        "positive_unsafe": None,
        "categories": None,
        "severity": None,
    }


def choose(folder: Path, pairs: list[dict], number: int) -> dict[str, list[dict]]:
    records.write_table(folder / "pairs.parquet", schemas.NEGATIVES, pairs)
    made = folder / "pku" / "pair_quality"
    pair_quality.choose(settings.PairQuality(pairs=number), folder / "pairs.parquet", made / "prompts.parquet")
    tables = {"prompts": schemas.PROMPTS, "chosen": schemas.SAMPLES, "rejected": schemas.SAMPLES}
    return {name: records.read_table(made / f"{name}.parquet", schema) for name, schema in tables.items()}


def couples(tables: dict[str, list[dict]]) -> set[tuple[str, str]]:
    sides = [{(r["prompt_id"], r["sample"]): r["text"] for r in tables[side]} for side in ("chosen", "rejected")]
    assert sides[0].keys() == sides[1].keys()
    return {(sides[0][key], sides[1][key]) for key in sides[0]}


def test_chosen_and_rejected_are_of_the_same_pairs(tmp_path):
    pairs = [pair(i, j, "test" if i % 5 == 0 else "train") for i in range(20) for j in range(4)]
    tables = choose(tmp_path, pairs, 30)
    chosen = couples(tables)
    assert len(chosen) == 30
    held_out = {(p["positive"], p["negative"]) for p in pairs if p["split"] == "test"}
    assert len(held_out) == 16 and held_out < chosen
    assert chosen < {(p["positive"], p["negative"]) for p in pairs}
    assert {p["prompt_id"]: p["origin"] for p in tables["prompts"]}.items() <= {
        (p["prompt_id"], p["split"]) for p in pairs
    }
    assert {p["prompt_id"] for p in tables["prompts"]} == {r["prompt_id"] for r in tables["chosen"]}
    # The judge asks about sample 0 of each prompt.
    assert {r["prompt_id"] for r in tables["chosen"] if r["sample"] == 0} == {
        p["prompt_id"] for p in tables["prompts"]
    }
    assert couples(choose(tmp_path, random.Random(0).sample(pairs, 80), 30)) == chosen
    assert chosen < couples(choose(tmp_path, pairs, 31))
    assert len(couples(choose(tmp_path, pairs, 1000))) == 80


def test_a_data_set_without_pairs(tmp_path):
    with pytest.raises(D2OError, match="no human pair"):
        choose(tmp_path, [], 10)
    assert not list(tmp_path.glob("pku/pair_quality/*"))


def config(**experiment) -> settings.Settings:
    """An experiment with a reward model, one with lower scores for better answers, one trained here, and a
    classifier of toxicity."""
    source = {"path": "reward"}
    entry = {"datasets": ["pku"], "models": ["smol"], "methods": ["initial"], "pair_quality": True}
    return settings.load(
        {
            "experiments": {"figure": entry | experiment},
            "models": {"smol": {"path": "smol"}},
            "datasets": {"pku": {"format": "pku-saferlhf", "train": ["pku.jsonl"]}},
            "rewards": {
                "reward": {"source": source},
                "cost": {"source": source, "better": "lower"},
                "trained": {"train": {"backbone": "smol"}},
                "toxicity": {"source": source, "better": "lower", "toxic_above": 0.5},
            },
            "judges": {"gpt": {"base_url": "http://localhost/v1", "model": "gpt"}},
        },
        "test",
    )


def scored(folder: Path, scorer: str, tables: dict[str, list[dict]], score) -> None:
    (folder / f"pku/pair_quality/scores/{scorer}").mkdir(parents=True, exist_ok=True)
    for side in ("chosen", "rejected"):
        rows = [{key: r[key] for key in ("prompt_id", "sample")} | {"score": score(side, r)} for r in tables[side]]
        records.write_table(folder / f"pku/pair_quality/scores/{scorer}/{side}.parquet", schemas.SCORES, rows)


def test_measures(tmp_path):
    tables = choose(tmp_path, [pair(i, j, "test" if i < 2 else "train") for i in range(10) for j in range(2)], 1000)
    test = {p["prompt_id"] for p in tables["prompts"] if p["origin"] == "test"}
    chosen_is = {"chosen": 1.0, "rejected": 0.0}
    scored(tmp_path, "reward", tables, lambda side, r: 7 + 3 * chosen_is[side])
    scored(tmp_path, "cost", tables, lambda side, r: -4 * chosen_is[side])
    # Right about test prompts, wrong about the prompts that it was trained on.
    scored(tmp_path, "trained", tables, lambda side, r: chosen_is[side] * (1 if r["prompt_id"] in test else -1))
    scored(tmp_path, "toxicity", tables, lambda side, r: r["sample"] if side == "chosen" else 0.9)
    verdicts = [
        {"prompt_id": p["prompt_id"], "order": order, "verdict": verdict, "reason": "", "longer": 3}
        for p in tables["prompts"]
        for order, verdict in (("initial-first", "method"), ("method-first", "tie"))
    ]
    (tmp_path / "pku/pair_quality/judge").mkdir()
    records.write_table(tmp_path / "pku/pair_quality/judge/gpt.parquet", schemas.VERDICTS, verdicts)

    chosen = config(rewards=["reward", "cost", "trained", "toxicity"], judges=["gpt"])
    measures = measure(Archive(tmp_path), chosen, "pku")
    means = {(m.measure, m.scorer, m.preference): (m.mean, m.prompts, len(m.values)) for m in measures.itertuples()}
    # Half of the scores differ from the other half by one step: the standard deviation is half a step.
    assert means == {
        ("difference", "reward", ""): (2.0, 10, 20),
        ("difference", "cost", ""): (2.0, 10, 20),
        ("difference", "trained", ""): (2.0, 2, 4),
        ("toxic", "toxicity", "chosen"): (0.5, 10, 20),
        ("toxic", "toxicity", "rejected"): (1.0, 10, 20),
        ("win_rate", "gpt", ""): (0.75, 10, 20),
    }
    lines = as_csv(measures).splitlines()
    assert lines[1] == "pku,difference,reward,,2,2,2,10,20"
    shares = bars(measures)
    assert shares.groupby("scorer")["share"].sum().to_dict() == {"cost": 1, "reward": 1, "trained": 1}
    full = shares[shares["share"] > 0]
    assert ((full["from"] <= 2) & (full["to"] >= 2)).all()
    figure = tmp_path / "reports/figure/figures/pair_quality.svg"
    report.write_pair_quality(chosen, tmp_path, figure)
    kinds = ("csv", "pdf", "png", "svg")
    files = records.read_manifest(figure)["files"]
    assert files == [*(f"figures/pair_quality.{kind}" for kind in kinds), "pair_quality.csv"]
    assert all((figure.parents[1] / name).exists() for name in files)
    svg = figures.render(figures.pair_quality(measures, bars(measures), ["pku"]), "svg").decode()
    assert "not measured" not in svg
    assert all(name in svg for name in ("reward", "cost", "chosen, toxicity", "gpt"))


def test_a_panel_without_entries_says_which_would_fill_it(tmp_path):
    tables = choose(tmp_path, [pair(i, 0) for i in range(5)], 10)
    scored(tmp_path, "trained", tables, lambda side, r: 0.0)
    only = measure(Archive(tmp_path), config(rewards=["trained"]), "pku")
    assert only["mean"].isna().tolist() == [True]  # no test prompt was chosen
    svg = figures.render(figures.pair_quality(only, bars(only), ["pku"]), "svg").decode()
    assert svg.count("not measured") == 2
    assert "names no judges" in svg
    assert "names no rewards with toxic_above" in svg


def test_scores_of_other_pairs(tmp_path):
    tables = choose(tmp_path, [pair(i, 0) for i in range(5)], 10)
    scored(tmp_path, "reward", tables | {"rejected": tables["rejected"][1:]}, lambda side, r: 0.0)
    with pytest.raises(D2OError, match="different pairs"):
        measure(Archive(tmp_path), config(rewards=["reward"]), "pku")
