"""The tables and figures of the paper (arXiv 2403.03419) for any experiment: those that its `shows` names.

Figures 3 and 4 are entries of `figures.FIGURES`; the tables are `TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from d2o.metrics import EXACT, PEOPLE, SCORED, TASKS, Metric, together
from d2o.report import figures, tables
from d2o.report.tables import Block, Measured

# Numbers of the paper, by the Hub's name of the model, the method's in `config/paper.yaml`, and the Hub's name of the
# scorer or task; a judge by its model.
_PAPER = Path(__file__).with_name("paper.csv")
# Points of a density, and its columns.
_POINTS = 200


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        rows: the table as numbers, one row per method and metric, for CSV.
        words: the table as readers see it, by title.
        caption: what the table shows, and how strong its evidence is.
    """

    rows: pd.DataFrame
    words: dict[str, pd.DataFrame]
    caption: str

    def files(self, name: str) -> dict[str, bytes]:
        """The table as CSV, Markdown and LaTeX, by file name."""
        markdown = [f"### {title}\n\n{tables.markdown(words)}\n" for title, words in self.words.items()]
        latex = [
            words.to_latex(escape=True, index=False, caption=f"{title}. {self.caption}".replace("%", r"\%"))
            for title, words in self.words.items()
        ]
        return {
            f"{name}.csv": tables.as_csv([self.rows], list(self.rows.columns)).encode(),
            f"{name}.md": "\n".join([*markdown, self.caption, ""]).encode(),
            f"{name}.tex": tables.latex("\n".join(latex)).encode(),
        }


def table1(measured: Measured) -> Table:
    """Every method by every scorer, judge and task, beside the paper's number where it is known."""
    known = pd.read_csv(_PAPER).set_index(["model", "method", "measure"])["value"]
    rows, words = [], {}
    for block in measured.blocks:
        shown = tables.readable(_main(measured, block), measured.metrics)
        model = measured.settings.models[block.model].hub
        measures = {key: _measure(measured, key) for key in shown["metric"].unique()}
        places = [(model, row.method, measures[row.metric]) for row in shown.itertuples()]
        shown["paper"] = [known.get(place, np.nan) for place in places]
        shown["text"] = [
            f"{r.value}{r.sign and ' ' + r.sign} {r.range}"
            + (f" (paper: {tables.number(r.paper, measured.metrics[r.metric])})" if r.paper == r.paper else "")
            for r in shown.itertuples()
        ]
        rows.append(shown)
        words[figures.title(block)] = _wide(measured, shown)
    columns = [*tables.TABLE, "mean", "low", "high", "n", "seeds", "interval", "difference", "p_adjusted", "paper"]
    caption = f"Means of the answers to the test prompts and of the tasks. {_evidence(measured, measured.notes)}"
    return Table(together(rows, columns)[columns], words, caption)


def table2(measured: Measured) -> Table:
    """Ablations: differences of every method to the first method that is trained and did not fail."""
    trained = [method for method in measured.methods if method != "initial"]
    whole = next(method for method in trained if method not in measured.experiment.failed)
    rows, words = [], {}
    for block in measured.blocks:
        table = block.comparisons
        table = table[table["metric"].isin(_main(measured, block)["metric"]) & table["prompts"].isin(["test", ""])]
        turned = table[table["method"] == whole]
        turned = turned.assign(
            method=turned["other"],
            other=whole,
            difference=-turned["difference"],
            low=-turned["high"],
            high=-turned["low"],
            effect_size=-turned["effect_size"],
        )
        table = together([turned, table[table["other"] == whole]], tables.COMPARISONS)
        shown = tables.readable(
            table.assign(mean=table["difference"], difference_low=table["low"], difference_high=table["high"]),
            measured.metrics,
        )
        shown["text"] = shown["change"] + shown["sign"].map(lambda sign: sign and f" {sign}")
        rows.append(table)
        words[f"{figures.title(block)}, less {whole}"] = _wide(measured, shown)
    caption = (
        f"Differences to {whole}, paired by prompt; ▲ better, ▼ worse: adjusted p < {tables.ALPHA:.2g} "
        "(Holm, over the primary comparisons of a metric, and over all others). "
        f"{_evidence(measured, measured.notes[1:])}"
    )
    return Table(together(rows, tables.COMPARISONS), words, caption)


TABLES: dict[str, Callable[[Measured], Table]] = {"table1": table1, "table2": table2}


def _main(measured: Measured, block: Block) -> pd.DataFrame:
    """The estimates of scorers, judges and tasks that are shown, and all of people."""
    metrics = measured.metrics.values()
    keys = [m.key for m in metrics if m.group == PEOPLE or (m.group in (EXACT, SCORED, TASKS) and m.shown)]
    estimates = block.estimates
    return estimates[estimates["metric"].isin(keys) & estimates["prompts"].isin(["test", ""])]


def _wide(measured: Measured, shown: pd.DataFrame) -> pd.DataFrame:
    """The `text` of each estimate: one row per method, one column per metric."""
    order = [method for method in measured.methods if method in set(shown["method"]) | {*measured.experiment.failed}]
    keys = list(shown["metric"].unique())
    wide = shown.pivot(index="method", columns="metric", values="text").reindex(index=order, columns=keys).fillna("–")
    wide.columns = [tables.heading(measured.metrics[key]) for key in keys]
    return wide.rename(index=measured.named).rename_axis(index="method").reset_index()


def _measure(measured: Measured, metric: str) -> str | None:
    """The key of a metric in the paper's numbers; None where the paper has no such metric."""
    kind, name, *part = metric.split("/")
    s = measured.settings
    if kind == "reward" and not part and (source := s.rewards[name].source):
        return source.hub
    if kind == "judge" and part == ["win_rate"] and s.judges[name].model.startswith("gpt-4"):
        return "gpt-4"
    if kind == "task" and not part[0].endswith("_by_subject"):
        return s.tasks[name].hub
    return None


def _evidence(measured: Measured, notes: Sequence[str]) -> str:
    """How strong the evidence of a table is: its n, and the notes."""
    counts = [n for block in measured.blocks for n in _main(measured, block)["n"]]
    ends = "–".join(f"{n:,}" for n in dict.fromkeys([min(counts), max(counts)])) if counts else "0"
    return " ".join([f"n = {ends} prompts or questions.", *notes])


# Figure 3: scores against K and against steps, losses against steps ----------------------------------


def figure3_data(measured: Measured) -> pd.DataFrame:
    """Panel `a`: one point per K of a sweep, and the trend; `b`: one point per step; `c`: the loss, raw and smoothed.

    Points of `a` and `b` are of all seeds and, where there are several, of each.

    The trend is the least-squares line of the single trainings' means on log2 K: `mean` is its slope with a 95 %
    interval, the change of the score per doubling of K. The smoothed loss is the mean of a moving window of a
    twentieth of the steps, over all seeds; `low` and `high` are one standard deviation of the raw losses away.
    """
    parts = []
    for block in measured.blocks:
        for series, ks in _sweeps(measured):
            parts += [figures.placed(block, part) for part in _against_k(measured, block, series, ks)]
        parts += [figures.placed(block, part) for part in _losses(block)]
    course = figures.course_data(measured)
    course = course[course["metric"].isin(_scores(measured)) & (course["prompts"] == "test")]
    parts.append(course.assign(panel="b", series=course["method"], x=course["step"]))
    return together(parts, _FIGURE3)[_FIGURE3]


_FIGURE3 = ["dataset", "model", "panel", "metric", "series", "seed", "x", "mean", "low", "high", "n"]


def _scores(measured: Measured) -> list[str]:
    return [m.key for m in measured.metrics.values() if m.group in (EXACT, SCORED) and m.shown]


def _sweeps(measured: Measured) -> Iterator[tuple[str, dict[str, int]]]:
    """Methods that differ in `k` only: the name of the one with the largest K, and the K of each."""
    entries = {name: measured.settings.methods[name] for name in measured.methods if name != "initial"}
    alike: dict[str, dict[str, int]] = {}
    for name, method in entries.items():
        if method.k:
            rest = method.model_copy(update={"k": None, "extends": None}).model_dump_json()
            alike.setdefault(rest, {})[name] = method.k
    for ks in alike.values():
        if len(ks) > 1:
            yield max(ks, key=ks.get), dict(sorted(ks.items(), key=lambda item: item[1]))


def _against_k(measured: Measured, block: Block, series: str, ks: dict[str, int]) -> Iterator[pd.DataFrame]:
    whole, single = (
        points.assign(panel="a", series=series, x=points["method"].map(ks)).sort_values("x")
        for estimates in (block.estimates.assign(seed="all"), block.seeds)
        for points in [estimates[(estimates["prompts"] == "test") & estimates["method"].isin(ks)]]
    )
    for key in _scores(measured):
        points, trainings = (table[table["metric"] == key] for table in (whole, single))
        yield points
        yield trainings
        each = trainings if len(trainings) else points
        x = np.log2(each["x"].astype(float))
        if len(each) > 2 and x.nunique() > 1:
            line = stats.linregress(x, each["mean"])
            half = stats.t.ppf(0.975, len(each) - 2) * line.stderr
            slope = {"mean": line.slope, "low": line.slope - half, "high": line.slope + half, "n": len(each)}
            place = {"panel": "a, per doubling of K", "metric": key, "series": series, "seed": "all"}
            yield pd.DataFrame([place | slope])


def _losses(block: Block) -> Iterator[pd.DataFrame]:
    for method, log in block.logs.dropna(subset="loss").groupby("method", sort=False):
        for seed, own in log.groupby("seed"):
            raw = own.assign(panel="c, raw", metric="loss", series=method, seed=seed, x=own["step"], mean=own["loss"])
            yield raw.reindex(columns=_FIGURE3[2:])
        window = max(3, int(log["step"].max()) // 20)
        by_step = log.groupby("step")["loss"].agg(["mean", "count"])
        smooth = log.pivot(index="step", columns="seed", values="loss")
        spread = smooth.rolling(window, center=True, min_periods=1).std().mean(axis=1)
        mean = by_step["mean"].rolling(window, center=True, min_periods=1).mean()
        columns = {"mean": mean, "low": mean - spread, "high": mean + spread, "n": by_step["count"]}
        place = {"panel": "c", "metric": "loss", "series": method, "seed": "all"}
        yield pd.DataFrame(columns).rename_axis("x").reset_index().assign(**place)


def figure3(data: pd.DataFrame, measured: Measured) -> Figure:
    """One line of panels per kind: scores against K, scores against steps, and the loss of each method."""
    colours = figures.colours_of(measured.methods)
    parts, titles = [], []
    for block, own in figures.by_block(data).items():
        for panel, name in (("a", "against K"), ("b", "against steps"), ("c", "loss against steps")):
            shown = own[own["panel"] == panel]
            by = "series" if panel == "c" else "metric"
            if len(shown):
                parts.append((own, panel, list(shown[by].unique())))
                titles.append(f"{block}: {name}")
    figure, grid = figures.grid_of(titles, [keys for *_, keys in parts], 0.55, 2.4)
    for (own, panel, keys), (part, axes) in zip(parts, grid, strict=True):
        handles: dict[str, Any] = {}
        for axis, key in zip(axes, keys, strict=True):
            if panel == "c":
                _plot_loss(axis, own, key, colours[key])
            else:
                shown = own[(own["panel"] == panel) & (own["metric"] == key)].rename(columns={"series": "method"})
                handles |= figures.lines(axis, shown, "x", measured, key, "test")
                axis.set_xlabel("K" if panel == "a" else "step")
                if panel == "a":
                    _tell_trend(axis, own, measured.metrics[key])
        figures.legend(part, handles, measured.methods)
    return figure


def _tell_trend(axis, own: pd.DataFrame, metric: Metric) -> None:
    trends = own[(own["panel"] == "a, per doubling of K") & (own["metric"] == metric.key)]
    texts = [f"{tables.number(t.mean, metric)} {tables.interval(t.low, t.high, metric)}" for t in trends.itertuples()]
    axis.set_xlabel("K" + (f"; per doubling {', '.join(texts)}" if texts else ""))
    axis.set_xscale("log", base=2)
    ks = own.loc[own["panel"] == "a", "x"].unique()
    axis.set_xticks(ks, [f"{k:g}" for k in ks])


def _plot_loss(axis, own: pd.DataFrame, method: str, colour: str) -> None:
    own = own[own["series"] == method]
    for _, raw in own[own["panel"] == "c, raw"].groupby("seed"):
        axis.plot(raw["x"], raw["mean"], color=colour, lw=0.5, alpha=0.35)
    smooth = own[own["panel"] == "c"]
    axis.fill_between(smooth["x"], smooth["low"], smooth["high"], color=colour, alpha=0.15, lw=0)
    axis.plot(smooth["x"], smooth["mean"], color=colour, lw=1.5)
    figures.tell_line(axis, smooth["x"], smooth["mean"], f"{method}, step")
    axis.set_title(method, loc="left")
    axis.set_xlabel("step")
    axis.locator_params(nbins=5)


# Figure 4: how the scores are distributed at several steps -------------------------------------------


def figure4_data(measured: Measured) -> pd.DataFrame:
    """Densities of the scores at every step with a snapshot: one row per point, with the step's dip test.

    A score is the mean over the seeds of a prompt's answers, so that scores are independent. `density` is a Gaussian
    kernel estimate (Scott's rule); `dip` and its `p` are of Hartigan and Hartigan's test (Annals of Statistics 13,
    1985), whose null hypothesis is one mode; p-values are adjusted over the steps of a method and score (Holm).
    """
    parts = []
    for block in measured.blocks:
        scored = figures.scored(measured, block)
        for (metric, prompts, method), own in scored.groupby(["metric", "prompts", "method"], sort=False):
            parts += [
                figures.placed(block, part.assign(metric=metric, prompts=prompts, method=method))
                for part in _densities(own)
            ]
    return together(parts, _FIGURE4)[_FIGURE4]


_FIGURE4 = [
    "dataset",
    "model",
    "metric",
    "prompts",
    "method",
    "step",
    "score",
    "density",
    "n",
    "dip",
    "p",
    "p_adjusted",
]


def _densities(own: pd.DataFrame) -> Sequence[pd.DataFrame]:
    from diptest import diptest

    from d2o.statistics import holm

    steps = {step: values.groupby("cluster")["value"].mean().to_numpy() for step, values in own.groupby("step")}
    ends = np.concatenate(list(steps.values()))
    margin = 0.2 * np.ptp(ends)
    grid = np.linspace(ends.min() - margin, ends.max() + margin, _POINTS)
    dips = [diptest(scores) if len(scores) > 3 else (np.nan, np.nan) for scores in steps.values()]
    adjusted = holm([p for _, p in dips])
    parts = []
    for (step, scores), (dip, p), corrected in zip(steps.items(), dips, adjusted, strict=True):
        spread = len(scores) > 1 and np.ptp(scores) > 0
        density = stats.gaussian_kde(scores)(grid) if spread else np.full(_POINTS, np.nan)
        parts.append(pd.DataFrame({"step": step, "score": grid, "density": density, "n": len(scores), "dip": dip,
                                   "p": p, "p_adjusted": corrected}))  # fmt: skip
    return parts


def figure4(data: pd.DataFrame, measured: Measured) -> Figure:
    """One panel per score and method: one density per step, later ones darker, with the dip test of each."""
    blocks = figures.by_block(data)
    shown = [list(own.groupby(["metric", "prompts", "method"], sort=False)) for own in blocks.values()]
    figure, parts = figures.grid_of(blocks, shown, 0.35, 2.7)
    colours = figures.colours_of(measured.methods)
    for panels, (_, axes) in zip(shown, parts, strict=True):
        for axis, ((key, prompts, method), own) in zip(axes, panels, strict=True):
            steps = list(own.groupby("step"))
            for place, (step, points) in enumerate(steps):
                p = tables.p_value(points["p_adjusted"].iloc[0])
                label = f"{step}: p {p}" if p else f"{step}"
                shade = 0.25 + 0.75 * (place + 1) / len(steps)
                axis.plot(points["score"], points["density"], color=colours[method], alpha=shade, lw=1.3, label=label)
                figures.tell_line(axis, points["score"], points["density"], f"step {step}, density at")
            figures.titled(axis, measured.metrics[key], method, prompts)
            axis.set_yticks([])
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False, fontsize=7, title="step: dip test", title_fontsize=7)
    return figure


figures.FIGURES |= {
    "figure3": figures.Entry(
        figure3_data,
        figure3,
        "results",
        "Scores against K and against steps, and losses against steps (Figure 3 of the paper)",
        "Bands: 95 % intervals, small dots: the single seeds; of a loss one standard deviation in a moving window, "
        "around its mean in it, thin lines: the single seeds. Per doubling: the slope of the trainings' means on "
        "log2 K, with its 95 % interval over the trainings.",
        lambda measured: "figure3" in measured.experiment.shows and len(figure3_data(measured)) > 0,
        estimates=True,
    ),
    "figure4": figures.Entry(
        figure4_data,
        figure4,
        "results",
        "Densities of the scores at several training steps, by method (Figure 4 of the paper)",
        "Scores of the prompts, the later the step the darker. p: Hartigan's dip test of one mode, adjusted over the "
        "steps; a small one says that there is more than one mode.",
        lambda measured: "figure4" in measured.experiment.shows and len(figure4_data(measured)) > 0,
    ),
}
