"""The results of an experiment on one screen of a terminal, for the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Beginnings of the names of the metrics that are shown, in order; the most metrics and methods that are shown.
_FIRST, _METRICS, _METHODS = ("reward/", "judge/", "human_eval/", "task/", "human/"), 6, 30


def show(page: str) -> None:
    """Print a table for each data set and model of a report: the metrics that have a `better`, with intervals.

    Args:
        page: the report; `table.csv` lies beside it.
    """
    import pandas as pd
    from rich.console import Console

    console = Console()
    values = pd.read_csv(Path(page).with_name("table.csv"), dtype={"seed": str})
    for (dataset, model), block in values.groupby(["dataset", "model"], sort=False):
        console.print(_table(f"{dataset}, {model}", block))


def _table(title: str, block: pd.DataFrame):
    """A table with each metric on the test prompts, or else on those of an evaluation file."""
    import pandas as pd
    from rich.table import Table
    from rich.text import Text

    block = block[block["seed"].eq("all") & block["better"].notna() & block["prompts"].ne("validation")]
    test = block["prompts"].isna() | block["prompts"].eq("test")  # questions of tasks have no origin
    block = pd.concat([block[test], block[~test]])
    block = block[~block.duplicated(["method", "metric"])]
    metrics = [metric for metric in block["metric"].unique() if not metric.endswith("_by_subject")]
    chosen = sorted((m for m in metrics if m.startswith(_FIRST)), key=lambda m: _rank(m, metrics))[:_METRICS]
    cells = block.set_index(["method", "metric"])
    shown = Table("method", title=title, caption="mean [95 %], ▲ better, ▼ worse than the initial model (p < 0.05)")
    for metric in chosen:
        shown.add_column(
            Text(f"{metric.partition('/')[2].replace('_', ' ')} {'↑' if _higher(block, metric) else '↓'}"),
            justify="right",
        )
    methods = block["method"].unique()
    for method in methods[:_METHODS]:
        row = [cells.loc[(method, m)] if (method, m) in cells.index else None for m in chosen]
        shown.add_row(Text(method), *("–" if cell is None else _cell(cell) for cell in row))
    if len(methods) > _METHODS:
        shown.add_row(f"{len(methods) - _METHODS} more: report")
    return shown


def _rank(metric: str, metrics: list[str]) -> tuple[int, int]:
    return next(n for n, start in enumerate(_FIRST) if metric.startswith(start)), metrics.index(metric)


def _higher(block: pd.DataFrame, metric: str) -> bool:
    return block.loc[block["metric"].eq(metric), "better"].iloc[0] == "higher"


def _cell(cell: pd.Series) -> str:
    mark = ""
    if cell["p_adjusted"] < 0.05:
        mark = " ▲" if (cell["difference"] > 0) == (cell["better"] == "higher") else " ▼"
    return f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]{mark}"
