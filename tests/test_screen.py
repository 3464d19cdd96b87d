"""The screen of results at the end of a run."""

import pandas as pd
import pytest

from d2o import metrics
from d2o.report import screen

ROW = {
    "dataset": "demo",
    "model": "tiny",
    "prompts": "test",
    "seed": "all",
    "better": "lower",
    "low": 0.1,
    "high": 0.3,
}


@pytest.fixture
def page(tmp_path):
    rows = [
        ROW | {"method": "initial", "metric": "reward/harm", "mean": 0.4, "prompts": "validation"},
        ROW | {"method": "initial", "metric": "reward/harm", "mean": 0.3, "prompts": "others"},
        ROW | {"method": "initial", "metric": "reward/harm", "mean": 0.5},
        ROW | {"method": "initial", "metric": "task/mmlu", "mean": 0.25, "prompts": None, "better": "higher"},
        ROW | {"method": "[d2o]", "metric": "reward/harm", "mean": 0.2, "difference": -0.3, "p_adjusted": 0.01},
        ROW | {"method": "[d2o]", "metric": "reward/harm", "mean": 0.9, "prompts": "others"},
        ROW | {"method": "[d2o]", "metric": "reward/harm", "mean": 0.8, "seed": "0"},
        ROW | {"method": "[d2o]", "metric": "human/margin", "mean": 0.7, "better": "higher", "difference": -1.0}
        | {"p_adjusted": 0.0},
        ROW | {"method": "[d2o]", "metric": metrics.PEOPLE_METRICS[0].key, "mean": 0.625, "better": "higher"},
        ROW | {"method": "[d2o]", "metric": "answers/tokens", "mean": 99.5, "better": None},
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "report.html"


def test_the_test_prompts_over_all_seeds_are_shown_and_names_are_no_markup(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    screen.show(page)
    shown = capsys.readouterr().out
    for part in (
        "demo, tiny",
        "harm ↓",
        "margin ↑",
        "0.500 [0.100, 0.300] ",
        "0.200 [0.100, 0.300] ▲",
        "[d2o]",
        "harmlessness/win rate ↑",
        "mmlu ↑",
        "0.250 [0.100, 0.300] ",
        "0.625 [0.100, 0.300]",
        "0.700 [0.100, 0.300] ▼",
    ):
        assert part in shown
    assert not any(other in shown for other in ("0.900", "0.800", "99.5", "0.400", "0.300 ["))


def test_200_methods_are_one_screen(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [ROW | {"method": f"m{n}", "metric": "reward/harm", "mean": 0.5, "p_adjusted": 1.0} for n in range(200)]
    pd.DataFrame(rows).assign(difference=0.0).to_csv(page.with_name("table.csv"), index=False)
    screen.show(page)
    shown = capsys.readouterr().out
    assert "170 more: report" in shown and shown.count("\n") < 45
