"""Estimates of every metric and method, as table.csv, table.md and the grids of the page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2o import statistics
from d2o.report.metrics import EXACT, HUMAN, HUMAN_METRICS, SCORED, STYLE, TASKS, WHOLE, Metric
from d2o.statistics import Estimate, Sample

GROUPS = (EXACT, SCORED, TASKS, HUMAN, STYLE)
LEGEND = (
    "▲ better, ▼ worse than the initial model: the 95 % interval of the paired difference excludes 0 "
    "(△ higher, ▽ lower where neither is better as such). – not measured, or no interval from one prompt."
)


@dataclass(frozen=True)
class Cell:
    """One metric of one method on one data set and model.

    Attributes:
        estimate: mean and interval.
        difference: paired difference to the initial model; None where there is none to compare with.
    """

    dataset: str
    model: str
    method: str
    metric: Metric
    estimate: Estimate
    difference: Estimate | None

    @property
    def sign(self) -> str:
        """`▲`, `▼`, `△`, `▽`, or nothing where the difference's interval holds 0."""
        if self.difference is None or not self.difference.excludes(0):
            return ""
        up = self.difference.mean > 0
        if self.metric.better is None:
            return "△" if up else "▽"
        return "▲" if up == (self.metric.better == "higher") else "▼"

    @property
    def undecided(self) -> bool:
        """Whether there is an interval of the difference, and it holds 0."""
        return self.difference is not None and self.difference.low <= 0 <= self.difference.high

    @property
    def value(self) -> str:
        """The mean, for readers."""
        return number(self.estimate.mean, self.metric)

    @property
    def interval(self) -> str:
        """The interval, for readers."""
        return interval(self.estimate, self.metric)

    @property
    def change(self) -> str:
        """The difference to the initial model and its interval, for readers; nothing where there is none."""
        if self.difference is None:
            return ""
        return f"{number(self.difference.mean, self.metric)} {interval(self.difference, self.metric)}"


@dataclass(frozen=True)
class Point:
    """One metric of one method on the way through its training.

    Attributes:
        step: steps done; 0 is the initial model.
        estimate: mean and interval.
        values: [N] what they are of.
    """

    method: str
    step: int
    metric: Metric
    estimate: Estimate
    values: np.ndarray


@dataclass(frozen=True)
class Block:
    """Everything estimated on one data set and model.

    Attributes:
        cells: a metric of a method each.
        logs: training logs (rows of train.jsonl) of each trained method, one a seed.
        course: the methods with snapshots, step by step; empty where none has any.
    """

    dataset: str
    model: str
    cells: list[Cell]
    logs: Mapping[str, list[list[dict[str, Any]]]]
    course: list[Point]

    @property
    def scored(self) -> list[Point]:
        """The part of the course that has a distribution: scores, but no shares."""
        groups = (EXACT, SCORED)
        return [point for point in self.course if point.metric.group in groups and not point.metric.percent]


def cells(dataset: str, model: str, observed: Mapping[str, Mapping[Metric, Sample]]) -> list[Cell]:
    """The estimates of every metric of every method of one data set and model."""
    from tqdm import tqdm

    initial = observed.get("initial", {})
    wanted = [(method, metric) for method, metrics in observed.items() for metric in metrics]
    found = []
    for method, metric in tqdm(wanted, desc=f"intervals {dataset} {model}", unit="metric", mininterval=2):
        sample = observed[method][metric]
        estimate = statistics.mean(sample, macro=metric.macro)
        difference = None
        if metric.neutral is not None:
            ends = (x - metric.neutral for x in (estimate.mean, estimate.low, estimate.high))
            difference = Estimate(*ends, estimate.n)
        elif method != "initial" and metric in initial:
            difference = statistics.difference(sample, initial[metric], macro=metric.macro)
        found.append(Cell(dataset, model, method, metric, estimate, difference))
    return found


def points(observed: Mapping[str, Mapping[int, Mapping[Metric, Sample]]]) -> list[Point]:
    """The estimates of every metric at every step of every method with snapshots."""
    return [
        Point(method, step, metric, statistics.mean(sample), sample.values)
        for method, steps in observed.items()
        for step, metrics in steps.items()
        for metric, sample in metrics.items()
    ]


def number(value: float, metric: Metric) -> str:
    """A value as readers see it: `–` for NaN, a true minus sign, per cent without the sign."""
    if math.isnan(value):
        return "–"
    text = f"{value * 100 if metric.percent else value:.{metric.digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def interval(estimate: Estimate, metric: Metric) -> str:
    """`[low, high]`, or `–` where it is undefined."""
    if math.isnan(estimate.low):
        return "–"
    return f"[{number(estimate.low, metric)}, {number(estimate.high, metric)}]"


def heading(metric: Metric) -> str:
    """A metric's label with its unit and the direction of better, which no line break parts from it."""
    arrow = {"higher": "\u00a0↑", "lower": "\u00a0↓", None: ""}[metric.better]
    return metric.label + (",\u00a0%" if metric.percent else "") + arrow


@dataclass(frozen=True)
class Grid:
    """A table: a row a method, a column a metric; None where a method has no such value.

    Attributes:
        group: what the metrics have in common.
        prompts: where their prompts come from, as in `Metric`.
        metrics: the columns.
        rows: (method, a cell a column).
    """

    group: str
    prompts: str
    metrics: list[Metric]
    rows: list[tuple[str, list[Cell | None]]]

    @property
    def sizes(self) -> list[str]:
        """Per column: the clusters behind it, a range where the methods differ."""
        columns = zip(*(cells for _, cells in self.rows), strict=True)
        found = [sorted({cell.estimate.n for cell in column if cell}) for column in columns]
        return ["–".join(f"{end:,}" for end in dict.fromkeys(n[:1] + n[-1:])) or "0" for n in found]


def grids(block: Block, methods: Sequence[str]) -> list[Grid]:
    """The cells of one data set and model by group and origin of the prompts, in reading order.

    The columns of human answers are always there: a data set without positives has no value in some.
    """
    metrics = list(dict.fromkeys([*HUMAN_METRICS, *(cell.metric for cell in block.cells)]))
    origins = sorted({metric.prompts for metric in metrics}, key=lambda origin: (origin != "test", origin))
    by_place = {(cell.method, cell.metric): cell for cell in block.cells}
    tables = []
    for group in GROUPS:
        for origin in origins:
            columns = [m for m in metrics if m.group == group and m.prompts == origin]
            if columns:
                rows = [(method, [by_place.get((method, m)) for m in columns]) for method in methods]
                tables.append(Grid(group, origin, columns, rows))
    return tables


def effect(block: Block, methods: Sequence[str]) -> Grid | None:
    """What the report opens with: exact scores of the answers to test prompts, and whether they are still whole.

    None where there is no exact scorer, or no initial model to start from.
    """
    found = list(dict.fromkeys(cell.metric for cell in block.cells if cell.metric.prompts == "test"))
    metrics = [m for m in found if m.group == EXACT] + [m for key in WHOLE for m in found if m.key == key]
    if not metrics or metrics[0].group != EXACT or "initial" not in methods:
        return None
    cells = {(cell.method, cell.metric): cell for cell in block.cells}
    return Grid(EXACT, "test", metrics, [(method, [cells.get((method, m)) for m in metrics]) for method in methods])


def as_csv(blocks: Sequence[Block]) -> str:
    """table.csv: one line per data set, model, method and metric; shares as fractions, NaN left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    places = ["dataset", "model", "method", "metric", "prompts", "better"]
    values = ["mean", "low", "high", "n", "difference", "difference_low", "difference_high"]
    writer.writerow(places + values)
    for cell in (cell for block in blocks for cell in block.cells):
        e, d = cell.estimate, cell.difference
        change = [d.mean, d.low, d.high] if d else [math.nan] * 3
        texts = ["" if math.isnan(x) else f"{x:.6g}" for x in (e.mean, e.low, e.high, *change)]
        m = cell.metric
        place = [cell.dataset, cell.model, cell.method, m.key, m.prompts, m.better or ""]
        writer.writerow([*place, *texts[:3], e.n, *texts[3:]])
    return text.getvalue()


def course_as_csv(blocks: Sequence[Block]) -> str:
    """course.csv: one line per data set, model, method, step and metric; NaN left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    places = ["dataset", "model", "method", "step", "metric", "prompts", "better"]
    writer.writerow([*places, "mean", "low", "high", "n"])
    for block in blocks:
        for p in block.course:
            e, m = p.estimate, p.metric
            numbers = ["" if math.isnan(x) else f"{x:.6g}" for x in (e.mean, e.low, e.high)]
            place = [block.dataset, block.model, p.method, p.step, m.key, m.prompts, m.better or ""]
            writer.writerow([*place, *numbers, e.n])
    return text.getvalue()


def as_markdown(blocks: Sequence[Block], methods: Sequence[str]) -> str:
    """table.md: one wide table per data set and model, every metric a column."""
    lines = []
    for block in blocks:
        tables = grids(block, methods)
        columns = [
            heading(metric) + (f" ({grid.prompts})" if grid.prompts not in ("test", "") else "")
            for grid in tables
            for metric in grid.metrics
        ]
        lines += [f"## {block.dataset}, {block.model}", "", f"| method | {' | '.join(columns)} |"]
        lines += ["|---|" + "---:|" * len(columns)]
        for position, method in enumerate(methods):
            row = [cell for grid in tables for cell in grid.rows[position][1]]
            texts = [f"{c.value}{c.sign and ' ' + c.sign} {c.interval}" if c else "–" for c in row]
            lines.append(f"| {method} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join([*lines, LEGEND, ""])
