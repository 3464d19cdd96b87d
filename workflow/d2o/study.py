"""The study (docs/study.md): what its parts have measured, kept as small files, and the finding on each hypothesis.

A part is an experiment. Its values are kept in a folder of the documents, so that parts may be run on different days
and machines: `values.csv` has one row per metric and prompt, one column per training. The page is written from these
files alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from d2o import metrics, runs, statistics
from d2o.errors import D2OError
from d2o.layout import Layout
from d2o.settings import Experiment, Settings
from d2o.statistics import NOTHING, Estimate, Sample

HARM, USE, GOOD = "reward/harm", "reward/use", "reward/good"
POLITE = "reward/polite"
NEGATIVES, POSITIVES, MARGIN = "human/negative_logprob", "human/positive_logprob", "human/margin"
PROSE, MMLU = "task/plain/bits_per_byte", "task/mmlu/acc"
# Metrics that are kept of a part and shown for its methods: key, heading, decimals; shares in per cent.
SHOWN = {
    HARM: ("harm, %", 1),
    USE: ("use, %", 1),
    GOOD: ("good, %", 1),
    POLITE: ("polite", 2),
    NEGATIVES: ("log-prob of negatives", 3),
    POSITIVES: ("log-prob of positives", 3),
    MARGIN: ("margin", 3),
    "answers/tokens": ("tokens", 1),
    "answers/distinct_2": ("distinct-2", 3),
    "answers/refusal": ("refusals, %", 1),
    PROSE: ("plain prose, bits per byte", 3),
    MMLU: ("MMLU, %", 1),
}
# An adjusted p-value below it decides.
ALPHA = 1 - statistics.LEVEL
# Figures of a part's report that are kept, and what they show.
FIGURES = {
    "course": "what is measured, against the steps of training",
    "figure3": "Figure 3: scores against K and against steps, losses against steps",
    "figure4": "Figure 4: distributions of the scores at several steps",
}
# The results are written between these two lines of the page.
MARKS = "<!-- results: written by `d2o study` -->", "<!-- end of the results -->"

# Parts that were added after results were known. They test no claim.
EXPLORED = ("rate",)

# The parts with human positives, each with the share of these that is harmful.
NOISE = {"noise-0": 0.0, "noise-25": 0.25, "noise-50": 0.5, "noise-75": 0.75, "noise-100": 1.0}


def slope(points: Mapping[str, float]) -> dict[str, float]:
    """Weights of means whose weighted sum is the slope of the least-squares line over the points' x."""
    x = np.array(list(points.values()))
    away = x - x.mean()
    return dict(zip(points, away / (away**2).sum(), strict=True))


def less(one: str, other: str) -> dict[str, float]:
    """The weights of the difference `one` less `other`."""
    return {one: 1.0, other: -1.0}


@dataclass(frozen=True)
class Hypothesis:
    """A claim, and the rule that decides on it.

    Attributes:
        name: its number in the page.
        claim: in words.
        metric: the primary measure, on test prompts.
        weights: the contrast: the weight of each cell's mean; a cell is `part/method`.
        expects: the claim: the contrast is above 0, or below; or, for a single cell, the distribution of its prompts'
            means has one mode, or more (Hartigan's dip test).
    """

    name: str
    claim: str
    metric: str
    weights: Mapping[str, float]
    expects: Literal["above 0", "below 0", "one mode", "more modes"]


_OTHERS = {"dpo": "DPO", "safe-sft": "Safe SFT", "simpo": "SimPO"}
_RIVALS = {"npo": "NPO", "ga": "GA", "unlikelihood": "unlikelihood"}
_D2O = "noise-0/d2o"

HYPOTHESES = (
    *(
        Hypothesis(f"1{letter}", f"{name}: harm rises with the share of harmful positives", HARM,
                   slope({f"{part}/{method}": x for part, x in NOISE.items()}), "above 0")
        for letter, (method, name) in zip("abc", _OTHERS.items(), strict=True)
    ),
    *(
        Hypothesis(f"1{letter}", f"With a quarter of the positives harmful, D2O does less harm than {name}", HARM,
                   less(_D2O, f"noise-25/{method}"), "below 0")
        for letter, (method, name) in zip("def", _OTHERS.items(), strict=True)
    ),
    Hypothesis("2", "D2O: harm falls with each doubling of K", HARM,
               slope({"samples/d2o-k1": 0, "samples/d2o-k2": 1, "samples/d2o": 2, "samples/d2o-k8": 3}), "below 0"),
    Hypothesis("3a", "Self-correction: more good answers than with plain samples", GOOD,
               less("anchors/d2o", "anchors/d2o-plain"), "above 0"),
    Hypothesis("3b", "Samples filtered by the exact scorer: more good answers than with unfiltered ones", GOOD,
               less("anchors/d2o-filtered", "anchors/d2o"), "above 0"),
    Hypothesis("3c", "Written anchors: more good answers than with the model's own samples", GOOD,
               less("anchors/d2o-written", "anchors/d2o"), "above 0"),
    *(
        Hypothesis(f"4{letter}", f"Each at its best rate, D2O gives more good answers than {name}", GOOD,
                   less("rivals/d2o", f"rivals/{method}"), "above 0")
        for letter, (method, name) in zip("abc", _RIVALS.items(), strict=True)
    ),
    *(
        Hypothesis(f"4{letter}", f"After 72 steps, D2O gives more useful answers than {name}", USE,
                   less("lasting/d2o-long", f"lasting/{method}-long"), "above 0")
        for letter, (method, name) in zip("def", _RIVALS.items(), strict=True)
    ),
    *(
        Hypothesis(f"4{letter}", f"After 72 steps, polite answers are likelier under D2O than under {name}",
                   POSITIVES, less("lasting/d2o-long", f"lasting/{method}-long"), "above 0")
        for letter, (method, name) in zip("ghi", _RIVALS.items(), strict=True)
    ),
    Hypothesis("5a", "Distribution level: more good answers than at instance level", GOOD,
               less("variants/d2o", "variants/d2o-instance"), "above 0"),
    Hypothesis("5b", "Moving references: more good answers than with fixed ones", GOOD,
               less("variants/d2o-ema", "variants/d2o"), "above 0"),
    Hypothesis("5c", "Online rounds: more good answers than offline", GOOD,
               less("variants/d2o-online", "variants/d2o"), "above 0"),
    Hypothesis("6a", "D2O: politeness after 72 steps has one mode", POLITE, {"modes/d2o-long": 1.0}, "one mode"),
    Hypothesis("6b", "DPO: politeness after 72 steps has more", POLITE, {"modes/dpo-long": 1.0}, "more modes"),
    Hypothesis("7a", "PKU-SafeRLHF: D2O widens the margin of held-out pairs", MARGIN,
               less("pku/d2o", "pku/initial"), "above 0"),
    Hypothesis("7b", "PKU-SafeRLHF: D2O lowers the log-prob of held-out negatives", NEGATIVES,
               less("pku/d2o", "pku/initial"), "below 0"),
    *(
        Hypothesis(f"7{letter}", f"PKU-SafeRLHF: held-out positives are likelier under D2O than under {name}",
                   POSITIVES, less("pku/d2o", f"pku/{method}"), "above 0")
        for letter, (method, name) in zip("cd", {"npo": "NPO", "ga": "GA"}.items(), strict=True)
    ),
)  # fmt: skip

_BETWEEN = "rate/d2o-between"
_POINTS = {"rate/d2o-k1-between": 0, "samples/d2o-k2": 1, _BETWEEN: 2, "rate/d2o-k8-between": 3}
_SELF_TRAINED = {"d2o": "D2O", "npo": "NPO", "ga": "GA"}
# Contrasts that were looked at after the claims had been tested: description, measure, weights. They test nothing.
LOOKED_AT = (
    *(
        (f"At the middle rate: D2O less {name}", metric, less(_BETWEEN, f"rate/{method}-between"))
        for method, name in {"npo": "NPO", "ga": "GA", "dpo": "DPO"}.items()
        for metric in (HARM, USE, GOOD)
    ),
    *(
        (f"At the middle rate: {name} less the initial model", metric, less(f"rate/{method}-between", "rate/initial"))
        for method, name in (_SELF_TRAINED | {"dpo": "DPO"}).items()
        for metric in (USE, POSITIVES)
    ),
    ("At the middle rate: D2O, with each doubling of K", HARM, slope(_POINTS)),
    *(
        (f"At the middle rate: {name} less D2O", metric, less(f"variants/{method}", _BETWEEN))
        for method, name in {"d2o-instance": "instance level", "d2o-ema": "moving references",
                             "d2o-online": "online rounds"}.items()
        for metric in (HARM, USE, GOOD)
    ),
    *(
        ("At the middle rate: filtered samples less unfiltered ones", metric, less("anchors/d2o-filtered", _BETWEEN))
        for metric in (HARM, USE, GOOD)
    ),
    *(
        (f"Each at its best rate: {name} less the initial model", metric, less(f"rivals/{method}", "rivals/initial"))
        for method, name in (_SELF_TRAINED | {"unlikelihood": "unlikelihood"}).items()
        for metric in (POSITIVES, PROSE)
    ),
    *(
        (f"After 72 steps: {name} less the initial model", metric, less(f"lasting/{method}-long", "lasting/initial"))
        for method, name in (_SELF_TRAINED | {"unlikelihood": "unlikelihood"}).items()
        for metric in (USE, GOOD, PROSE, MMLU)
    ),
    *(
        (f"PKU-SafeRLHF: {name} less the initial model", metric, less(f"pku/{method}", "pku/initial"))
        for method, name in (_SELF_TRAINED | {"dpo": "DPO", "safe-sft": "Safe SFT"}).items()
        for metric in (MARGIN, NEGATIVES, POSITIVES, PROSE)
    ),
)  # fmt: skip


# What a part has measured --------------------------------------------------------------------------


def parts() -> list[str]:
    """The parts in the order in which hypotheses name them, then those without a claim."""
    return [*dict.fromkeys(cell.partition("/")[0] for h in HYPOTHESES for cell in h.weights), *EXPLORED]


def keep(s: Settings, docs: Path) -> None:
    """Write what the parts of a config have measured, one folder per part; a part without a report is skipped.

    Args:
        s: the config.
        docs: the folder of the study's files.
    Raises:
        D2OError: as `metrics.observe`.
    """
    layout = Layout(s.results)
    for part in (name for name in parts() if name in s.experiments):
        report = Path(layout.path("page", experiment=part))
        if not report.exists():
            continue
        only, archive = s.only(part), metrics.Archive(Path(s.results))
        experiment = only.experiment
        pairs = _pairs(experiment)
        values = metrics.together(metrics.observe(archive, only, dataset, model) for dataset, model in pairs)
        tables = {
            "values.csv": wide(values).reset_index(),
            "tuned.csv": trials_of(s, part),
            "time.csv": taken(s, part),
        }
        files = {
            name: table.to_csv(index=False, float_format="%.4g", lineterminator="\n").encode()
            for name, table in tables.items()
            if len(table)
        }
        figures = [report.parent / "figures" / f"{figure}.{kind}" for figure in FIGURES for kind in ("csv", "svg")]
        # The last file replaces the figure's course.csv: it also has the validation prompts.
        for file in (*figures, report.parent / "course.csv"):
            if file.exists():
                files[file.name] = file.read_bytes()
        (docs / part).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (docs / part / name).write_bytes(content)


def wide(values: pd.DataFrame) -> pd.DataFrame:
    """The values of `metrics.observe` on test prompts and questions: one row per metric and prompt, one column per
    training."""
    rows = values[values["metric"].isin(SHOWN) & values["prompts"].isin(["test", ""])]
    rows = rows.assign(
        training=rows["method"] + "/seed" + rows["seed"].astype(str),
        cluster=rows["cluster"].astype(str).where(rows["prompts"] == "", rows["cluster"].astype(str).str[:8]),
    )
    columns = list(dict.fromkeys(rows["training"]))
    return rows.pivot_table("value", ["metric", "cluster"], "training", aggfunc="mean", observed=True)[columns]


def _pairs(experiment: Experiment) -> list[tuple[str, str]]:
    return list(product(experiment.datasets, experiment.models))


def trials_of(s: Settings, part: str) -> pd.DataFrame:
    """The result of each trial of a part's methods on validation prompts, and whether it was chosen."""
    layout, experiment = Layout(s.results), s.experiments[part]
    rows = []
    for (dataset, model), method in product(_pairs(experiment), experiment.methods):
        tuned = Path(layout.path("tuned", dataset=dataset, model=model, method=method))
        if tuned.exists():
            choice = json.loads(tuned.read_text())
            rows += [
                {"method": method, **trial["values"], choice["metric"]: trial["mean"], "prompts": trial["n"]}
                | {"chosen": trial["trial"] == choice["trial"]}
                for trial in choice["trials"]
            ]
    return pd.DataFrame(rows)


def taken(s: Settings, part: str) -> pd.DataFrame:
    """The CPU time of a part's jobs, in minutes by kind; jobs that several parts share count in each of them."""
    layout, experiment = Layout(s.results), s.experiments[part]
    rows = []
    for dataset, model in _pairs(experiment):
        base = Path(layout.path("base", dataset=dataset, model=model))
        folders = [base / "logs"]
        for method in experiment.methods:
            folders += [base / method, *base.glob(f"{method}.trial-*")]
        for file in (file for folder in folders for file in folder.rglob("*.benchmark.tsv")):
            last = pd.read_csv(file, sep="\t", na_values="-").iloc[-1]
            rows.append({"job": re.split(r"[-.]", file.name)[0], "minutes": last["cpu_time"] / 60})
    times = pd.DataFrame(rows, columns=["job", "minutes"]).groupby("job", sort=True)["minutes"]
    return times.agg(jobs="size", cpu_minutes="sum").reset_index()


def read(docs: Path) -> dict[str, pd.DataFrame]:
    """The kept tables, by part.

    Raises:
        D2OError: where a file is no such table.
    """
    tables = {}
    for part in parts():
        file = docs / part / "values.csv"
        if not file.exists():
            continue
        try:
            tables[part] = pd.read_csv(file, dtype={"cluster": str}).set_index(["metric", "cluster"])
        except (KeyError, ValueError) as error:
            raise D2OError(f"{file}: no table of `d2o study` ({error}); delete it and run d2o study again") from None
    return tables


def state(part: str, tables: Mapping[str, pd.DataFrame], configs: Mapping[str, Settings]) -> str:
    """The progress of a part, in words, and which of its trainings failed."""
    s = configs.get(part)
    if part in tables:
        failed = s.experiments[part].failed if s else {}
        return "; ".join(["done", *(f"seed failed: {name}: {why}" for name, why in failed.items())])
    if s is None:
        return "not run yet"
    experiment, layout = s.experiments[part], Layout(s.results)
    trained = [
        Path(layout.path("trained", run.names)).exists()
        for dataset, model in product(experiment.datasets, experiment.models)
        for run in runs.runs(experiment, dataset, model)
        if run.method != "initial"
    ]
    return f"unfinished: {sum(trained)} of {len(trained)} trainings" if any(trained) else "not run yet"


# Findings ------------------------------------------------------------------------------------------


def sample(tables: Mapping[str, pd.DataFrame], cell: str, metric: str) -> Sample | None:
    """The values of a cell; None where there are none."""
    part, _, method = cell.partition("/")
    if part not in tables or metric not in tables[part].index.get_level_values("metric"):
        return None
    table = tables[part].loc[metric]
    own = [column for column in table if column.rpartition("/")[0] == method]
    long = table[own].melt(ignore_index=False, var_name="training").dropna()
    if long.empty:
        return None
    return Sample(long["value"].to_numpy(), long.index.to_numpy(str), seeds=long["training"].to_numpy(str))


def contrast(tables: Mapping[str, pd.DataFrame], metric: str, weights: Mapping[str, float]) -> Estimate:
    """A weighted sum of the means of cells; `NOTHING` where values are missing."""
    terms = [(weight, sample(tables, cell, metric)) for cell, weight in weights.items()]
    return NOTHING if any(own is None for _, own in terms) else statistics.contrast(terms)


def estimate(tables: Mapping[str, pd.DataFrame], h: Hypothesis) -> Estimate:
    """The contrast of a hypothesis, or the dip of its distribution; `NOTHING` where values are missing."""
    if h.expects in ("above 0", "below 0"):
        return contrast(tables, h.metric, h.weights)
    from diptest import diptest

    (cell,) = h.weights
    if not (own := sample(tables, cell, h.metric)):
        return NOTHING
    means = pd.Series(own.values).groupby(own.clusters).mean().to_numpy()
    dip, p = diptest(means)
    return Estimate(dip, np.nan, np.nan, len(means), p)


def finding(expects: str, e: Estimate, p: float) -> str:
    """The finding by the rule, given the p-value adjusted for all hypotheses; empty without an estimate."""
    if e is NOTHING:
        return ""
    if expects == "one mode":
        return "contradicted" if p < ALPHA else "not contradicted"
    if expects == "more modes":
        return "supported" if p < ALPHA else "undecided"
    if not p < ALPHA:
        return "undecided"
    return "supported" if (e.mean > 0) == (expects == "above 0") else "contradicted"


def findings(tables: Mapping[str, pd.DataFrame], hypotheses: Sequence[Hypothesis] = HYPOTHESES) -> pd.DataFrame:
    """Each hypothesis with its estimate, its p-value adjusted for all (Holm), and the finding.

    A hypothesis without data counts as one with p = 1: no later part makes an adjusted p-value larger.
    """
    estimates = [estimate(tables, h) for h in hypotheses]
    adjusted = statistics.holm(pd.Series([e.p for e in estimates]).fillna(1.0))
    return pd.DataFrame(
        {
            "name": h.name,
            "claim": h.claim,
            "metric": h.metric,
            "expects": h.expects,
            "mean": e.mean,
            "low": e.low,
            "high": e.high,
            "n": e.n,
            "p": e.p,
            "p_adjusted": p if e is not NOTHING else np.nan,
            "finding": finding(h.expects, e, p),
        }
        for h, e, p in zip(hypotheses, estimates, adjusted, strict=True)
    )


def looked_at(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The contrasts of `LOOKED_AT` for which there are values."""
    rows = [
        {"what": what, "metric": metric, "mean": e.mean, "low": e.low, "high": e.high, "n": e.n}
        for what, metric, weights in LOOKED_AT
        if (e := contrast(tables, metric, weights)) is not NOTHING
    ]
    return pd.DataFrame(rows, columns=["what", "metric", "mean", "low", "high", "n"])


def against_noise(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Harm of each method at each share of harmful positives: `mean`, `low`, `high`.

    D2O does the same harm at every share, and so does the initial model.
    """
    shown = {"initial": "initial model", **_OTHERS}
    cells = {(name, x): f"{part}/{method}" for part, x in NOISE.items() for method, name in shown.items()}
    cells |= {("D2O", x): _D2O for x in NOISE.values()}
    samples = {place: sample(tables, cell, HARM) for place, cell in cells.items()}
    rows = [
        {"method": method, "share": share, "mean": e.mean, "low": e.low, "high": e.high}
        for (method, share), values in samples.items()
        if values and (e := statistics.mean(values))
    ]
    return pd.DataFrame(rows, columns=["method", "share", "mean", "low", "high"])


def crossings(noise: pd.DataFrame) -> dict[str, str]:
    """For each method known at every share of harmful positives: the share from which on it always does more harm
    than D2O."""
    means = noise.pivot(index="share", columns="method", values="mean")
    if "D2O" not in means:
        return {}
    above = (
        means.drop(columns=["D2O", "initial model"], errors="ignore")
        .dropna(axis="columns")
        .gt(means["D2O"], axis=0)[::-1]
        .cummin()
    )
    return {name: f"{min(column.index[column]):.0%}" if column.any() else "never" for name, column in above.items()}


def best_points(course: pd.DataFrame) -> pd.DataFrame:
    """For each method with snapshots: the step with most good answers to validation prompts, and its test means.

    Args:
        course: the kept `course.csv` of a part.
    """
    good = course[(course["metric"] == GOOD) & (course["prompts"] == "validation")]
    best = good.loc[good.groupby("method", sort=False)["mean"].idxmax()]
    at = course[course["prompts"] == "test"].merge(best[["method", "step"]], on=["method", "step"])
    return at[at["metric"].isin([HARM, USE, GOOD, POSITIVES])]


# The page ------------------------------------------------------------------------------------------


def write_page(configs: Iterable[Settings], docs: Path, page: Path) -> None:
    """Write the results between the page's marks, and `findings.csv` beside the parts.

    Raises:
        D2OError: where the page has no marks; as `read`.
    """
    text = page.read_text()
    pattern = re.compile("(?<=" + re.escape(MARKS[0]) + ").*?(?=" + re.escape(MARKS[1]) + ")", re.DOTALL)
    if not pattern.search(text):
        raise D2OError(f"{page}: the line {MARKS[0]} and below it {MARKS[1]} are missing; put them back")
    tables = read(docs)
    tested = findings(tables)
    docs.mkdir(exist_ok=True)
    tested.to_csv(docs / "findings.csv", index=False, float_format="%.4g", lineterminator="\n")
    if len(noise := against_noise(tables)):
        noise.to_csv(docs / "noise.csv", index=False, float_format="%.4g", lineterminator="\n")
        (docs / "noise.svg").write_bytes(plot(noise))
    if len(looked := looked_at(tables)):
        looked.to_csv(docs / "looked_at.csv", index=False, float_format="%.4g", lineterminator="\n")
    written = results(tables, tested, docs, {part: s for s in configs for part in s.experiments})
    page.write_text(pattern.sub(lambda _: f"\n\n{written}\n\n", text))


def results(
    tables: Mapping[str, pd.DataFrame], tested: pd.DataFrame, docs: Path, configs: Mapping[str, Settings]
) -> str:
    """The section of results, in Markdown."""
    states = {part: state(part, tables, configs) for part in parts()}
    shown = [_row(h, row, tables) for h, row in zip(HYPOTHESES, tested.itertuples(), strict=True)]
    blocks = [
        _markdown(["", "claim", "measure", "estimate", "p, adjusted", "finding"], shown),
        _markdown(
            ["part", "state", "CPU, minutes"],
            [[part, status, _minutes([docs / part])] for part, status in states.items()]
            + [["all, what parts share counted in each", "", _minutes([docs / part for part in states])]],
        ),
    ]
    if len(noise := against_noise(tables)):
        blocks += _noise(noise, docs)
    for part in tables:
        blocks += _part(part, tables, docs)
    if len(looked := looked_at(tables)):
        blocks += _looked_at(looked)
    return "\n\n".join(blocks)


def _minutes(folders: Sequence[Path]) -> str:
    times = [file for folder in folders if (file := folder / "time.csv").exists()]
    return f"{sum(pd.read_csv(file)['cpu_minutes'].sum() for file in times):.0f}" if times else "–"


def _noise(noise: pd.DataFrame, docs: Path) -> list[str]:
    """Hypothesis 1 as a table and a figure."""
    texts = noise.assign(text=[_interval(e, 1, True) for e in noise.itertuples()])
    shown = texts.pivot(index="method", columns="share", values="text").fillna("–")
    crosses = crossings(noise)
    rows = [[method, *cells, crosses.get(method, "–")] for method, *cells in shown.itertuples()]
    return ["### Harm against noise", "Harmful answers, %, by the share of human positives that are harmful.",
            _markdown(["", *(f"{share:.0%}" for share in shown), "stays above D2O from"], rows),
            f"![Harmful answers against the share of harmful positives]({docs.name}/noise.svg)"]  # fmt: skip


def plot(noise: pd.DataFrame) -> bytes:
    """Harm against noise as SVG: one line per method, its 95 % interval as a band."""
    from matplotlib.figure import Figure

    from d2o.report.figures import render

    figure = Figure((6, 3.4), layout="constrained")
    axis = figure.subplots()
    for method, own in noise.groupby("method"):
        if method == "initial model":
            axis.plot(100 * own["share"], 100 * own["mean"], "--", color="grey", lw=1, label=method)
            continue
        axis.fill_between(100 * own["share"], 100 * own["low"], 100 * own["high"], alpha=0.15, lw=0)
        axis.plot(100 * own["share"], 100 * own["mean"], "o-", ms=3.5, label=method)
    axis.set_xlabel("human positives that are harmful, %")
    axis.set_ylabel("harmful answers, %")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return render(figure, "svg")


def _row(h: Hypothesis, row, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    title, digits = SHOWN[h.metric]
    if not row.finding:
        missing = dict.fromkeys(cell.partition("/")[0] for cell in h.weights if not sample(tables, cell, h.metric))
        return [h.name, h.claim, title, "–", "–", f"no data yet: {', '.join(missing)}"]
    estimate = _interval(row, digits, "%" in title)
    p = "< 0.001" if row.p_adjusted < 0.001 else f"{row.p_adjusted:.3f}"
    return [h.name, h.claim, title, estimate, p, f"**{row.finding}**"]


def _part(part: str, tables: Mapping[str, pd.DataFrame], docs: Path) -> list[str]:
    """A part's heading, its table, its best points and figures."""
    table = tables[part]
    known = [key for key in SHOWN if key in table.index.get_level_values("metric")]
    methods = dict.fromkeys(column.rpartition("/")[0] for column in table)
    rows = [[method, *(_mean(tables, f"{part}/{method}", key) for key in known)] for method in methods]
    blocks = [f"### {part}", _markdown(["", *(SHOWN[key][0] for key in known)], rows)]
    if (tuned := docs / part / "tuned.csv").exists():
        blocks += _trials(pd.read_csv(tuned))
    if (course := docs / part / "course.csv").exists():
        best = best_points(pd.read_csv(course))
        texts = [_interval(e, SHOWN[e.metric][1], "%" in SHOWN[e.metric][0]) for e in best.itertuples()]
        points = best.assign(text=texts).pivot(index=["method", "step"], columns="metric", values="text")
        names = ["method", "step", *(SHOWN[key][0] for key in points)]
        blocks += ["The best step of each by good answers to validation prompts:",
                   _markdown(names, points.reset_index().astype(str).values.tolist())]  # fmt: skip
    place = f"{docs.name}/{part}"
    blocks += [f"![{part}, {shown}]({place}/{figure}.svg)" for figure, shown in FIGURES.items()
               if (docs / part / f"{figure}.svg").exists()]  # fmt: skip
    return [*blocks, f"Values: [{place}/values.csv]({place}/values.csv)."]


def _looked_at(looked: pd.DataFrame) -> list[str]:
    """One row per contrast, one column per measure."""
    texts = [_interval(e, SHOWN[e.metric][1], "%" in SHOWN[e.metric][0]) for e in looked.itertuples()]
    shown = looked.assign(text=texts).pivot(index="what", columns="metric", values="text")
    shown = shown.loc[looked["what"].unique(), [key for key in SHOWN if key in shown]].fillna("")
    header = ["", *(SHOWN[key][0] for key in shown)]
    return ["### Looked at afterwards", "Differences of means, without a test and without a correction.",
            _markdown(header, [[what, *cells] for what, *cells in shown.itertuples()])]  # fmt: skip


def _trials(tuned: pd.DataFrame) -> list[str]:
    """One row per method, one column per value that was tried; the chosen one is bold."""
    value, (metric,) = tuned.columns[1], [key for key in tuned if key in SHOWN]
    title, digits = SHOWN[metric]
    scale = 100 if "%" in title else 1
    texts = [
        f"**{_number(scale * mean, digits)}**" if chosen else _number(scale * mean, digits)
        for mean, chosen in tuned[[metric, "chosen"]].itertuples(index=False)
    ]
    shown = (
        tuned.assign(text=texts).pivot(index="method", columns=value, values="text").reindex(tuned["method"].unique())
    )
    rows = [[method, *cells] for method, *cells in shown.fillna("–").itertuples()]
    table = _markdown([value, *(f"{x:g}" for x in shown)], rows)
    return [f"The trials of each method, and what they reached on validation prompts ({title}):", table]


def _mean(tables: Mapping[str, pd.DataFrame], cell: str, metric: str) -> str:
    values, (title, digits) = sample(tables, cell, metric), SHOWN[metric]
    return _interval(statistics.mean(values) if values else NOTHING, digits, "%" in title)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float, digits: int) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def _interval(e: Estimate, digits: int, percent: bool) -> str:
    mean, low, high = (_number(end * (100 if percent else 1), digits) for end in (e.mean, e.low, e.high))
    return mean if np.isnan(e.low) else f"{mean} [{low}, {high}]"
