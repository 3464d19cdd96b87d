"""Estimates of every metric and method, as table.csv, table.md, table.tex and the grids of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from d2o import runs, statistics
from d2o.metrics import EXACT, HUMAN, HUMAN_METRICS, PEOPLE, SCORED, STYLE, TASKS, WHOLE, Metric, together
from d2o.settings import Experiment, Settings
from d2o.statistics import NOTHING, Sample
from d2o.texts import visible

GROUPS = (EXACT, SCORED, PEOPLE, TASKS, HUMAN, STYLE)
COMPARED = (
    "Difference: first less second, paired by prompt, with its 95 % interval. p: adjusted for the primary "
    "comparisons of the metric (Holm). d: Cohen's, the difference in standard deviations between prompts."
)
# A difference is shown as significant where its adjusted p-value is below this.
ALPHA = 1 - statistics.LEVEL
SIGNS = (
    "▲ better, ▼ worse than the initial model (△ higher, ▽ lower where neither is better as such): "
    f"p < {ALPHA:.2g} for the paired difference, adjusted for all methods and metrics with a panel (Holm). "
    "– not measured, or no interval from one prompt."
)
OVER_PROMPTS = "over prompts only"
OVER_BOTH = "over seeds and prompts"

# The columns that identify an estimate, in table.csv and in course.csv; and the columns of the numbers.
TABLE = ["dataset", "model", "method", "metric", "prompts"]
COURSE = ["dataset", "model", "method", "step", "metric", "prompts"]
COMPARISONS = [
    "dataset", "model", "metric", "prompts", "kind", "method", "other", "better", "difference", "low", "high", "n",
    "seeds", "interval", "p", "p_adjusted", "effect_size",
]  # fmt: skip
_ESTIMATE = ["better", "mean", "low", "high", "n", "seeds", "interval"]
_CHANGE = ["difference", "difference_low", "difference_high", "p", "p_adjusted"]
_LATEX = {"▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "△": r"$\triangle$", "▽": r"$\triangledown$"}
_LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$", "–": "--", "\u00a0": "~"}


@dataclass(frozen=True)
class Block:
    """Everything measured on one data set and model.

    Attributes:
        estimates: one row per method, metric and origin of the prompts, as from `estimates`.
        seeds: the same for each training, where a method has several.
        comparisons: one row per pair of methods, metric and origin of the prompts, as from `comparisons`.
        steps: the values at every step of the runs with snapshots, as from `metrics.course`.
        course: the estimates from `steps`.
        logs: one row per step of each training, as from `metrics.logs`.
        trials: one row per trial of each method that is tuned: `method`, `trial`, `values`, `metric`, `mean`, `low`,
            `high`, `n`, and whether it is `chosen`.
        trial_logs: as `logs`, for the trials.
    """

    dataset: str
    model: str
    estimates: pd.DataFrame
    seeds: pd.DataFrame
    comparisons: pd.DataFrame
    steps: pd.DataFrame
    course: pd.DataFrame
    logs: pd.DataFrame
    trials: pd.DataFrame
    trial_logs: pd.DataFrame


@dataclass(frozen=True)
class Measured:
    """Everything measured in an experiment: the data of its tables and figures.

    Attributes:
        settings: the whole config with one experiment.
        metrics: by key, in reading order.
        categories: negatives in each harm category, by data set and split.
        people: lines on the annotators of a human evaluation; empty where there is none.
    """

    settings: Settings
    metrics: Mapping[str, Metric]
    blocks: list[Block]
    categories: Mapping[str, Mapping[str, Mapping[str, int]]]
    people: Sequence[str] = ()

    @property
    def experiment(self) -> Experiment:
        """The experiment that is reported."""
        return self.settings.experiment

    @property
    def methods(self) -> list[str]:
        """The methods in reading order, as in the config."""
        return self.experiment.methods

    def named(self, method: str) -> str:
        """A method's name, with a mark where the method failed."""
        return f"{method} (failed)" if method in self.experiment.failed else method

    @property
    def notes(self) -> list[str]:
        """Notes for the reader of any table: what signs mean, what intervals are over, what failed."""
        seeds = self.experiment.seeds
        known = (
            f"Intervals hold 95 % {OVER_BOTH} ({len(seeds)} trainings of each method)."
            if len(seeds) > 1
            else f"Intervals hold 95 % {OVER_PROMPTS}: how far another training would move the numbers is not known."
        )
        failed = [f"{name} failed: {reason}." for name, reason in self.experiment.failed.items()]
        single = [m for m in runs.trained(self.experiment) if len(runs.seeds(self.experiment, m)) == 1]
        if len(seeds) > 1 and single:
            known += f" Of {', '.join(single)} there is one training: {OVER_PROMPTS}, its comparisons likewise."
        return [SIGNS, known, *failed, *self.people]

    @property
    def effects(self) -> list[tuple[Block, Grid]]:
        """The grids that the report opens with, for each block that has one."""
        return [(block, grid) for block in self.blocks if (grid := effect(self, block))]


def estimates(values: pd.DataFrame, metrics: Mapping[str, Metric], place: Sequence[str] = TABLE) -> pd.DataFrame:
    """Means and paired differences to the initial model with their intervals; NaN where there are none.

    `seeds` counts the trainings behind a mean, `interval` states what its interval is over. The p-values of the
    differences are adjusted over all metrics that have a panel; the others, which repeat these in another form, have
    no adjusted p-value. Validation prompts are used for selection, so no differences are reported on them.

    Args:
        values: as from `metrics.observe` or `metrics.course`.
        place: the columns that identify an estimate.
    """
    from tqdm import tqdm

    samples = _samples(values, place)
    rows = []
    for key, sample in tqdm(samples.items(), desc="intervals", unit="metric", mininterval=2):
        row = dict(zip(place, key, strict=True))
        metric, start = metrics[row["metric"]], samples.get(tuple((row | {"method": "initial"}).values()))
        estimate = change = statistics.mean(sample, macro=metric.macro, null=metric.neutral or 0.0)
        if row["prompts"] == "validation":
            change = NOTHING
        elif metric.neutral is None:
            known = start is not None and row["method"] != "initial"
            change = statistics.difference(sample, start, macro=metric.macro) if known else NOTHING
        ends = np.array([change.mean, change.low, change.high]) - (metric.neutral or 0.0)
        if metric.percent:
            estimate = replace(estimate, low=max(estimate.low, 0.0), high=min(estimate.high, 1.0))
        seeds = len(np.unique(sample.seeds))
        rows.append(
            row
            | {"better": metric.better or "", "seeds": seeds, "interval": OVER_BOTH if seeds > 1 else OVER_PROMPTS}
            | asdict(estimate)
            | dict(zip(_CHANGE, [*ends, change.p], strict=False))
        )
    table = pd.DataFrame(rows, columns=[*place, *_ESTIMATE, *_CHANGE])
    shown = table["metric"].map(lambda key: metrics[key].shown).astype(bool)
    return table.assign(p_adjusted=statistics.holm(table["p"].astype(float).where(shown)))


def by_seed(values: pd.DataFrame, metrics: Mapping[str, Metric]) -> pd.DataFrame:
    """Means of each training, where a method has several, with intervals over prompts: as `estimates`, and `seed`."""
    place = [*TABLE, "seed"]
    several = values.groupby(TABLE)["seed"].transform("nunique") > 1
    return estimates(values[several], metrics, place).assign(**dict.fromkeys(_CHANGE, math.nan))


def comparisons(values: pd.DataFrame, metrics: Mapping[str, Metric], experiment: Experiment) -> pd.DataFrame:
    """Every method against every other, metric by metric: columns `COMPARISONS`.

    For each metric, p-values are adjusted separately among the primary comparisons of the experiment and among the
    exploratory ones.
    """
    samples = _samples(values, TABLE)
    primary = list(map(tuple, experiment.comparisons))
    trained = runs.trained(experiment)
    pairs = primary + [
        (one, other)
        for place, one in enumerate(trained)
        for other in trained[place + 1 :]
        if not {(one, other), (other, one)} & {*primary}
    ]
    parts = []
    tested = values[values["prompts"] != "validation"]
    for dataset, model, key, prompts in tested[["dataset", "model", "metric", "prompts"]].drop_duplicates().values:
        rows = []
        for one, other in pairs:
            both = [samples.get((dataset, model, method, key, prompts)) for method in (one, other)]
            if None in both:
                continue
            change = statistics.difference(*both, macro=metrics[key].macro)
            kind = "primary" if (one, other) in primary else "exploratory"
            seeds = min(len(np.unique(own.seeds)) for own, name in zip(both, (one, other), strict=True)
                        if name != "initial")  # fmt: skip
            over = OVER_BOTH if seeds > 1 else OVER_PROMPTS
            better = metrics[key].better or ""
            place = [dataset, model, key, prompts, kind, one, other, better]
            rows.append([*place, change.mean, change.low, change.high, change.n, seeds, over, change.p, math.nan,
                         statistics.effect_size(*both)])  # fmt: skip
        table = pd.DataFrame(rows, columns=COMPARISONS)
        table["p_adjusted"] = table.groupby("kind")["p"].transform(lambda p: statistics.holm(p))
        parts.append(table)
    return together(parts, COMPARISONS)


def _samples(values: pd.DataFrame, place: Sequence[str]) -> dict[tuple, Sample]:
    columns = ("value", "cluster", "stratum", "seed")
    values = values.assign(cluster=pd.factorize(values["cluster"])[0])  # numbers are sorted sooner than texts
    return {
        key: Sample(*(rows[column].to_numpy() for column in columns))
        for key, rows in values.groupby(list(place), sort=False)
    }


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
    """A metric's label with its unit and the direction of better, joined by spaces that do not break."""
    arrow = {"higher": "\u00a0↑", "lower": "\u00a0↓", None: ""}[metric.better]
    return metric.label + (",\u00a0%" if metric.percent else "") + arrow


def column(metric: Metric, prompts: str) -> str:
    """A metric's heading, and where its prompts come from unless that is the test split."""
    return heading(metric) + (f" ({prompts})" if prompts not in ("test", "") else "")


def p_value(p: float) -> str:
    """A p-value as readers see it, `< 0.001` where it is smaller; nothing for NaN."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def readable(table: pd.DataFrame, metrics: Mapping[str, Metric]) -> pd.DataFrame:
    """Estimates with the texts that readers see.

    `value` and `range`; `change`, the difference and its interval; `chance`, its adjusted p-value; `sign`: `▲`, `▼`,
    `△`, `▽`, or empty where that is not below `ALPHA` or missing; `undecided`: whether it exists and is not below.
    """
    rows = [(row, metrics[row.metric]) for row in table.itertuples()]
    signs = {"higher": "▲▼", "lower": "▼▲", "": "△▽"}
    up, down = (table["better"].map(lambda better, i=i: signs[better][i]) for i in (0, 1))
    significant = table["p_adjusted"] < ALPHA
    return table.assign(
        value=[number(r.mean, m) for r, m in rows],
        range=[interval(r.low, r.high, m) for r, m in rows],
        change=[
            "" if math.isnan(r.difference) else
            f"{number(r.difference, m)} {interval(r.difference_low, r.difference_high, m)}"
            for r, m in rows
        ],
        chance=table["p_adjusted"].map(p_value),
        sign=np.select(
            [significant & (table["difference"] > 0), significant & (table["difference"] < 0)], [up, down], ""
        ),
        undecided=table["p_adjusted"] >= ALPHA,
    )  # fmt: skip


def primary(measured: Measured, block: Block) -> pd.DataFrame:
    """The primary comparisons in words: one row per pair and metric that has a `better`."""
    table = block.comparisons
    table = table[(table["kind"] == "primary") & (table["better"] != "")]
    rows = [(row, measured.metrics[row.metric]) for row in table.itertuples()]
    better = np.where(table["better"] == "lower", -1, 1) * np.sign(table["difference"].astype(float))
    significant = table["p_adjusted"] < ALPHA
    return pd.DataFrame(
        {
            "comparison": [f"{r.method} − {r.other}" for r, _ in rows],
            "metric": [column(m, r.prompts) for r, m in rows],
            "difference": [f"{number(r.difference, m)} {interval(r.low, r.high, m)}" for r, m in rows],
            "better": np.select(
                [significant & (better > 0), significant & (better < 0)],
                [table["method"], table["other"]],
                "undecided",
            ),
            "p, adjusted": [p_value(r.p_adjusted) or "–" for r, _ in rows],
            "d": ["–" if math.isnan(r.effect_size) else f"{r.effect_size:.2f}".replace("-", "−") for r, _ in rows],
            "n": [f"{r.n:,}" + ("" if r.interval == OVER_BOTH else f", {OVER_PROMPTS}") for r, _ in rows],
        }
    )


# The most methods that a matrix shows; more are compared in comparisons.csv only.
MOST_METHODS = 24


@dataclass(frozen=True)
class Matrix:
    """Every method against every other in one metric: the row's value less the column's.

    Attributes:
        title: the metric, and where its prompts come from.
        methods: of the rows and columns.
        cells: by both methods: `text`, the difference; `chance`, its adjusted p-value; `kind`; `sign`, as in
            `readable`.
    """

    title: str
    methods: list[str]
    cells: dict[tuple[str, str], dict[str, str]]


def matrices(measured: Measured, block: Block) -> list[Matrix]:
    """The comparisons of a block, one table per metric and origin of its prompts; none for too many methods."""
    tables: list[Matrix] = []
    if len(measured.methods) > MOST_METHODS:
        return tables
    for (key, prompts), rows in block.comparisons.groupby(["metric", "prompts"], sort=False):
        metric = measured.metrics[key]
        shown = readable(
            rows.assign(mean=rows["difference"], difference_low=rows["low"], difference_high=rows["high"]),
            measured.metrics,
        )
        cells = {
            (r.method, r.other): {"text": r.change, "chance": r.chance, "kind": r.kind, "sign": r.sign}
            for r in shown.itertuples()
        }
        methods = [m for m in measured.methods if any(m in pair for pair in cells)]
        tables.append(Matrix(column(metric, prompts), methods, cells))
    return tables


@dataclass(frozen=True)
class Grid:
    """A table: one row per method, one column per metric.

    Attributes:
        group: the group that all the metrics belong to.
        prompts: where their prompts come from: `test`, an evaluation file, or `` where there is no prompt.
        metrics: the columns.
        rows: (method, one cell per column). A cell is a row of `readable`, or None where a method has no such value.
    """

    group: str
    prompts: str
    metrics: list[Metric]
    rows: list[tuple[str, list[Any]]]

    @property
    def sizes(self) -> list[str]:
        """Per column: the number of clusters behind it, a range where the methods differ."""
        columns = zip(*(cells for _, cells in self.rows), strict=True)
        counts = [sorted({cell.n for cell in column if cell}) for column in columns]
        return ["–".join(f"{end:,}" for end in dict.fromkeys(n[:1] + n[-1:])) or "0" for n in counts]


def grids(measured: Measured, block: Block) -> list[Grid]:
    """The estimates of a block by group and origin of the prompts, in reading order.

    The columns of human answers are always included; a data set without positives has no value in some of them.
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
    """The grid that the report opens with: exact scores of the answers to test prompts, and whether these are intact.

    None where there is no exact scorer, or no initial model to start from.
    """
    tested = set(block.estimates["metric"][block.estimates["prompts"] == "test"])
    exact = [m for m in measured.metrics.values() if m.group == EXACT and m.key in tested]
    if not exact or "initial" not in measured.methods:
        return None
    whole = [measured.metrics[key] for key in WHOLE if key in tested]
    return _grid(measured, block, EXACT, "test", exact + whole)


def _grid(measured: Measured, block: Block, group: str, prompts: str, metrics: list[Metric]) -> Grid:
    shown = readable(block.estimates[block.estimates["prompts"] == prompts], measured.metrics)
    cells = {(row.method, row.metric): row for row in shown.itertuples()}
    rows = [(method, [cells.get((method, m.key)) for m in metrics]) for method in measured.methods]
    return Grid(group, prompts, metrics, rows)


def as_csv(parts: Sequence[pd.DataFrame], columns: Sequence[str]) -> str:
    """A table as CSV: one line per estimate; shares as fractions, NaN left empty.

    A text that a spreadsheet would take for a formula, such as a harm category, has an apostrophe before it. Control
    characters are escaped: a bare carriage return would begin a row.
    """
    table = together(parts, columns)
    for name in table.select_dtypes(exclude=["number", "bool"]):
        table[name] = table[name].map(_as_text)
    return table.to_csv(columns=columns, index=False, float_format="%.6g", lineterminator="\n")


def _as_text(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    return "'" * cell.startswith(("=", "+", "-", "@")) + visible(cell)


def table_csv(measured: Measured) -> str:
    """table.csv: the estimates of each method over its seeds, and of each seed where there are several."""
    rows = [table for block in measured.blocks for table in (block.estimates.assign(seed="all"), block.seeds)]
    return as_csv(rows, [*TABLE, "seed", *_ESTIMATE, *_CHANGE])


def course_csv(measured: Measured) -> str:
    """course.csv: the estimates at each step of the trainings with snapshots."""
    return as_csv([block.course for block in measured.blocks], [*COURSE, *_ESTIMATE])


def as_markdown(measured: Measured) -> str:
    """table.md: per data set and model a wide table, one column per metric, and the primary comparisons."""
    parts = []
    for block in measured.blocks:
        parts.append(f"## {block.dataset}, {block.model}\n\n{markdown(_wide(measured, block).reset_index())}\n")
        if len(compared := primary(measured, block)):
            parts.append(f"### Primary comparisons\n\n{markdown(compared)}\n\n{COMPARED}\n")
    return "\n".join([*parts, *measured.notes, ""])


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    align = ["left", *["right"] * (table.shape[1] - 1)]
    return table.to_markdown(index=False, disable_numparse=True, colalign=align)


def as_latex(measured: Measured) -> str:
    """table.tex: per data set and model a `tabular`, one row per metric and one column per method; the primary
    comparisons."""
    parts = []
    for block in measured.blocks:
        parts.append(f"% {block.dataset}, {block.model}\n{_wide(measured, block).T.to_latex(escape=True)}")
        if len(compared := primary(measured, block)):
            parts.append(f"% Primary comparisons\n{compared.to_latex(escape=True, index=False)}")
    notes = [f"% {note}" for note in (*measured.notes, COMPARED)]
    return latex("\n".join([*parts, *notes]))


def latex(text: str) -> str:
    """Tables from `to_latex`, with every symbol beyond ASCII written as LaTeX."""
    return f"% needs booktabs and amssymb\n{text}\n".translate(str.maketrans(_LATEX))


def _wide(measured: Measured, block: Block) -> pd.DataFrame:
    """Estimates in words: one row per method, one column per metric."""
    tables = grids(measured, block)
    columns = [column(metric, grid.prompts) for grid in tables for metric in grid.metrics]
    texts = [
        [
            f"{c.value}{c.sign and ' ' + c.sign} {c.range}" if c else "–"
            for grid in tables
            for c in grid.rows[place][1]
        ]
        for place in range(len(measured.methods))
    ]
    return pd.DataFrame(texts, pd.Index(map(measured.named, measured.methods), name="method"), columns)
