"""The figures: every metric, the log of every training, metrics against its steps, and what the data are like."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from d2o.metrics import EXACT, HUMAN, SCORED, Metric, together
from d2o.refusals import LABELS
from d2o.report import browser, tables
from d2o.report.pair_quality import PANELS
from d2o.report.tables import Block, Measured

# Ink and paper are looked up again in the page, where they follow its light or dark theme.
_INK, _MUTED, _PAPER = "#1f2329", "#7b8491", "#fffffe"
_THEMED = {_INK: "currentColor", _PAPER: "none"}
_COLOURS = ["#2f7ed8", "#d9772b", "#2f9e77", "#b8529a", "#8465cf", "#a89020", "#3a9fb8", "#c8503f"]
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.facecolor": _PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": _PAPER,
    "axes.xmargin": 0.07,
    "svg.fonttype": "none",
    "svg.hashsalt": "d2o",
}
_WIDTH, _COLUMNS = 11.0, 4
# The line that marks no change.
_RULE = {"color": _MUTED, "lw": 0.8, "ls": (0, (2, 2)), "zorder": 0}
# Nats per token below which an axis of log-probs is logarithmic, where a model is far below.
_COLLAPSED = -5
# Bars of a histogram of scores.
BINS = 24
# Height of a legend's line, in inches.
_LINE = 0.22
# Longer logs are plotted as `POINTS` means over consecutive steps, of which `LABELLED_POINTS` have tooltips.
POINTS, LABELLED_POINTS = 200, 20
# Prefix of the id of an SVG group whose marks have tooltips.
_VALUES = "values "
_SVG = "{http://www.w3.org/2000/svg}"
_PANELS = {
    "loss": "loss",
    "margin": "margin, nats",
    "positive_shift": "probe’s positives, nats per token",
    "negative_shift": "probe’s negatives, nats per token",
}


# What each figure is plotted from: a frame, kept beside it as CSV ----------------------------------


def methods_data(measured: Measured) -> pd.DataFrame:
    """The estimates of every metric that has a panel, over all seeds and for each seed."""
    return _estimates(
        measured, [(block, grid) for block in measured.blocks for grid in tables.grids(measured, block)]
    )


def effect_data(measured: Measured) -> pd.DataFrame:
    """As `methods_data`, for the metrics that the report opens with."""
    return _estimates(measured, measured.effects)


def _estimates(measured: Measured, grids: Sequence[tuple[Block, tables.Grid]]) -> pd.DataFrame:
    parts = [
        table[(table["metric"] == metric.key) & (table["prompts"] == grid.prompts)]
        for block, grid in grids
        for metric in grid.metrics
        if metric.shown
        for table in (block.estimates.assign(seed="all"), block.seeds)
    ]
    columns = [*tables.TABLE, "seed", "mean", "low", "high", "n"]
    return together(parts, columns)[columns]


def training_data(measured: Measured) -> pd.DataFrame:
    """The training logs, each as means over at most `POINTS` bins of steps."""
    parts = []
    for block in measured.blocks:
        for (method, seed), log in block.logs.groupby(["method", "seed"], sort=False):
            parts.append(placed(block, _binned(log), method=method, seed=seed))
    return together(parts, ["dataset", "model", "method", "seed", "step", *_PANELS])


def trials_data(measured: Measured) -> pd.DataFrame:
    """The training logs of the trials, each as means over at most `POINTS` bins of steps."""
    columns = ["dataset", "model", "method", "trial", "values", "chosen", "step", *_PANELS]
    parts = []
    for block in measured.blocks:
        for trial in block.trials.itertuples():
            log = block.trial_logs[block.trial_logs["trial"] == trial.trial]
            place = {"method": trial.method, "trial": trial.trial, "values": trial.values, "chosen": trial.chosen}
            parts.append(placed(block, _binned(log), **place))
    return together(parts, columns)[columns]


def course_data(measured: Measured) -> pd.DataFrame:
    """The estimates of every step with a snapshot, over all seeds and for each seed."""
    columns = [*tables.COURSE, "seed", "mean", "low", "high", "n"]
    parts = (part for block in measured.blocks for part in (block.course.assign(seed="all"), single_course(block)))
    table = together(parts, columns).reindex(columns=columns)
    return table[table["prompts"] != "validation"]


def single_course(block: Block) -> pd.DataFrame:
    """The mean of each training at every step with a snapshot, where a method has several trainings."""
    several = block.steps.groupby("method")["seed"].transform("nunique") > 1
    means = block.steps[several].groupby([*tables.COURSE, "seed"], sort=False)["value"].mean()
    return means.rename("mean").reset_index()


def distributions_data(measured: Measured) -> pd.DataFrame:
    """Histograms of the scores at every step with a snapshot: one row per bar."""
    parts = []
    for block in measured.blocks:
        for (metric, prompts), own in scored(measured, block).groupby(["metric", "prompts"], sort=False):
            edges = np.histogram_bin_edges(own["value"], BINS)
            for (method, step), values in own.groupby(["method", "step"])["value"]:
                bars = {"from": edges[:-1], "to": edges[1:], "share": np.histogram(values, edges)[0] / len(values)}
                parts.append(
                    placed(block, pd.DataFrame(bars), metric=metric, prompts=prompts, method=method, step=step)
                )
    return together(parts, ["dataset", "model", "metric", "prompts", "method", "step", "from", "to", "share"])


def scored(measured: Measured, block: Block) -> pd.DataFrame:
    """The values of the course whose distribution is shown: scores, but no shares."""
    wanted = [m.key for m in measured.metrics.values() if m.group in (EXACT, SCORED) and not m.percent]
    return block.steps[block.steps["metric"].isin(wanted) & (block.steps["prompts"] != "validation")]


def tradeoff_data(measured: Measured) -> pd.DataFrame:
    """For each file of prompts labelled safe or unsafe: help on the harmless, harm on the harmful ones, by method.

    One row per method and pair of metrics: mean, low and high of `help`, on the safe prompts, and of `harm`, on the
    unsafe ones. The first pair is the share of answers that do not refuse; the second is the first score of help and
    the first of harm, if there are both.
    """
    parts = []
    for block in measured.blocks:
        by = {key: own.set_index("method") for key, own in block.estimates.groupby(["metric", "prompts"])}
        for file in sorted(name.removesuffix(", safe") for _, name in by if name.endswith(", safe")):
            for (good, harm), keys in _traded(measured).items():
                both = [by.get((key, f"{file}, {label}")) for key, label in zip(keys, LABELS, strict=True)]
                if any(own is None for own in both):
                    continue
                ends = [
                    _complement(own) if key == _REFUSAL else own[["mean", "low", "high"]]
                    for key, own in zip(keys, both, strict=True)
                ]
                frame = pd.concat(dict(zip(("help", "harm"), ends, strict=True)), axis=1)
                frame.columns = ["_".join(column) for column in frame.columns]
                place = {"file": file, "help": good, "harm": harm}
                parts.append(placed(block, frame.reset_index(names="method"), **place))
    columns = ["dataset", "model", "file", "help", "harm", "method", *_ENDS]
    return together(parts, columns)[columns]


_REFUSAL = "answers/refusal"
_ENDS = [f"{metric}_{end}" for metric in ("help", "harm") for end in ("mean", "low", "high")]


def _traded(measured: Measured) -> dict[tuple[str, str], tuple[str, str]]:
    """Pairs of metrics, one of help and one of harm, by their labels.

    Scores are paired, too: the first that may measure help with the first that measures harm. A scorer trained on the
    labels measures safety, and most rules measure form: neither counts as help.
    """
    scores: dict[bool, Metric] = {}
    for name in measured.experiment.rewards:
        entry, metric = measured.settings.rewards[name], measured.metrics[f"reward/{name}"]
        harm = browser.measures_harm(entry)
        form = entry.rule is not None and {
            entry.rule.none,
            entry.rule.length,
            entry.rule.valid,
            entry.rule.script,
        } != {None}
        if harm or (metric.better == "higher" and not entry.train and not form):
            scores.setdefault(harm, metric)
    pairs = {("not refused", "not refused"): (_REFUSAL, _REFUSAL)}
    if len(scores) == 2:
        pairs[scores[False].label, scores[True].label] = scores[False].key, scores[True].key
    return pairs


def _complement(own: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"mean": 1 - own["mean"], "low": 1 - own["high"], "high": 1 - own["low"]})


def categories_data(measured: Measured) -> pd.DataFrame:
    """Negatives in each harm category, most frequent first."""
    parts = []
    for dataset, splits in measured.categories.items():
        counts = pd.DataFrame(splits).fillna(0).rename_axis(index="category", columns="split")
        order = counts.sum(axis=1).sort_values(ascending=False, kind="stable").index
        parts.append(counts.loc[order].stack().rename("negatives").reset_index().assign(dataset=dataset))
    columns = ["dataset", "category", "split", "negatives"]
    return together(parts, columns)[columns]


def placed(block: Block, frame: pd.DataFrame, **place: Any) -> pd.DataFrame:
    """A frame after the columns that identify it: data set, model and `place`."""
    place = {"dataset": block.dataset, "model": block.model, **place}
    return frame.assign(**place)[[*place, *frame.columns.difference(list(place), sort=False)]]


# The figures -----------------------------------------------------------------------------------------


def methods(data: pd.DataFrame, measured: Measured) -> Figure:
    """All metrics: one part per data set and model, one panel per metric; mean, 95 % interval and seeds by method."""
    order, colours = measured.methods, colours_of(measured.methods)
    whole = by_block(data) or by_block(data, measured)
    blocks = [list(own.groupby(["metric", "prompts"], sort=False)) for own in whole.values()]
    figure, parts = grid_of(whole, blocks, 0.35, 0.85 + 0.26 * len(order), sharey=True)
    for panels, (_, axes) in zip(blocks, parts, strict=True):
        for axis, ((key, prompts), estimates) in zip(axes, panels, strict=True):
            _panel(axis, measured.metrics[key], prompts, estimates, order, colours)
    return figure


def _panel(axis, metric: Metric, prompts: str, estimates: pd.DataFrame, order: Sequence[str], colours) -> None:
    scale = 100 if metric.percent else 1
    whole = estimates[estimates["seed"] == "all"].set_index("method")
    for place, method in enumerate(order):
        if method in whole.index:
            estimate = whole.loc[method, ["mean", "low", "high"]]
            _interval(axis, place, estimate * scale, colours[method], f"{method}: {_words(estimate, metric)}")
    for method, own in estimates[estimates["seed"] != "all"].groupby("method"):
        means, places = own["mean"] * scale, [order.index(method) + 0.3] * len(own)
        axis.plot(means, places, "|", color=colours[method], ms=5)
        texts = [f"{method}, seed {row['seed']}: {_words(row, metric)}" for row in own.to_dict("records")]
        tell(axis, means, places, texts)
    start = metric.neutral
    if start is None and "initial" in whole.index:
        start = whole.loc["initial", "mean"]
    if start is not None:
        axis.axvline(start * scale, **_RULE)
    _rows(axis, order)
    axis.locator_params(axis="x", nbins=4)
    titled(axis, metric, {"higher": "better →", "lower": "← better", None: ""}[metric.better], prompts)


def _interval(axis, place: float, estimate: Mapping[str, float], colour: str, text: str) -> None:
    """A point with its interval, on the line `place`, with `text` as its tooltip."""
    axis.plot([estimate["low"], estimate["high"]], [place, place], color=colour, lw=1.6)
    axis.plot(estimate["mean"], place, "o", color=colour, ms=4.5)
    tell(axis, [estimate["mean"]], [place], [text])


def _words(estimate: Mapping[str, Any], metric: Metric) -> str:
    """A mean and its interval, as in the tables."""
    unit = " %" if metric.percent else ""
    ends = tables.interval(estimate["low"], estimate["high"], metric)
    return f"{tables.number(estimate['mean'], metric)}{unit} {ends}"


def tell(axis, x: Iterable[float], y: Iterable[float], texts: Iterable[str]) -> None:
    """Plot invisible points, each with a text as its tooltip in an SVG; those at NaN are left out."""
    points = [point for point in zip(x, y, texts, strict=True) if not np.isnan(point[:2]).any()]
    if points:
        x, y, texts = zip(*points, strict=True)
        axis.plot(x, y, "o", ms=8, alpha=0, color=_MUTED, clip_on=False, gid=_VALUES + json.dumps(texts))


def tell_line(axis, x: pd.Series, y: pd.Series, name: str) -> None:
    """Add tooltips to at most `LABELLED_POINTS` points of a line, evenly spaced and with both ends."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(LABELLED_POINTS, len(x))).round().astype(int))
    x, y = x.iloc[chosen], y.iloc[chosen]
    tell(axis, x, y, [f"{name}, {_short(a, 6)}: {_short(b)}" for a, b in zip(x, y, strict=True)])


def _short(number: float, digits: int = 3) -> str:
    """A number to some significant digits, with a true minus sign."""
    return f"{number:.{digits}g}".replace("-", "−")


def _tell_bars(bars: Iterable, texts: Iterable[str]) -> None:
    for bar, text in zip(bars, texts, strict=True):
        bar.set_gid(_VALUES + json.dumps([text]))


def _rows(axis, names: Sequence[str]) -> None:
    """Label one line per name, from top to bottom."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)


def titled(axis, metric: Metric, note: str, prompts: str) -> None:
    """A panel's title, and under it a note and where the prompts come from."""
    axis.set_title(metric.label + (", %" if metric.percent else ""), loc="left", pad=14)
    origin = prompts if prompts != "test" else ""
    under = {"xycoords": "axes fraction", "textcoords": "offset points", "color": _MUTED, "size": 8}
    axis.annotate(" · ".join(filter(None, (note, origin))), (0, 1), (0, 4), **under)


def training(data: pd.DataFrame, measured: Measured) -> Figure:
    """Loss, margin and the probe's two sides against steps: one colour per method, one line per seed."""
    blocks, colours = by_block(data, measured), colours_of(measured.methods)
    figure, parts = _parts(list(blocks), [2.75] * len(blocks))
    for part, logs in zip(parts, blocks.values(), strict=True):
        seeds = logs.groupby("method")["seed"].nunique()
        handles = {}
        for axis, (key, label) in zip(part.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
            for (method, seed), log in logs.dropna(subset=key).groupby(["method", "seed"], sort=False):
                width, mark = 1.5 if seeds[method] == 1 else 0.8, "o" if len(log) == 1 else None
                line = axis.plot(log["step"], log[key], color=colours[method], lw=width, marker=mark, ms=4)
                (handles[method],) = line
                tell_line(axis, log["step"], log[key], f"{method}, seed {seed}, step")
            if key != "loss":
                axis.axhline(0, **_RULE)
            axis.set_title(label, loc="left")
            axis.set_xlabel("step")
            axis.locator_params(nbins=5)
        legend(part, handles, measured.methods)
    return figure


def tradeoff(data: pd.DataFrame, measured: Measured) -> Figure:
    """One point per method, with both intervals: more help on harmless prompts to the right, less harm lower down."""
    blocks, colours = by_block(data), colours_of(measured.methods)
    panels = [list(own.groupby(["file", "help", "harm"], sort=False)) for own in blocks.values()]
    figure, parts = grid_of(blocks, panels, 0.75, 2.6)
    for own, (part, axes) in zip(panels, parts, strict=True):
        handles = {}
        for axis, ((file, *names), points) in zip(axes, own, strict=True):
            metrics = [measured.metrics[key] for key in _traded(measured)[tuple(names)]]
            scales = [100 if metric.percent else 1 for metric in metrics]
            for row in points.to_dict("records"):
                (x, *across), (y, *along) = (
                    [scale * row[f"{metric}_{end}"] for end in ("mean", "low", "high")]
                    for metric, scale in zip(("help", "harm"), scales, strict=True)
                )
                reach = [[[abs(end - at)] for end in ends] for at, ends in ((x, across), (y, along))]
                colour = colours[row["method"]]
                handles[row["method"]] = axis.errorbar(x, y, reach[1], reach[0], "o", color=colour, ms=4.5, lw=1.2)
                tell(axis, [x], [y], [f"{row['method']}: {_short(x)} harmless, {_short(y)} harmful"])
            axis.set_title(file, loc="left")
            units = [", %" if scale == 100 else "" for scale in scales]
            axis.set_xlabel(f"{names[0]}, harmless prompts{units[0]}")
            axis.set_ylabel(f"{names[1]}, harmful prompts{units[1]}")
            axis.locator_params(nbins=4)
        legend(part, handles, measured.methods)
    return figure


def pool_data(sheet: Mapping[str, Any], scores: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """The bars of a pool's figure: `panel`, `from`, `to` and `samples`; flags have `name` instead of both ends.

    Args:
        sheet: the pool's data sheet.
        scores: by reward model; empty where the pool was not scored.
    """
    lengths, counts = zip(*((int(length), count) for length, count in sheet["tokens"].items()), strict=True)
    panels = [("length, tokens", np.histogram(lengths, min(40, max(lengths)), weights=counts))]
    panels += [(f"score, {reward}", np.histogram(values, 40)) for reward, values in scores.items()]
    bars = [
        pd.DataFrame({"panel": panel, "from": edges[:-1], "to": edges[1:], "samples": heights})
        for panel, (heights, edges) in panels
    ]
    marked = pd.DataFrame({"panel": "marked", "name": sheet["flags"].keys(), "samples": sheet["flags"].values()})
    columns = ["panel", "name", "from", "to", "samples"]
    return together([bars[0], marked, *bars[1:]], columns).reindex(columns=columns)


@mpl.rc_context(_STYLE)
def pool(data: pd.DataFrame, samples: int) -> Figure:
    """Lengths of a pool's samples in tokens, how many of them have each flag, and their scores.

    Args:
        data: as from `pool_data`.
        samples: number of samples in the pool.
    """
    panels = {"length, tokens": None, "marked": None} | dict.fromkeys(data["panel"])
    figure = Figure((_WIDTH, 2.4), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        own = data[data["panel"] == panel]
        if panel == "marked":
            shares = 100 * own["samples"] / samples
            bars = axis.barh(own["name"], shares, color=_COLOURS[1])
            _tell_bars(bars, [f"{r.name}: {r.samples:,.0f} of {samples:,}" for r in own.itertuples(index=False)])
            axis.invert_yaxis()
            axis.set_xlim(0, 100)
            axis.set_title("marked, % of samples", loc="left")
            continue
        width = own["to"] - own["from"]
        colour = _COLOURS[0] if panel == "length, tokens" else _COLOURS[2]
        bars = axis.bar(own["from"], own["samples"], width, align="edge", color=colour)
        ends = zip(own["from"], own["to"], own["samples"], strict=True)
        _tell_bars(bars, [f"{_short(a)} to {_short(b)}: {n:,.0f}" for a, b, n in ends])
        axis.set_title(panel, loc="left")
    figure.axes[0].set_ylabel("samples")
    return figure


def trials(data: pd.DataFrame, measured: Measured) -> Figure:
    """Logs of the trials against steps: one part per method, one line per trial, the chosen one thick.

    A quantity that a loss does not have, such as the margin of one without a reference, has no panel.
    """
    parts = {(block, method): own for block, rows in by_block(data).items()
             for method, own in rows.groupby("method", sort=False)}  # fmt: skip
    figure, subfigures = _parts([f"{block}: {method}" for block, method in parts], [2.75] * len(parts))
    for part, own in zip(subfigures, parts.values(), strict=True):
        handles = {}
        panels = {key: label for key, label in _PANELS.items() if own[key].notna().any()}
        axes = part.subplots(1, len(_PANELS))
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (key, label) in zip(axes, panels.items(), strict=False):
            for (values, colour), log in zip(
                zip(own["values"].unique(), _COLOURS * len(own), strict=False),
                [log for _, log in own.groupby("trial", sort=False)],
                strict=True,
            ):
                width = 2.2 if log["chosen"].all() else 0.9
                seen = log.dropna(subset=key)
                (handles[values],) = axis.plot(seen["step"], seen[key], color=colour, lw=width)
                tell_line(axis, seen["step"], seen[key], f"{values}, step")
            axis.set_title(label, loc="left")
            axis.set_xlabel("step")
            axis.locator_params(nbins=5)
        legend(part, handles, list(handles))
    return figure


def course(data: pd.DataFrame, measured: Measured) -> Figure:
    """The metrics of snapshots against the steps of training: one line per method, its 95 % interval as a band.

    Log-probs of a collapsed model would flatten all other lines: below `_COLLAPSED` nats their axis is logarithmic.
    """
    blocks = [list(own.groupby(["metric", "prompts"], sort=False)) for own in by_block(data).values()]
    figure, parts = grid_of(by_block(data), blocks, 0.6, 2.4)
    for panels, (part, axes) in zip(blocks, parts, strict=True):
        handles = {}
        for axis, ((key, prompts), estimates) in zip(axes, panels, strict=True):
            handles |= lines(axis, estimates, "step", measured, key, prompts)
            if measured.metrics[key].group == HUMAN and estimates["mean"].min() < 4 * _COLLAPSED:
                axis.set_yscale("symlog", linthresh=-_COLLAPSED, linscale=1)
                axis.set_yticks([0, *(_COLLAPSED * np.array([0.5, 1, 2, 4, 8, 16]))])
                axis.yaxis.set_major_formatter("{x:g}")
        legend(part, handles, measured.methods)
    return figure


def lines(axis, estimates: pd.DataFrame, x: str, measured: Measured, key: str, prompts: str) -> dict[str, Any]:
    """Plot one line per method, its 95 % interval as a band, one dot per training; return the legend's handles."""
    metric, colours, handles = measured.metrics[key], colours_of(measured.methods), {}
    scale = 100 if metric.percent else 1
    whole = estimates["seed"] == "all"
    for method, each in estimates[~whole].groupby("method"):
        axis.plot(each[x], each["mean"] * scale, "o", color=colours[method], ms=2, alpha=0.6, mew=0)
    for method, e in estimates[whole].groupby("method", sort=False):
        axis.fill_between(e[x], e["low"] * scale, e["high"] * scale, color=colours[method], alpha=0.15, lw=0)
        (handles[method],) = axis.plot(e[x], e["mean"] * scale, "o-", color=colours[method], lw=1.5, ms=3.5)
        texts = [f"{method}, {row[x]:g}: {_words(row, metric)}" for row in e.to_dict("records")]
        tell(axis, e[x], e["mean"] * scale, texts)
    titled(axis, metric, {"higher": "↑ better", "lower": "↓ better", None: ""}[metric.better], prompts)
    axis.set_xlabel(x)
    axis.locator_params(nbins=5)
    return handles


def distributions(data: pd.DataFrame, measured: Measured) -> Figure:
    """Histograms of every score, the steps one below the other: one row per reward model, one column per method."""
    blocks, colours = by_block(data), colours_of(measured.methods)
    shown = [list(own.groupby(["metric", "prompts"], sort=False)) for own in blocks.values()]
    tall = [own.groupby("method")["step"].nunique().max() for own in blocks.values()]
    heights = [0.35 + len(rows) * (0.7 + 0.32 * n) for rows, n in zip(shown, tall, strict=True)]
    figure, parts = _parts(list(blocks), heights)
    for part, rows, own in zip(parts, shown, blocks.values(), strict=True):
        methods = [method for method in measured.methods if method in set(own["method"])]
        panels = part.subplots(len(rows), len(methods), squeeze=False, sharex="row")
        for axes, ((key, prompts), bars) in zip(panels, rows, strict=True):
            scale = 0.9 / bars["share"].max()
            for axis, method in zip(axes, methods, strict=True):
                steps = bars[bars["method"] == method].groupby("step")
                for place, (number, step) in enumerate(steps):
                    edges = [*step["from"], step["to"].iloc[-1]]
                    tops = step["share"] * scale - place
                    axis.stairs(tops, edges, baseline=-place, fill=True, color=colours[method])
                    tell(axis, (step["from"] + step["to"]) / 2, tops, _bars(step, f"{method}, step {number}"))
                    axis.axhline(-place, color=_MUTED, lw=0.4, zorder=0)
                axis.set_yticks([-place for place in range(len(steps))], [f"step {step}" for step in steps.groups])
                axis.tick_params(axis="y", length=0)
                axis.set_ylim(0.8 - len(steps), 1)
                titled(axis, measured.metrics[key], method, prompts)
    return figure


def _bars(bars: pd.DataFrame, name: str) -> list[str]:
    """The tooltips of a histogram's bars, given as columns `from`, `to` and `share`."""
    return [
        f"{name}, {_short(b['from'])} to {_short(b['to'])}: {100 * b['share']:.1f} %" for b in bars.to_dict("records")
    ]


@mpl.rc_context(_STYLE)
def pair_quality(measures: pd.DataFrame, bars: pd.DataFrame, datasets: Sequence[str]) -> Figure:
    """Figure 1 of the paper: one row per data set; score differences, win rates and toxic shares of its human pairs.

    A panel has the same scale in all rows. A panel for which nothing was measured names the config entries that would
    fill it.

    Args:
        measures, bars: as from `report.pair_quality`.
    """
    figure, parts = _parts(datasets, [2.6] * len(datasets))
    sampled: dict[str, list] = {panel: [] for panel in PANELS}
    for dataset, part in zip(datasets, parts, strict=True):
        axes = part.subplots(1, len(PANELS))
        for axis, (panel, (title, entries)) in zip(axes, PANELS.items(), strict=True):
            shown = measures[(measures["dataset"] == dataset) & (measures["measure"] == panel)].to_dict("records")
            axis.set_title(title, loc="left")
            if not shown:
                axis.text(0.5, 0.5, f"not measured: the experiment\nnames no {entries}", ha="center", color=_MUTED)
                axis.set_axis_off()
                continue
            sampled[panel].append(axis)
            if panel == "difference":
                _differences(axis, shown, bars[bars["dataset"] == dataset])
            else:
                _shares(axis, shown, 50 if panel == "win_rate" else None)
    for axes in sampled.values():
        ends = [end for axis in axes for end in axis.get_xlim()]
        for axis in axes:
            axis.set_xlim(min(ends), max(ends))
    return figure


def _differences(axis, shown: Sequence[Mapping[str, Any]], bars: pd.DataFrame) -> None:
    """Distributions, each with its mean and interval below."""
    for place, (m, colour) in enumerate(zip(shown, _COLOURS * len(shown), strict=False)):
        own = bars[bars["scorer"] == m["scorer"]]
        axis.stairs(own["share"], [*own["from"], own["to"].iloc[-1]], color=colour, lw=1.4, label=m["scorer"])
        tell(axis, (own["from"] + own["to"]) / 2, own["share"], _bars(own, m["scorer"]))
        _interval(axis, -0.012 * (place + 1), m, colour, f"{m['scorer']}: {_estimate(m)}")
    axis.axvline(0, **_RULE)
    axis.set_ylabel("share of pairs")
    axis.legend(frameon=False)


def _shares(axis, shown: Sequence[Mapping[str, Any]], neutral: float | None) -> None:
    names = [f"{m['preference']}, {m['scorer']}" if m["preference"] else m["scorer"] for m in shown]
    for place, (name, m) in enumerate(zip(names, shown, strict=True)):
        percent = {end: 100 * m[end] for end in ("mean", "low", "high")}
        colour = _MUTED if m["preference"] == "rejected" else _COLOURS[0]
        _interval(axis, place, percent, colour, f"{name}: {_estimate(percent)} %")
    if neutral is not None:
        axis.axvline(neutral, **_RULE)
    _rows(axis, names)


def _estimate(m: Mapping[str, float]) -> str:
    return f"{_short(m['mean'])} [{_short(m['low'])}, {_short(m['high'])}]"


def categories(data: pd.DataFrame, measured: Measured) -> Figure:
    """Negatives in each harm category, most frequent first: one axis per data set, bars stacked by split."""
    counts = {name: own.pivot(index="category", columns="split", values="negatives").loc[own["category"].unique()]
              for name, own in data.groupby("dataset", sort=False)}  # fmt: skip
    sizes = [len(table) for table in counts.values()]
    figure = Figure((_WIDTH, sum(0.6 + 0.24 * size for size in sizes)), layout="constrained")
    axes = figure.subplots(len(counts), 1, height_ratios=sizes, squeeze=False).ravel()
    for axis, (dataset, table) in zip(axes, counts.items(), strict=True):
        table = table[[split for split in ("train", "test") if split in table]]
        left = table.cumsum(axis=1) - table
        for split, colour in zip(table, (_COLOURS[0], _MUTED), strict=False):
            bars = axis.barh(range(len(table)), table[split], 0.7, left=left[split], color=colour, label=split)
            _tell_bars(bars, [f"{name}, {split}: {n:,.0f}" for name, n in table[split].items()])
        _rows(axis, table.index)
        axis.set_title(f"{dataset}: negatives by harm category", loc="left")
        axis.legend(frameon=False, loc="lower right")
    return figure


def _binned(log: pd.DataFrame) -> pd.DataFrame:
    """A log as means over consecutive rows, at most `POINTS` of them; NaN where none of the rows has a value."""
    columns = log[["step", *_PANELS]].astype(float)
    pieces = np.array_split(np.arange(len(log)), min(POINTS, len(log)))
    return pd.DataFrame([columns.iloc[piece].mean() for piece in pieces], columns=columns.columns)


def by_block(data: pd.DataFrame, measured: Measured | None = None) -> dict[str, pd.DataFrame]:
    """The rows of each data set and model, by title; with `measured` also those without a row."""
    empty = {title(block): data.iloc[:0] for block in measured.blocks} if measured else {}
    parts = data.groupby(["dataset", "model"], sort=False)
    return empty | {f"{dataset}, {model}": own for (dataset, model), own in parts}


def title(block: Block) -> str:
    """The title of a block's part of a figure."""
    return f"{block.dataset}, {block.model}"


def _parts(titles: Sequence[str], heights: Sequence[float]):
    """A figure with a part for each title, heights in inches."""
    figure = Figure((_WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel()
    for part, text in zip(parts, titles, strict=True):
        part.suptitle(text, x=0.005, ha="left", weight="bold", size=10.5)
    return figure, parts


def grid_of(titles: Iterable[str], shown: Sequence[Sequence], head: float, height: float, **shared):
    """A figure with one part per title and, in each part, one axis per item of `shown`.

    Args:
        head, height: inches of a part's title and of a line of axes.

    Returns:
        The figure, and each part with its axes.
    """
    lines = [max(1, math.ceil(len(things) / _COLUMNS)) for things in shown]
    figure, parts = _parts(list(titles), [head + n * height for n in lines])
    grid = []
    for part, n, things in zip(parts, lines, shown, strict=True):
        axes = part.subplots(n, _COLUMNS, squeeze=False, **shared).ravel()
        for axis in axes[len(things) :]:
            axis.set_visible(False)
        grid.append((part, axes[: len(things)]))
    return figure, grid


def legend(part, handles: Mapping[str, Any], order: Sequence[str]) -> None:
    """Put a legend below a part, in as many columns as fit. Its lines make the figure higher, not the axes lower."""
    names = [method for method in order if method in handles]
    if not names:
        return
    columns = min(8, max(1, int(_WIDTH / (0.75 + 0.09 * max(map(len, names))))))
    marks = [handles[name] for name in names]
    part.legend(marks, names, loc="outside lower center", ncols=columns, frameon=False)
    figure = part.get_figure(root=True)
    figure.set_figheight(figure.get_figheight() + _LINE * (math.ceil(len(names) / columns) - 1))


def colours_of(order: Sequence[str]) -> dict[str, str]:
    """One colour per method, the same in all figures; the initial model is grey."""
    trained = [method for method in order if method != "initial"]
    return {"initial": _MUTED} | {m: _COLOURS[i % len(_COLOURS)] for i, m in enumerate(trained)}


@dataclass(frozen=True)
class Entry:
    """A figure of the report: plotted from a table, published with it as CSV, SVG, PDF and PNG, shown in the page.

    Attributes:
        data: the table.
        plot: makes the figure from it; None where a separate command makes the figure.
        section: of the page: `effect`, `results`, `training` or `data`.
        label: what it shows, for those who do not see it.
        caption: HTML below it.
        when: whether there is something to plot.
        estimates: whether it shows intervals; a note below the caption states what they are over.
    """

    data: Callable[[Measured], pd.DataFrame] | None
    plot: Callable[[pd.DataFrame, Measured], Figure] | None
    section: Literal["effect", "results", "training", "data"]
    label: str
    caption: str
    when: Callable[[Measured], bool] = lambda measured: True
    estimates: bool = False


# By name, in reading order within a section. A figure is added by a function and its entry here.
FIGURES = {
    "effect": Entry(
        effect_data,
        methods,
        "effect",
        "Exact scores of the answers, their length and repetition, by method",
        "Mean and 95 % interval; the strokes below are the single seeds. The dotted line is the initial model.",
        lambda measured: bool(measured.effects),
        estimates=True,
    ),
    "methods": Entry(
        methods_data,
        methods,
        "results",
        "Mean and 95 % interval of every metric, by method",
        "Mean and 95 % interval of each metric; the strokes below are the single seeds. The dotted line is the "
        "initial model.",
        estimates=True,
    ),
    "training": Entry(
        training_data,
        training,
        "training",
        "Loss, margin and log-probs of the probe against training steps, by method",
        f"A line a seed; longer logs are plotted as means in {POINTS} bins. The margin is the mean log-ratio of a "
        "group's positives less that of its negative, against the references, which may move. The probe is a few "
        "fixed groups of train prompts: how far the log-prob of their answers has moved from that under the initial "
        "model. Losses of different methods have different scales.",
    ),
    "trials": Entry(
        trials_data,
        trials,
        "training",
        "Loss, margin and log-probs of the probe of the trials against training steps, by method",
        "The trials of each method that was tuned; the thick line is the one that was chosen by validation.",
        lambda measured: any(len(block.trials) for block in measured.blocks),
    ),
    "course": Entry(
        course_data,
        course,
        "training",
        "Scores, log-probs of human answers, length, distinct-2 and tasks against training steps, by method",
        "Answers to the test prompts, held-out human answers, and tasks, under the weights of several steps; step 0 "
        "is the initial model. Band: 95 % interval; small dots: the single seeds. Log-probs in nats per token.",
        lambda measured: any(len(block.course) for block in measured.blocks),
        estimates=True,
    ),
    "distributions": Entry(
        distributions_data,
        distributions,
        "training",
        "Histograms of the scores at several training steps, by method",
        f"Scores of the single answers at these steps, as shares in {BINS} bins, to one scale in each row.",
        lambda measured: any(len(scored(measured, block)) for block in measured.blocks),
    ),
    "tradeoff": Entry(
        tradeoff_data,
        tradeoff,
        "results",
        "What each method does with harmless and with harmful prompts",
        "Prompts that only look harmful, and their harmful twins: how many answers do not refuse, and scores of help "
        "and of harm where there are both. Further right is more help, further down less harm; lines are 95 % "
        "intervals.",
        lambda measured: len(tradeoff_data(measured)) > 0,
        estimates=True,
    ),
    "pair_quality": Entry(
        None,
        None,
        "data",
        "Score differences, win rates and toxic shares of the human pairs, by data set",
        "The human pairs as reward models, judges and classifiers see them. Left, the distribution of the chosen "
        "answer's score less the rejected one's, in standard deviations of the scores and such that more is better, "
        "with its mean and 95 % interval; a reward model trained on these labels is asked about test prompts only. "
        'The numbers are in <a href="pair_quality.csv">pair_quality.csv</a>.',
        lambda measured: measured.experiment.pair_quality,
    ),
    "categories": Entry(
        categories_data,
        categories,
        "data",
        "Negatives in each harm category, by split and data set",
        "Human negatives in each harm category; one may be in several.",
        lambda measured: any(measured.categories.values()),
    ),
}


@mpl.rc_context(_STYLE)
def plotted(measured: Measured) -> dict[str, tuple[pd.DataFrame, Figure]]:
    """The figures of `FIGURES` for which there is something to plot, each with its table; without those made by other
    commands."""
    entries = {name: entry for name, entry in FIGURES.items() if entry.plot and entry.when(measured)}
    tables = {name: entry.data(measured) for name, entry in entries.items()}
    return {name: (tables[name], entry.plot(tables[name], measured)) for name, entry in entries.items()}


@mpl.rc_context(_STYLE)
def render(figure: Figure, kind: str) -> bytes:
    """The figure as `svg`, whose marks have tooltips, `pdf` or `png`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    dated = {"svg": "Date", "pdf": "CreationDate"}
    figure.savefig(buffer, format=kind, dpi=160, metadata={dated[kind]: None} if kind in dated else None)
    return _with_values(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


for prefix, space in {
    "": _SVG.strip("{}"),
    "xlink": "http://www.w3.org/1999/xlink",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "cc": "http://creativecommons.org/ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
}.items():
    ElementTree.register_namespace(prefix, space)


def _with_values(svg: bytes) -> bytes:
    """An SVG with the tooltips of its marks as `title` elements, which browsers show where the pointer rests."""
    root = ElementTree.fromstring(svg)
    for group in root.iter(f"{_SVG}g"):
        if group.get("id", "").startswith(_VALUES):
            texts = json.loads(group.attrib.pop("id").removeprefix(_VALUES))
            marks = list(group.iter(f"{_SVG}use")) or [group]
            # Matplotlib leaves out a point beyond the paper: then texts cannot be assigned to marks.
            for mark, text in zip(marks, texts, strict=True) if len(marks) == len(texts) else ():
                title = ElementTree.Element(f"{_SVG}title")
                title.text = text
                mark.insert(0, title)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def inline(svg: bytes, name: str, label: str) -> str:
    """An SVG file as part of the page: in the page's colours, its ids prefixed by `name`, without styles of its own.

    Matplotlib's `style` attributes become single attributes: the page's Content-Security-Policy forbids `style`. The
    one rule of Matplotlib's style sheet is in page.css.

    Args:
        label: what it shows, for those who do not see it.
    """
    root = ElementTree.fromstring(svg)
    for element in [*root.iter()]:
        for child in [*element]:
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                element.remove(child)
        for style in filter(None, element.attrib.pop("style", "").split(";")):
            key, value = map(str.strip, style.split(":"))
            element.set(key, _THEMED.get(value, value))
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key.endswith("href") or value.startswith("url("):
                element.set(key, value.replace("#", f"#{name}-", 1))
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.attrib |= {"role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")
