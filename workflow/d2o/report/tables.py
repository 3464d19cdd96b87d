"""Estimates of every metric and method, as table.csv, table.md, table.tex and the grids of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from d2o import statistics
from d2o.report.metrics import EXACT, HUMAN, HUMAN_METRICS, SCORED, STYLE, TASKS, WHOLE, Metric, together
from d2o.statistics import Estimate, Sample

GROUPS = (EXACT, SCORED, TASKS, HUMAN, STYLE)
LEGEND = (
    "▲ better, ▼ worse than the initial model: the 95 % interval of the paired difference excludes 0 "
    "(△ higher, ▽ lower where neither is better as such). – not measured, or no interval from one prompt."
)

# What an estimate is of, in table.csv and in course.csv; and the columns of the numbers.
TABLE = ["dataset", "model", "method", "metric", "prompts"]
COURSE = ["dataset", "model", "method", "step", "metric", "prompts"]
_ESTIMATE = ["better", "mean", "low", "high", "n"]
_CHANGE = ["difference", "difference_low", "difference_high"]
_LATEX = {"▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "△": r"$\triangle$", "▽": r"$\triangledown$"}
_LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$", "–": "--", "\u00a0": "~"}


@dataclass(frozen=True)
class Block:
    """Everything measured on one data set and model.

    Attributes:
        estimates: a row a method, metric and origin of the prompts, as from `estimates`.
        steps: the values at every step of the runs with snapshots, as from `metrics.course`.
        course: the estimates from them.
        logs: a row a step of each training, as from `metrics.logs`.
    """

    dataset: str
    model: str
    estimates: pd.DataFrame
    steps: pd.DataFrame
    course: pd.DataFrame
    logs: pd.DataFrame


@dataclass(frozen=True)
class Measured:
    """Everything measured in an experiment: what its tables and figures show.

    Attributes:
        methods: in reading order, as in the config.
        metrics: by key, in reading order.
        categories: negatives in each harm category, by data set and split.
        pair_quality: whether the experiment measures the human pairs.
    """

    methods: list[str]
    metrics: Mapping[str, Metric]
    blocks: list[Block]
    categories: Mapping[str, Mapping[str, Mapping[str, int]]]
    pair_quality: bool

    @property
    def effects(self) -> list[tuple[Block, Grid]]:
        """What the report opens with, where there is something to open with."""
        return [(block, grid) for block in self.blocks if (grid := effect(self, block))]


def estimates(values: pd.DataFrame, metrics: Mapping[str, Metric], place: Sequence[str] = TABLE) -> pd.DataFrame:
    """Means and paired differences to the initial model with their intervals; NaN where there are none.

    Args:
        values: as from `metrics.observe` or `metrics.course`.
        place: the columns that tell what an estimate is of; the seeds are pooled.
    """
    from tqdm import tqdm

    samples = {
        key: Sample(*(rows[column].to_numpy() for column in ("value", "cluster", "stratum")))
        for key, rows in values.groupby(place, sort=False)
    }
    found = []
    for key, sample in tqdm(samples.items(), desc="intervals", unit="metric", mininterval=2):
        row = dict(zip(place, key, strict=True))
        metric, start = metrics[row["metric"]], samples.get(tuple((row | {"method": "initial"}).values()))
        estimate, change = statistics.mean(sample, macro=metric.macro), Estimate(math.nan, math.nan, math.nan, 0)
        if metric.neutral is not None:
            change = Estimate(*(x - metric.neutral for x in (estimate.mean, estimate.low, estimate.high)), estimate.n)
        elif start is not None and row["method"] != "initial":
            change = statistics.difference(sample, start, macro=metric.macro)
        changes = zip(_CHANGE, (change.mean, change.low, change.high), strict=True)
        found.append(row | {"better": metric.better or ""} | asdict(estimate) | dict(changes))
    return pd.DataFrame(found, columns=[*place, *_ESTIMATE, *_CHANGE])


def number(value: float, metric: Metric) -> str:
    """A value as readers see it: `–` for NaN, a true minus sign, per cent without the sign."""
    if math.isnan(value):
        return "–"
    text = f"{value * 100 if metric.percent else value:.{metric.digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def interval(low: float, high: float, metric: Metric) -> str:
    """`[low, high]`, or `–` where it is undefined."""
    return "–" if math.isnan(low) else f"[{number(low, metric)}, {number(high, metric)}]"


def heading(metric: Metric) -> str:
    """A metric's label with its unit and the direction of better, which no line break parts from it."""
    arrow = {"higher": "\u00a0↑", "lower": "\u00a0↓", None: ""}[metric.better]
    return metric.label + (",\u00a0%" if metric.percent else "") + arrow


def readable(found: pd.DataFrame, metrics: Mapping[str, Metric]) -> pd.DataFrame:
    """Estimates and what readers see of them.

    `value` and `interval`; `change`, the difference and its interval; `sign`: `▲`, `▼`, `△`, `▽`, or nothing where
    the difference's interval holds 0, which `undecided` tells from no interval.
    """
    rows = [(row, metrics[row.metric]) for row in found.itertuples()]
    low, high = found["difference_low"], found["difference_high"]
    signs = {"higher": "▲▼", "lower": "▼▲", "": "△▽"}
    up, down = (found["better"].map(lambda better, i=i: signs[better][i]) for i in (0, 1))
    return found.assign(
        value=[number(r.mean, m) for r, m in rows],
        interval=[interval(r.low, r.high, m) for r, m in rows],
        change=[
            "" if math.isnan(r.difference) else
            f"{number(r.difference, m)} {interval(r.difference_low, r.difference_high, m)}"
            for r, m in rows
        ],
        sign=np.select([low > 0, high < 0], [up, down], ""),
        undecided=(low <= 0) & (high >= 0),
    )  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """A table: a row a method, a column a metric.

    Attributes:
        group: what the metrics have in common.
        prompts: where their prompts come from: `test`, an evaluation file, or `` where there is no prompt.
        metrics: the columns.
        rows: (method, a cell a column): a row of `readable`; None where a method has no such value.
    """

    group: str
    prompts: str
    metrics: list[Metric]
    rows: list[tuple[str, list[Any]]]

    @property
    def sizes(self) -> list[str]:
        """Per column: the clusters behind it, a range where the methods differ."""
        columns = zip(*(cells for _, cells in self.rows), strict=True)
        found = [sorted({cell.n for cell in column if cell}) for column in columns]
        return ["–".join(f"{end:,}" for end in dict.fromkeys(n[:1] + n[-1:])) or "0" for n in found]


def grids(measured: Measured, block: Block) -> list[Grid]:
    """The estimates of a block by group and origin of the prompts, in reading order.

    The columns of human answers are always there: a data set without positives has no value in some.
    """
    known = {*zip(block.estimates["metric"], block.estimates["prompts"], strict=True)}
    known |= {(metric.key, "test") for metric in HUMAN_METRICS}
    origins = sorted({origin for _, origin in known}, key=lambda origin: (origin != "test", origin))
    tables = []
    for group in GROUPS:
        for origin in origins:
            columns = [m for m in measured.metrics.values() if m.group == group and (m.key, origin) in known]
            if columns:
                tables.append(_grid(measured, block, group, origin, columns))
    return tables


def effect(measured: Measured, block: Block) -> Grid | None:
    """What the report opens with: exact scores of the answers to test prompts, and whether they are still whole.

    None where there is no exact scorer, or no initial model to start from.
    """
    tested = set(block.estimates["metric"][block.estimates["prompts"] == "test"])
    exact = [m for m in measured.metrics.values() if m.group == EXACT and m.key in tested]
    if not exact or "initial" not in measured.methods:
        return None
    whole = [measured.metrics[key] for key in WHOLE if key in tested]
    return _grid(measured, block, EXACT, "test", exact + whole)


def _grid(measured: Measured, block: Block, group: str, prompts: str, metrics: list[Metric]) -> Grid:
    found = readable(block.estimates[block.estimates["prompts"] == prompts], measured.metrics)
    cells = {(row.method, row.metric): row for row in found.itertuples()}
    rows = [(method, [cells.get((method, m.key)) for m in metrics]) for method in measured.methods]
    return Grid(group, prompts, metrics, rows)


def as_csv(found: Sequence[pd.DataFrame], place: Sequence[str] = TABLE) -> str:
    """table.csv, or course.csv where `place` is `COURSE`: a line an estimate; shares as fractions, NaN left empty."""
    columns = [*place, *_ESTIMATE, *(_CHANGE if place == TABLE else [])]
    return together(found, columns).to_csv(columns=columns, index=False, float_format="%.6g", lineterminator="\n")


def as_markdown(measured: Measured) -> str:
    """table.md: one wide table per data set and model, every metric a column."""
    parts = []
    for block in measured.blocks:
        table = _wide(measured, block)
        text = table.to_markdown(disable_numparse=True, colalign=["left", *["right"] * table.shape[1]])
        parts.append(f"## {block.dataset}, {block.model}\n\n{text}\n")
    return "\n".join([*parts, LEGEND, ""])


def as_latex(measured: Measured) -> str:
    """table.tex: one `tabular` per data set and model, a row a metric, a column a method."""
    parts = [
        f"% {block.dataset}, {block.model}\n{_wide(measured, block).T.to_latex(escape=True)}"
        for block in measured.blocks
    ]
    return "\n".join(["% needs booktabs and amssymb", *parts]).translate(str.maketrans(_LATEX))


def _wide(measured: Measured, block: Block) -> pd.DataFrame:
    """Estimates in words: a row a method, a column a metric."""
    tables = grids(measured, block)
    columns = [
        heading(metric) + (f" ({grid.prompts})" if grid.prompts not in ("test", "") else "")
        for grid in tables
        for metric in grid.metrics
    ]
    texts = [
        [
            f"{c.value}{c.sign and ' ' + c.sign} {c.interval}" if c else "–"
            for grid in tables
            for c in grid.rows[place][1]
        ]
        for place in range(len(measured.methods))
    ]
    return pd.DataFrame(texts, pd.Index(measured.methods, name="method"), columns)
