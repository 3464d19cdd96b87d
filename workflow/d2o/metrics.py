"""The metrics: from the tables of a run to values per prompt, with no interval yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from d2o import exact, identities, length_control, records, refusals, schemas, texts
from d2o.errors import D2OError
from d2o.layout import Layout, manifest_path
from d2o.runs import Run, runs, seeds, train_of, trained
from d2o.settings import Experiment, Reward, Settings

EXACT = "Exact scorers"
SCORED = "Scorers and judges"
PEOPLE = "Human evaluation"
TASKS = "Tasks"
HUMAN = "Held-out human answers under each model"
STYLE = "The answers as such"

# The worth of each verdict that could be read, for the answer in question: the method's, or the chosen one of a pair.
WINS = {"method": 1.0, "tie": 0.5, "initial": 0.0}
# The verdicts, in words.
_OUTCOMES = {"method": "wins", "tie": "ties", "initial": "losses", "unread": "unread"}

# The columns of a table of values. Values that share a cluster (a prompt, a question) are not independent.
VALUES = ["dataset", "model", "method", "seed", "metric", "prompts", "cluster", "stratum", "value"]


@dataclass(frozen=True)
class Metric:
    """A column of the tables.

    Attributes:
        key: its name in table.csv.
        label: its name for readers.
        group: the table that it is shown in.
        of: computes its values from the rows of a `MeasuredTable`; rows may be left out.
        better: which values are better; None where that depends on the prompt.
        digits: decimals shown.
        percent: whether it is a share, shown in per cent.
        neutral: its value for the initial model by definition, where it compares with that model.
        macro: whether it is the mean of the strata's means.
        shown: whether it has a panel in the figure.
        course: whether it is measured of snapshots as well.
    """

    key: str
    label: str
    group: str
    of: Callable[[pd.DataFrame], pd.Series]
    better: Literal["higher", "lower"] | None = None
    digits: int = 2
    percent: bool = False
    neutral: float | None = None
    macro: bool = False
    shown: bool = True
    course: bool = False


class Archive:
    """Reads the folder of results; remembers which files were read, as the report's inputs.

    An artifact is named as in `layout.PLACES`, with the names that its path is made of.
    """

    def __init__(self, results: Path):
        self._layout = Layout(str(results))
        self._read: dict[Path, None] = {}

    @property
    def inputs(self) -> list[Path]:
        """The files read so far."""
        return list(self._read)

    def path(self, place: str, **names: Any) -> Path:
        """The path of an artifact."""
        return Path(self._layout.path(place, names))

    def table(self, place: str, schema: pa.Schema, **names: Any) -> pd.DataFrame:
        """A table; errors as `records.read_table`."""
        return records.read_frame(self._noted(self.path(place, **names)), schema)

    def manifest(self, place: str, **names: Any) -> dict[str, Any]:
        """The manifest of an artifact; errors as `records.read_manifest`."""
        path = self.path(place, **names)
        self._noted(manifest_path(path))
        return records.read_manifest(path)

    def log(self, run: Run) -> list[dict[str, Any]]:
        """The lines of a run's training log.

        Raises:
            D2OError: as `content`, and where a line is not JSON.
        """
        file, rows = self.path("train_log", **run.names), []
        for number, line in enumerate(self.content("train_log", **run.names).splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise D2OError(f"{file}:{number}: not JSON ({texts.line(error)}); train this run again") from None
        return rows

    def content(self, place: str, **names: Any) -> bytes:
        """The bytes of a file.

        Raises:
            D2OError: where it is missing, or differs from its manifest, if it has one.
        """
        file = self._noted(self.path(place, **names))
        if not file.exists():
            raise D2OError(f"{file}: no such file; make it with: snakemake {file}")
        if manifest_path(file).exists():
            records.check_file(file)
        return file.read_bytes()

    def _noted(self, file: Path) -> Path:
        self._read[file] = None
        return file


def logs(archive: Archive, experiment: Experiment, dataset: str, model: str) -> pd.DataFrame:
    """The training logs of each run, one row per step, with `method` and `seed`; errors as `Archive.log`."""
    trainings = [run for run in runs(experiment, dataset, model) if run.method != "initial"]
    rows = [{"method": run.method, "seed": run.seed} | row for run in trainings for row in archive.log(run)]
    return pd.DataFrame(rows).reindex(columns=["method", "seed", "step", "epoch", *LOGGED, *SPENT])


def trials(archive: Archive, settings: Settings, dataset: str, model: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The trials of each tuned method, one row per trial as the stage `tune` writes it, and their training logs."""
    experiment = settings.experiment
    tuned = [method for method in trained(experiment) if settings.methods[method].tune]
    tuned = [method for method in tuned if seeds(experiment, method)]
    rows, logs = [], []
    for method in tuned:
        choice = json.loads(archive.content("tuned", dataset=dataset, model=model, method=method))
        for trial in choice["trials"]:
            values = ", ".join(f"{key} {value}" for key, value in trial["values"].items())
            chosen = trial["trial"] == choice["trial"]
            rows.append(trial | {"method": method, "values": values, "metric": choice["metric"], "chosen": chosen})
            run = Run(dataset, model, trial["trial"], settings.tuning.seed)
            logs += [{"method": method, "trial": trial["trial"]} | row for row in archive.log(run)]
    columns = ["method", "trial", "values", "metric", "mean", "low", "high", "n", "chosen"]
    return pd.DataFrame(rows, columns=columns), pd.DataFrame(logs).reindex(
        columns=["method", "trial", "step", *LOGGED]
    )


LOGGED = ["loss", "margin", "positive_shift", "negative_shift"]
SPENT = ["seconds", "tokens_per_second", "memory_gb"]


@dataclass(frozen=True)
class Context:
    """The data that the tables of every run on one data set and model are joined with.

    Attributes:
        origins: the origin of each prompt that was answered, by prompt.
        human: the human answers that are held out; `negative_id`, `positive_id` and, of safe positives, `safe_id`
            are their response ids.
        initial: log-probs under the initial model by response; empty where it is not among the methods.
        leaked: the questions of each task that occur in train prompts, as clusters.
    """

    origins: pd.Series
    human: pd.DataFrame
    initial: pd.Series
    leaked: Mapping[str, pd.Series]


@dataclass(frozen=True)
class MeasuredTable:
    """A table of a run, and the metrics that are computed from it.

    Attributes:
        place: the artifact, as in `layout.PLACES`.
        names: the names in its path that are not the run's.
        rows: makes rows with `cluster`, `prompts` (their origin) and `stratum` from the table, the context and the
            table's path.
    """

    place: str
    names: Mapping[str, str]
    schema: pa.Schema
    rows: Callable[[pd.DataFrame, Context, Path], pd.DataFrame]
    metrics: Sequence[Metric]


def sources(
    archive: Archive, experiment: Experiment, entries: Mapping[str, Reward], complete: bool = True
) -> list[MeasuredTable]:
    """The tables of each run of an experiment; the initial model and snapshots have fewer.

    Args:
        entries: the config's `rewards`.
        complete: whether of the end of a training.
    """
    scores, *others = _of_answers(experiment, entries, complete)
    judges = experiment.judges if complete else []
    return [
        *scores,
        *(MeasuredTable("verdicts", {"judge": name}, schemas.VERDICTS, _answers, _judged(name)) for name in judges),
        *(
            MeasuredTable(
                "task_values",
                {"task": name},
                schemas.TASK_VALUES,
                partial(_questions, name),
                _answered(name, _facts(archive, experiment, name)),
            )
            for name in experiment.tasks
        ),
        *others,
    ]


def _of_answers(
    experiment: Experiment, entries: Mapping[str, Reward], complete: bool
) -> tuple[list[MeasuredTable], MeasuredTable, MeasuredTable]:
    """The scores of an experiment's answers, the log-probs of human ones, and the answers as such."""
    scorers = {name: _scored(name, entries[name]) for name in experiment.rewards}
    human = [metric for metric in HUMAN_METRICS if complete or metric.neutral is None]
    return (
        [
            MeasuredTable("scores", {"reward": name}, schemas.SCORES, _answers, metrics)
            for name, metrics in scorers.items()
        ],
        MeasuredTable("heldout_logprobs", {}, schemas.LOGPROBS, _likely, human),
        MeasuredTable("responses", {}, schemas.SAMPLES, _answers, STYLE_METRICS),
    )


def declared(archive: Archive, settings: Settings) -> dict[str, Metric]:
    """Every metric of an experiment by its key, in reading order."""
    experiment = settings.experiment
    tables = sources(archive, experiment, settings.rewards)
    people = PEOPLE_METRICS if experiment.human_eval else ()
    return {metric.key: metric for metric in (*(m for source in tables for m in source.metrics), *people)}


def observe(archive: Archive, settings: Settings, dataset: str, model: str) -> pd.DataFrame:
    """The values of every metric of every run on one data set and model: columns `VALUES`.

    Raises:
        D2OError: where an artifact is missing, or an answer's prompt is not among the prompts.
    """
    ((name, experiment),) = settings.experiments.items()
    context = _context(archive, experiment, dataset, model)
    values = [
        _values(archive, run, source, context)
        for run in runs(experiment, dataset, model)
        for source in sources(archive, experiment, settings.rewards, run.method != "initial")
    ]
    if experiment.human_eval:
        table = archive.table("human_verdicts", schemas.HUMAN_VERDICTS, experiment=name)
        rows = table[table["dataset"].eq(dataset) & table["model"].eq(model)]
        rows = _answers(rows, context, archive.path("human_verdicts", experiment=name))
        values += [
            rows.loc[value.index].assign(metric=metric.key, value=value)[VALUES]
            for metric in PEOPLE_METRICS
            for value in [metric.of(rows)]
        ]
    return together(values)


def single(archive: Archive, experiment: Experiment, entries: Mapping[str, Reward], key: str) -> pd.DataFrame:
    """The values of one metric of answers of every run of an experiment of trained models: columns `VALUES`.

    Args:
        entries: the config's `rewards`.
    Raises:
        D2OError: as `observe`, and where there is no such metric, it has no better direction, or it compares with the
            initial model.
    """
    scores, *others = _of_answers(experiment, entries, complete=True)
    choosable = [(s, m) for s in (*scores, *others) for m in s.metrics if m.key == key and m.better]
    if not choosable or choosable[0][1].neutral is not None:
        raise D2OError(f"{key}: no metric of trained models by themselves that says which values are better")
    [(source, metric)] = choosable
    source = replace(source, metrics=[metric])
    return together(
        _values(archive, run, source, context).assign(better=metric.better)
        for dataset, model in product(experiment.datasets, experiment.models)
        for context in [_context(archive, experiment, dataset, model)]
        for run in runs(experiment, dataset, model)
    )


def course(
    archive: Archive, settings: Settings, values: pd.DataFrame, logs: pd.DataFrame, dataset: str, model: str
) -> pd.DataFrame:
    """The values at every step of the runs with snapshots, 0 being the initial model: columns `VALUES` and `step`.

    Args:
        values: as from `observe`; the first and the last step are taken from it.
        logs: as from `logs`.
    Raises:
        D2OError: as `observe`.
    """
    experiment = settings.experiment
    context = _context(archive, experiment, dataset, model)
    followed = [
        replace(s, metrics=[m for m in s.metrics if m.course])
        for s in sources(archive, experiment, settings.rewards, complete=False)
    ]
    followed = [source for source in followed if source.metrics]
    values = values[values["metric"].isin([metric.key for source in followed for metric in source.metrics])]
    tables = []
    for run in runs(experiment, dataset, model):
        snapshots = run.method != "initial" and train_of(settings, settings.methods[run.method]).snapshots
        if not snapshots:
            continue
        last = int((logs["method"].eq(run.method) & logs["seed"].eq(run.seed)).sum())
        points = {0: values[values["method"] == "initial"]}
        for step in sorted(set(snapshots) - {last}):
            points[step] = together(_values(archive, replace(run, step=step), s, context) for s in followed)
        points[last] = values[values["method"].eq(run.method) & values["seed"].eq(run.seed)]
        tables += [rows.assign(method=run.method, seed=run.seed, step=step) for step, rows in points.items()]
    return together(tables, [*VALUES, "step"])


def together(tables: Iterable[pd.DataFrame], columns: Sequence[str] = VALUES) -> pd.DataFrame:
    """Concatenate tables, the empty ones left out."""
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=columns)


def _values(archive: Archive, run: Run, source: MeasuredTable, context: Context) -> pd.DataFrame:
    names = run.names | source.names
    table = archive.table(source.place, source.schema, **names)
    rows = source.rows(table, context, archive.path(source.place, **names))
    place = {"dataset": run.dataset, "model": run.model, "method": run.method, "seed": run.seed}
    values = {metric.key: metric.of(rows).astype(float) for metric in source.metrics}
    return together(
        rows.loc[value.index].assign(**place, metric=key, value=value)[VALUES] for key, value in values.items()
    )


def _context(archive: Archive, experiment: Experiment, dataset: str, model: str) -> Context:
    prompts = archive.table("prompts", schemas.PROMPTS, dataset=dataset)
    human = archive.table("negatives", schemas.NEGATIVES, dataset=dataset)
    human = human[human["split"] != "train"].reset_index(drop=True)
    for answer in ("negative", "positive"):
        pairs = zip(human["prompt_id"], human[answer], strict=True)
        human[f"{answer}_id"] = [
            None if text is None else identities.response_id(prompt, text) for prompt, text in pairs
        ]
    human["safe_id"] = human["positive_id"].where(human["positive_unsafe"].eq(False))
    initial = pd.Series(dtype=float)
    for run in runs(experiment, dataset, model):
        if run.method == "initial":
            initial = _by_response(archive.table("heldout_logprobs", schemas.LOGPROBS, **run.names))["logprob"]
    leaked = {
        task: _numbered(archive.table("leaks", schemas.LEAKS, dataset=dataset, task=task))
        for task in experiment.tasks
    }
    return Context(prompts.set_index("prompt_id")["origin"], human, initial, leaked)


def _answers(table: pd.DataFrame, context: Context, path: Path) -> pd.DataFrame:
    """Rows about answers, each with its prompt."""
    prompts = table["prompt_id"].map(context.origins)
    for unknown in table["prompt_id"][prompts.isna()][:1]:
        raise D2OError(
            f"{path}: prompt {unknown} is not in prompts.parquet: they were made from different prompts; run "
            f"snakemake again"
        )
    return table.assign(cluster=table["prompt_id"], prompts=prompts, stratum="")


def _scored(name: str, reward: Reward) -> list[Metric]:
    """The score, and the share of safe answers where the scorer has a threshold."""
    rule, key, values = reward.rule, f"reward/{name}", itemgetter("score")
    if rule and exact.is_share(rule):
        return [Metric(key, name, EXACT, values, reward.better, 1, True, course=True)]
    metrics = [Metric(key, name, EXACT if rule else SCORED, values, reward.better, course=True)]
    if reward.safe_at is not None:
        safe = pd.Series.ge if reward.better == "higher" else pd.Series.le
        metrics.append(
            Metric(
                f"{key}/safe", f"{name}, safe", SCORED, lambda r: safe(r["score"], reward.safe_at), "higher", 1, True
            )
        )
    return metrics


def _judged(judge: str) -> list[Metric]:
    """Win rates over the verdicts of both orders that could be read; outcomes over all verdicts; how often the orders
    disagree."""
    key, share = f"judge/{judge}", partial(Metric, group=SCORED, digits=1, percent=True)
    rate = partial(share, better="higher", neutral=0.5)
    return [
        rate(f"{key}/win_rate", f"{judge} win rate", of=_wins),
        rate(f"{key}/length_controlled", f"{judge} win rate, length-controlled", of=_length_controlled),
        rate(
            f"{key}/decided",
            f"{judge} win rate without ties",
            of=lambda r: _wins(r[r["verdict"] != "tie"]),
            shown=False,
        ),
        *(
            share(f"{key}/{name}", f"{judge} {name}", of=lambda r, v=verdict: r["verdict"] == v, shown=False)
            for verdict, name in _OUTCOMES.items()
        ),
        share(f"{key}/disagreement", f"{judge} orders disagree", of=_disagree, shown=False),
    ]


def _wins(rows: pd.DataFrame) -> pd.Series:
    """1, 0, or 0.5 for a tie, of each verdict that could be read."""
    return rows["verdict"].map(WINS).dropna()


def _length_controlled(rows: pd.DataFrame) -> pd.Series:
    """Values whose mean is the win rate at equal length; one fit per origin of the prompts."""
    wins = _wins(rows)
    controlled = pd.Series(0.0, wins.index)
    for _, part in rows.loc[wins.index].groupby("prompts"):
        values = length_control.values(wins[part.index].to_numpy(), part["longer"].to_numpy(float))
        controlled[part.index] = values
    return controlled


def _disagree(rows: pd.DataFrame) -> pd.Series:
    """Whether the two verdicts on a prompt differ, in the row of the first; no value where only one could be read."""
    rows = rows[rows["verdict"].isin(WINS)]
    verdicts = rows.groupby("prompt_id")["verdict"]
    return verdicts.transform("nunique").gt(1)[verdicts.transform("size").eq(2) & ~rows.duplicated("prompt_id")]


def _by_people(question: str) -> list[Metric]:
    """Win rate and outcomes by annotators; where several judged a pair, its value is their mean."""
    share = partial(Metric, group=PEOPLE, digits=1, percent=True)

    def of(worth: Mapping[str, float]) -> Callable[[pd.DataFrame], pd.Series]:
        return lambda rows: _each_pair(rows[rows["question"] == question], worth)

    key = f"human_eval/{question}"
    return [
        share(f"{key}/win_rate", f"people: {question}, win rate", of=of(WINS), better="higher", neutral=0.5),
        *(
            share(
                f"{key}/{_OUTCOMES[verdict]}",
                f"people: {question}, {_OUTCOMES[verdict]}",
                of=of({other: float(other == verdict) for other in WINS}),
                shown=False,
            )
            for verdict in WINS
        ),
    ]


def _each_pair(rows: pd.DataFrame, worth: Mapping[str, float]) -> pd.Series:
    """The mean worth of the verdicts on each pair of answers, in the row of the first."""
    pair = ["method", "seed", "prompt_id"]
    means = rows.assign(worth=rows["verdict"].map(worth)).groupby(pair)["worth"].transform("mean")
    return means[~rows.duplicated(pair)].astype(float)


def _questions(task: str, table: pd.DataFrame, context: Context, path: Path) -> pd.DataFrame:
    """Rows about a task's questions, except those that occur in train prompts."""
    rows = table.assign(cluster=_numbered(table), prompts="", stratum=table["subject"])
    return rows[~rows["cluster"].isin(context.leaked[task])]


def _numbered(table: pd.DataFrame) -> pd.Series:
    """The question of each row, as a cluster."""
    return table["subject"] + "/" + table["question"].astype(str)


def _facts(archive: Archive, experiment: Experiment, task: str) -> dict[str, Any]:
    """The manifest of one run's answers to a task: the metric is the same for all runs."""
    run = runs(experiment, experiment.datasets[0], experiment.models[0])[0]
    return archive.manifest("task_values", task=task, **run.names)


# Parts of the names of metrics that are shares of questions.
_SHARES = ("acc", "exact_match")


def _answered(task: str, facts: Mapping[str, Any]) -> list[Metric]:
    """A task's own metric: the mean over questions, as usual for MMLU, and over the means of several subjects."""
    name = facts["metric"]
    percent = any(part in name for part in _SHARES)
    mean = partial(
        Metric,
        group=TASKS,
        of=itemgetter("value"),
        better=facts["better"],
        digits=1 if percent else 3,
        percent=percent,
    )
    metrics = [mean(f"task/{task}/{name}", f"{task} {name}", course=True)]
    if len(facts["subjects"]) > 1:
        metrics.append(mean(f"task/{task}/{name}_by_subject", f"{task}, mean of subjects", macro=True, shown=False))
    return metrics


def _likely(table: pd.DataFrame, context: Context, path: Path) -> pd.DataFrame:
    """Held-out human answers, each with its log-prob and its log-ratio to the initial model, in nats per token.

    Answers that are too long for the forward pass have no log-prob; their response id is left out.
    """
    logprobs = _by_response(table)
    rows = context.human.assign(cluster=context.human["prompt_id"], prompts=context.human["split"], stratum="")
    rows["compared"] = rows[["negative_id", "positive_id"]].isin(context.initial.index).all(axis=1)
    for answer in ("negative", "positive", "safe"):
        identity = rows[f"{answer}_id"]
        rows[answer] = identity.map(logprobs["logprob"] / logprobs["tokens"])
        rows[f"{answer}_gain"] = (identity.map(logprobs["logprob"]) - identity.map(context.initial)) / identity.map(
            logprobs["tokens"]
        )
        rows[f"{answer}_id"] = identity.where(identity.isin(logprobs.index))
    return rows


def _by_response(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop_duplicates("response_id", keep="last").set_index("response_id")


def _once(rows: pd.DataFrame, *answers: str) -> pd.DataFrame:
    """The rows with a log-prob of all of `answers`, each answer, or pair of answers, once."""
    ids = [f"{answer}_id" for answer in answers]
    return rows.dropna(subset=ids).drop_duplicates(ids)


def _each(answer: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda rows: _once(rows, answer)[answer]


def _refused(kind: refusals.Kind) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda answers: answers["text"].map(refusals.kind) == kind


def _margin(rows: pd.DataFrame) -> pd.Series:
    pairs = _once(rows, "negative", "positive")
    return pairs["positive"] - pairs["negative"]


def _implicit(rows: pd.DataFrame) -> pd.Series:
    """Whether the positive's log-ratio per token is above the negative's; one half where they are equal.

    Sums would measure length: where every token loses alike, the longer answer of a pair loses more.
    """
    pairs = _once(rows[rows["compared"]], "negative", "positive")
    lead = (pairs["positive_gain"] - pairs["negative_gain"]).round(9)  # 1e-9 nats and less come from rounding
    return (np.sign(lead) + 1) / 2


def _distinct(text: str) -> float | None:
    return texts.distinct([text], 2)


HUMAN_METRICS = (
    Metric("human/negative_logprob", "log-prob of negatives", HUMAN, _each("negative"), "lower", 3, course=True),
    Metric("human/positive_logprob", "log-prob of positives", HUMAN, _each("positive"), "higher", 3, course=True),
    Metric("human/safe_positive_logprob", "log-prob of safe positives", HUMAN, _each("safe"), "higher", 3),
    Metric("human/margin", "margin", HUMAN, _margin, "higher", 3),
    Metric("human/implicit_accuracy", "implicit accuracy", HUMAN, _implicit, "higher", 1, True, 0.5),
)
STYLE_METRICS = (
    Metric("answers/tokens", "length, tokens", STYLE, itemgetter("tokens"), digits=0, course=True),
    Metric("answers/cut", "cut by length", STYLE, lambda r: r["finish"] == "length", "lower", 1, True),
    Metric("answers/distinct_2", "distinct-2", STYLE, lambda r: r["text"].map(_distinct).dropna(), course=True),
    Metric("answers/refusal", "refusals", STYLE, lambda r: r["text"].map(refusals.refuses), None, 1, True),
    Metric("answers/full_refusal", "full refusals", STYLE, _refused("full"), None, 1, True),
    Metric("answers/partial_refusal", "partial refusals", STYLE, _refused("partial"), None, 1, True),
)
PEOPLE_METRICS = [metric for question in schemas.HUMAN_QUESTIONS for metric in _by_people(question)]
# Metrics that trials can be chosen by, beside those of scorers.
CHOOSABLE = [m.key for m in (*HUMAN_METRICS, *STYLE_METRICS) if m.better and m.neutral is None]
# Metrics that show whether the answers are still whole.
WHOLE = ("answers/cut", "answers/tokens", "answers/distinct_2")
