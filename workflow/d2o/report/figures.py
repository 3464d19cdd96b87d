"""The figures: every metric, the log of every training, metrics against its steps, and what the data are like."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from d2o.report import tables
from d2o.report.metrics import Metric
from d2o.report.quality import PANELS, Measure
from d2o.report.tables import Block, Cell, grids

# Ink and paper are looked up again in the page, where they follow its light or dark theme.
_INK, _MUTED, _PAPER = "#1f2329", "#7b8491", "#fffffe"
_COLOURS = ["#2f7ed8", "#d9772b", "#2f9e77", "#b8529a", "#8465cf", "#a89020", "#3a9fb8", "#c8503f"]
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
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
# Bars of a histogram of scores.
BINS = 24
# Longer logs are drawn as means over consecutive steps.
POINTS = 200
_PANELS = {
    "loss": "loss",
    "margin": "margin, nats",
    "positive_logratio": "log-ratio of positives, nats",
    "negative_logratio": "log-ratio of negatives, nats",
}


@mpl.rc_context(_STYLE)
def methods(blocks: Sequence[Block], order: Sequence[str]) -> Figure:
    """Every metric: a part a data set and model, a panel a metric, a point and 95 % interval a method.

    Args:
        order: methods from top to bottom.
    """
    measured = [{cell.metric for cell in block.cells} for block in blocks]
    shown = [
        [m for grid in grids(block, order) for m in grid.metrics if m.shown and m in found]
        for block, found in zip(blocks, measured, strict=True)
    ]
    return _forest(blocks, shown, order)


@mpl.rc_context(_STYLE)
def effect(blocks: Sequence[Block], order: Sequence[str]) -> Figure:
    """As `methods`, of what the report opens with."""
    found = [(block, grid) for block in blocks if (grid := tables.effect(block, order))]
    return _forest([block for block, _ in found], [grid.metrics for _, grid in found], order)


def _forest(blocks: Sequence[Block], shown: Sequence[Sequence[Metric]], order: Sequence[str]) -> Figure:
    lines = [max(1, math.ceil(len(metrics) / _COLUMNS)) for metrics in shown]
    heights = [0.35 + n * (0.85 + 0.26 * len(order)) for n in lines]
    colours = _colours(order)
    figure, parts = _parts(_titles(blocks), heights)
    for part, block, metrics, n in zip(parts, blocks, shown, lines, strict=True):
        axes = part.subplots(n, _COLUMNS, squeeze=False, sharey=True).ravel()
        for axis in axes[len(metrics) :]:
            axis.set_visible(False)
        for axis, metric in zip(axes, metrics, strict=False):
            _panel(axis, metric, {c.method: c for c in block.cells if c.metric == metric}, order, colours)
    return figure


def _panel(axis, metric, cells: Mapping[str, Cell], order: Sequence[str], colours: Mapping[str, str]) -> None:
    scale = 100 if metric.percent else 1
    for place, method in enumerate(order):
        if method in cells:
            e = cells[method].estimate
            axis.plot([e.low * scale, e.high * scale], [place, place], color=colours[method], lw=1.6)
            axis.plot(e.mean * scale, place, "o", color=colours[method], ms=4.5)
    start = metric.neutral
    if start is None and "initial" in cells:
        start = cells["initial"].estimate.mean
    if start is not None:
        axis.axvline(start * scale, color=_MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.locator_params(axis="x", nbins=4)
    axis.tick_params(axis="y", length=0)
    _title(axis, metric, {"higher": "better →", "lower": "← better", None: ""}[metric.better])


def _title(axis, metric, note: str) -> None:
    """A panel's title, and under it a note and where the prompts come from."""
    axis.set_title(metric.label + (", %" if metric.percent else ""), loc="left", pad=14)
    origin = metric.prompts if metric.prompts != "test" else ""
    under = {"xycoords": "axes fraction", "textcoords": "offset points", "color": _MUTED, "size": 8}
    axis.annotate(" · ".join(filter(None, (note, origin))), (0, 1), (0, 4), **under)


@mpl.rc_context(_STYLE)
def training(blocks: Sequence[Block], order: Sequence[str]) -> Figure:
    """Loss, margin and the log-ratio of either side against steps: a colour a method, a thin line a seed.

    Args:
        order: methods in the order of the legend.
    """
    figure, parts = _parts(_titles(blocks), [2.75] * len(blocks))
    colours = _colours(order)
    for part, block in zip(parts, blocks, strict=True):
        axes = part.subplots(1, len(_PANELS))
        handles = {}
        for axis, (key, label) in zip(axes, _PANELS.items(), strict=True):
            for method, runs in block.logs.items():
                for log in runs:
                    steps, values = _curve(log, key)
                    if len(steps):
                        width = 1.5 if len(runs) == 1 else 0.8
                        mark = "o" if len(steps) == 1 else None
                        (handles[method],) = axis.plot(
                            steps, values, color=colours[method], lw=width, marker=mark, ms=4
                        )
            if key != "loss":
                axis.axhline(0, color=_MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
            axis.set_title(label, loc="left")
            axis.set_xlabel("step")
            axis.locator_params(nbins=5)
        names = [method for method in order if method in handles]
        if names:
            part.legend([handles[name] for name in names], names, loc="outside lower center", ncols=8, frameon=False)
    return figure


@mpl.rc_context(_STYLE)
def pool(sheet: Mapping[str, Any], scores: Mapping[str, Sequence[float]]) -> Figure:
    """Lengths of a pool's samples in tokens, how many of them each reason speaks against, and their scores.

    Args:
        sheet: the pool's data sheet.
        scores: by reward model; none where the pool was not scored.
    """
    figure = Figure((_WIDTH, 2.4), layout="constrained")
    lengths, reasons, *others = figure.subplots(1, 2 + len(scores))
    for axis, (reward, values) in zip(others, scores.items(), strict=True):
        axis.hist(values, bins=40, color=_COLOURS[2])
        axis.set_title(f"score, {reward}", loc="left")
    tokens, counts = zip(*((int(length), count) for length, count in sheet["tokens"].items()), strict=True)
    lengths.hist(tokens, bins=min(40, max(tokens)), weights=counts, color=_COLOURS[0])
    lengths.set_title("length, tokens", loc="left")
    lengths.set_ylabel("samples")
    shares = {reason: 100 * count / sheet["samples"] for reason, count in sheet["reasons"].items()}
    reasons.barh(list(shares), list(shares.values()), color=_COLOURS[1])
    reasons.invert_yaxis()
    reasons.set_xlim(0, 100)
    reasons.set_title("marked, % of samples", loc="left")
    return figure


@mpl.rc_context(_STYLE)
def course(blocks: Sequence[Block], order: Sequence[str]) -> Figure:
    """Scores and log-probs of human answers against the steps of training: a line a method, its 95 % interval.

    Args:
        order: methods in the order of the legend.
    """
    blocks = [block for block in blocks if block.course]
    shown = [list(dict.fromkeys(point.metric for point in block.course)) for block in blocks]
    lines = [math.ceil(len(metrics) / _COLUMNS) for metrics in shown]
    figure, parts = _parts(_titles(blocks), [0.6 + 2.4 * n for n in lines])
    colours = _colours(order)
    for part, block, metrics, n in zip(parts, blocks, shown, lines, strict=True):
        axes = part.subplots(n, _COLUMNS, squeeze=False).ravel()
        for axis in axes[len(metrics) :]:
            axis.set_visible(False)
        handles = {}
        for axis, metric in zip(axes, metrics, strict=False):
            for method in dict.fromkeys(point.method for point in block.course):
                found = [p for p in block.course if p.method == method and p.metric == metric]
                steps, colour = [p.step for p in found], colours[method]
                low, high = ([getattr(p.estimate, end) for p in found] for end in ("low", "high"))
                axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
                means = [p.estimate.mean for p in found]
                (handles[method],) = axis.plot(steps, means, color=colour, lw=1.5, marker="o", ms=3.5)
            _title(axis, metric, {"higher": "↑ better", "lower": "↓ better", None: ""}[metric.better])
            axis.set_xlabel("step")
            axis.locator_params(nbins=5)
        names = [method for method in order if method in handles]
        part.legend([handles[name] for name in names], names, loc="outside lower center", ncols=8, frameon=False)
    return figure


@mpl.rc_context(_STYLE)
def distributions(blocks: Sequence[Block], order: Sequence[str]) -> Figure:
    """Histograms of every score at several steps, one under the other: a row a reward model, a column a method.

    Args:
        order: methods from left to right.
    """
    blocks = [block for block in blocks if block.scored]
    kinds = [list(dict.fromkeys(point.metric for point in block.scored)) for block in blocks]
    tall = [max(len({p.step for p in block.scored if p.method == m}) for m in order) for block in blocks]
    heights = [0.35 + len(k) * (0.7 + 0.32 * n) for k, n in zip(kinds, tall, strict=True)]
    figure, parts = _parts(_titles(blocks), heights)
    colours = _colours(order)
    for part, block, metrics in zip(parts, blocks, kinds, strict=True):
        methods = [method for method in order if any(point.method == method for point in block.scored)]
        rows = part.subplots(len(metrics), len(methods), squeeze=False, sharex="row")
        for axes, metric in zip(rows, metrics, strict=True):
            found = [point for point in block.scored if point.metric == metric]
            edges = np.histogram_bin_edges(np.concatenate([point.values for point in found]), BINS)
            shares = [np.histogram(point.values, edges)[0] / len(point.values) for point in found]
            scale = 0.9 / max(share.max() for share in shares)
            for axis, method in zip(axes, methods, strict=True):
                own = [(p.step, share) for p, share in zip(found, shares, strict=True) if p.method == method]
                for place, (_, share) in enumerate(own):
                    axis.stairs(share * scale - place, edges, baseline=-place, fill=True, color=colours[method])
                    axis.axhline(-place, color=_MUTED, lw=0.4, zorder=0)
                axis.set_yticks([-place for place in range(len(own))], [f"step {step}" for step, _ in own])
                axis.tick_params(axis="y", length=0)
                axis.set_ylim(0.8 - len(own), 1)
                _title(axis, metric, method)
    return figure


@mpl.rc_context(_STYLE)
def quality(measures: Sequence[Measure], datasets: Sequence[str]) -> Figure:
    """Figure 1 of the paper: a row a data set; score differences, win rates and toxic shares of its human pairs.

    A panel has the same scale in all rows. One for which nothing was measured says which entries of the config would
    fill it.
    """
    figure, parts = _parts(datasets, [2.6] * len(datasets))
    drawn: dict[str, list] = {panel: [] for panel in PANELS}
    for dataset, part in zip(datasets, parts, strict=True):
        axes = part.subplots(1, len(PANELS))
        for axis, (panel, (title, entries)) in zip(axes, PANELS.items(), strict=True):
            shown = [m for m in measures if m.dataset == dataset and m.panel == panel]
            axis.set_title(title, loc="left")
            if not shown:
                axis.text(0.5, 0.5, f"not measured: the experiment\nnames no {entries}", ha="center", color=_MUTED)
                axis.set_axis_off()
                continue
            drawn[panel].append(axis)
            if panel == "difference":
                _differences(axis, shown)
            else:
                _shares(axis, shown, 50 if panel == "win_rate" else None)
    for axes in drawn.values():
        ends = [end for axis in axes for end in axis.get_xlim()]
        for axis in axes:
            axis.set_xlim(min(ends), max(ends))
    return figure


def _differences(axis, shown: Sequence[Measure]) -> None:
    """Distributions, each with its mean and interval below."""
    low, high = (extreme([end for m in shown for end in m.values] or [0]) for extreme in (min, max))
    edges = np.linspace(min(low, -0.1), max(high, 0.1), 26)
    for place, (m, colour) in enumerate(zip(shown, _COLOURS * len(shown), strict=False)):
        shares = np.histogram(m.values, edges)[0] / max(1, len(m.values))
        axis.stairs(shares, edges, color=colour, lw=1.4, label=m.scorer)
        e, below = m.estimate, -0.012 * (place + 1)
        axis.plot([e.low, e.high], [below, below], color=colour, lw=1.6)
        axis.plot(e.mean, below, "o", color=colour, ms=4.5)
    axis.axvline(0, color=_MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
    axis.set_ylabel("share of pairs")
    axis.legend(frameon=False)


def _shares(axis, shown: Sequence[Measure], neutral: float | None) -> None:
    for place, m in enumerate(shown):
        e = m.estimate
        colour = _MUTED if m.side == "rejected" else _COLOURS[0]
        axis.plot([e.low * 100, e.high * 100], [place, place], color=colour, lw=1.6)
        axis.plot(e.mean * 100, place, "o", color=colour, ms=4.5)
    if neutral is not None:
        axis.axvline(neutral, color=_MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
    axis.set_yticks(range(len(shown)), [f"{m.side}, {m.scorer}" if m.side else m.scorer for m in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)


@mpl.rc_context(_STYLE)
def categories(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Figure:
    """Negatives in each harm category, most frequent first: a part a data set, a bar a split.

    Args:
        counts: by data set, split and category.
    """
    sizes = [len(set().union(*splits.values())) for splits in counts.values()]
    figure = Figure((_WIDTH, sum(0.6 + 0.24 * size for size in sizes)), layout="constrained")
    axes = figure.subplots(len(counts), 1, height_ratios=sizes, squeeze=False).ravel()
    for axis, (dataset, splits) in zip(axes, counts.items(), strict=True):
        names = sorted(set().union(*splits.values()), key=lambda name: -sum(s.get(name, 0) for s in splits.values()))
        left = np.zeros(len(names))
        for (split, found), colour in zip(splits.items(), (_COLOURS[0], _MUTED), strict=False):
            widths = np.array([found.get(name, 0) for name in names])
            axis.barh(range(len(names)), widths, 0.7, left=left, color=colour, label=split)
            left += widths
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.set_title(f"{dataset}: negatives by harm category", loc="left")
        axis.legend(frameon=False, loc="lower right")
    return figure


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one curve, averaged in bins to at most `POINTS`; empty where there is no such value."""
    found = [(row["step"], row[key]) for row in log if row.get(key) is not None]
    pieces = np.array_split(np.array(found, float).reshape(-1, 2), min(POINTS, max(1, len(found))))
    steps, values = np.array([piece.mean(0) for piece in pieces if len(piece)]).reshape(-1, 2).T
    return steps, values


def _titles(blocks: Sequence[Block]) -> list[str]:
    return [f"{block.dataset}, {block.model}" for block in blocks]


def _parts(titles: Sequence[str], heights: Sequence[float]):
    """A figure with a part for each title, heights in inches."""
    figure = Figure((_WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel()
    for part, title in zip(parts, titles, strict=True):
        part.suptitle(title, x=0.005, ha="left", weight="bold", size=10.5)
    return figure, parts


def _colours(order: Sequence[str]) -> dict[str, str]:
    """A colour a method, the same in all figures; the initial model is grey."""
    trained = [method for method in order if method != "initial"]
    return {"initial": _MUTED} | {m: _COLOURS[i % len(_COLOURS)] for i, m in enumerate(trained)}


@mpl.rc_context(_STYLE)
def render(figure: Figure, kind: str) -> bytes:
    """The figure as `svg` or `png`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def inline(svg: bytes, name: str, label: str) -> str:
    """An SVG file as part of the page: in the page's colours and fonts, its ids prefixed by `name`.

    Args:
        label: what it shows, for those who do not see it.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace(_INK, "currentColor").replace(_PAPER, "none")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
