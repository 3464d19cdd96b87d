"""What is measured: from the tables of a run to values per prompt, with no interval yet."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from d2o import exact, records, texts
from d2o.errors import D2OError
from d2o.settings import Experiment, Reward, Settings
from d2o.statistics import Sample

EXACT = "Exact scorers"
SCORED = "Scorers and judges"
TASKS = "Tasks"
HUMAN = "Held-out human answers under each model"
STYLE = "The answers as such"


@dataclass(frozen=True)
class Metric:
    """A column of the tables.

    Attributes:
        key: its name in table.csv.
        label: its name for readers.
        group: the table that it is shown in.
        prompts: where its prompts come from: `test`, an evaluation file, or `` where there is no prompt.
        better: which values are better; None where that depends on the prompt.
        digits: decimals shown.
        percent: a share, shown in per cent.
        neutral: what the metric is for the initial model by definition, where it compares with that model.
        macro: the mean of the strata's means.
        shown: whether it has a panel in the figure.
    """

    key: str
    label: str
    group: str
    prompts: str = "test"
    better: Literal["higher", "lower"] | None = None
    digits: int = 2
    percent: bool = False
    neutral: float | None = None
    macro: bool = False
    shown: bool = True


@dataclass(frozen=True)
class Run:
    """One model: a method's training with one seed, a snapshot of it after `step` steps, or the initial model."""

    dataset: str
    model: str
    method: str
    seed: int
    step: int | None = None

    @property
    def path(self) -> str:
        """Its folder below the results."""
        folder = f"{self.dataset}/{self.model}/{self.method}/seed{self.seed}"
        return folder if self.step is None else f"{folder}/step{self.step}"


def runs(experiment: Experiment, dataset: str, model: str) -> list[Run]:
    """The runs of an experiment on one data set and model, method by method."""
    return [
        Run(dataset, model, method, seed)
        for method in experiment.methods
        for seed in (experiment.seeds[:1] if method == "initial" else experiment.seeds)
    ]


class Archive:
    """The results folder; remembers what was read, as the report's inputs."""

    def __init__(self, root: Path):
        self._root = root
        self._read: dict[Path, None] = {}

    @property
    def inputs(self) -> list[Path]:
        """The files read so far."""
        return list(self._read)

    def table(self, path: str, schema: pa.Schema) -> Iterator[dict[str, Any]]:
        """The rows of a table; errors as `records.read_table`."""
        for batch in records.read_batches(self._noted(self._root / path), schema):
            yield from batch

    def manifest(self, path: str) -> dict[str, Any]:
        """The manifest of an artifact; errors as `records.read_manifest`."""
        self._noted(records.manifest_path(self._root / path))
        return records.read_manifest(self._root / path)

    def json(self, path: str) -> dict[str, Any]:
        """A JSON file."""
        return json.loads(self._noted(self._root / path).read_text())

    def log(self, path: str) -> list[dict[str, Any]]:
        """The lines of a training log.

        Raises:
            D2OError: where it is missing or a line is not JSON.
        """
        file = self._noted(self._root / path)
        if not file.exists():
            raise D2OError(f"{file}: no such file; it is written by the training of the model beside it")
        rows = []
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise D2OError(f"{file}:{number}: not JSON ({error.msg}); train this run again") from None
        return rows

    def content(self, path: str) -> bytes:
        """A file as it is.

        Raises:
            D2OError: where it is missing.
        """
        file = self._noted(self._root / path)
        if not file.exists():
            raise D2OError(f"{file}: no such file; make it with: snakemake {file}")
        return file.read_bytes()

    def _noted(self, file: Path) -> Path:
        self._read[file] = None
        return file


def logs(archive: Archive, experiment: Experiment, dataset: str, model: str) -> dict[str, list[list[dict]]]:
    """The training logs of each trained method, one a seed; errors as `Archive.log`."""
    found = defaultdict(list)
    for run in runs(experiment, dataset, model):
        if run.method != "initial":
            found[run.method].append(archive.log(f"{run.path}/train.jsonl"))
    return dict(found)


class Observed:
    """Values as they are found; `samples` hands them to the statistics."""

    def __init__(self):
        self._found: dict[Metric, list[tuple[str, float, str]]] = defaultdict(list)

    def add(self, metric: Metric, cluster: str, value: float, stratum: str = "") -> None:
        """One value; `cluster` is what it shares with dependent values: its prompt or question."""
        self._found[metric].append((cluster, float(value), stratum))

    def samples(self) -> dict[Metric, Sample]:
        """The values of each metric as arrays."""
        found = {}
        for metric, rows in self._found.items():
            clusters, values, strata = map(np.array, zip(*rows, strict=True))
            found[metric] = Sample(values, clusters, strata)
        return found


def observe(archive: Archive, settings: Settings, dataset: str, model: str) -> dict[str, dict[Metric, Sample]]:
    """Every metric of every method on one data set and model, the seeds of a method pooled.

    Raises:
        D2OError: where an artifact is missing, or an answer's prompt is not among the prompts.
    """
    (experiment,) = settings.experiments.values()
    origins, human = _prompts(archive, dataset), _held_out(archive, dataset)
    found: dict[str, Observed] = {method: Observed() for method in experiment.methods}
    found_runs = runs(experiment, dataset, model)
    initial = next((_logprobs(archive, run) for run in found_runs if run.method == "initial"), None)
    for run in found_runs:
        seen = found[run.method]
        _scored(seen, archive, settings, run, origins)
        for judge in experiment.judges if run.method != "initial" else []:
            path = f"{run.path}/judge/{judge}.parquet"
            _judged(
                seen, judge, list(archive.table(path, records.VERDICTS)), lambda r, p=path: _origin(origins, r, p)
            )
        for task in experiment.tasks:
            path = f"{run.path}/tasks/{task}.parquet"
            _answered(seen, task, archive.manifest(path), list(archive.table(path, records.QUESTIONS)))
        against = initial if run.method != "initial" else None
        _likely(seen, human, _logprobs(archive, run), against)
        path = f"{run.path}/responses.parquet"
        for row in archive.table(path, records.SAMPLES):
            _written(seen, row, _origin(origins, row, path))
    return {method: seen.samples() for method, seen in found.items()}


def courses(
    archive: Archive, settings: Settings, dataset: str, model: str
) -> dict[str, dict[int, dict[Metric, Sample]]]:
    """By method with snapshots and by step, 0 for the initial model: scores, and log-probs of human answers.

    The seeds of a method are pooled; errors as `observe`.
    """
    (experiment,) = settings.experiments.values()
    origins, human = _prompts(archive, dataset), _held_out(archive, dataset)
    found: dict[str, dict[int, Observed]] = {}
    found_runs = runs(experiment, dataset, model)
    first = [(0, run) for run in found_runs if run.method == "initial"]
    for run in (run for run in found_runs if run.method != "initial"):
        if not (snapshots := settings.train_of(settings.methods[run.method]).snapshots):
            continue
        last = len(archive.log(f"{run.path}/train.jsonl"))
        points = dict([*first, *((step, replace(run, step=step)) for step in sorted(snapshots)), (last, run)])
        for step, point in points.items():
            seen = found.setdefault(run.method, {}).setdefault(step, Observed())
            _scored(seen, archive, settings, point, origins)
            _likely(seen, human, _logprobs(archive, point), None)

    def drawn(metric: Metric) -> bool:
        return metric.group in (EXACT, SCORED) or metric in (_NEGATIVES, _POSITIVES)

    return {
        method: {step: {m: s for m, s in seen.samples().items() if drawn(m)} for step, seen in steps.items()}
        for method, steps in found.items()
    }


def _prompts(archive: Archive, dataset: str) -> dict[str, str]:
    """Where each prompt that was answered comes from."""
    return {r["prompt_id"]: r["origin"] for r in archive.table(f"{dataset}/prompts.parquet", records.PROMPTS)}


def _held_out(archive: Archive, dataset: str) -> list[dict]:
    """The human answers of the test split."""
    rows = archive.table(f"{dataset}/negatives.parquet", records.COMPARISONS)
    return [row for row in rows if row["split"] == "test"]


def _scored(seen: Observed, archive: Archive, settings: Settings, run: Run, origins: Mapping[str, str]) -> None:
    """The scores of a run's answers by every reward model of the experiment."""
    (experiment,) = settings.experiments.values()
    for reward in experiment.rewards:
        path = f"{run.path}/scores/{reward}.parquet"
        for row in archive.table(path, records.SCORES):
            origin = _origin(origins, row, path)
            seen.add(_score(reward, settings.rewards[reward], origin), row["prompt_id"], row["score"])


def _score(name: str, reward: Reward, origin: str) -> Metric:
    rule = reward.rule
    if rule and exact.is_share(rule):
        return Metric(f"reward/{name}", name, EXACT, origin, reward.better, 1, True)
    return Metric(f"reward/{name}", name, EXACT if rule else SCORED, origin, reward.better)


def _origin(origins: Mapping[str, str], row: Mapping[str, Any], path: str) -> str:
    try:
        return origins[row["prompt_id"]]
    except KeyError:
        raise D2OError(
            f"{path}: prompt {row['prompt_id']} is not in prompts.parquet: they were made from different "
            f"prompts; run snakemake again"
        ) from None


def _judged(seen: Observed, judge: str, verdicts: list[dict], origin_of) -> None:
    """Win rate, ties counting half, over both orders; how often the orders disagree, and how often no verdict
    could be read, which the judge's table counts as a tie."""
    by_prompt = defaultdict(list)
    for row in verdicts:
        origin = origin_of(row)
        win = Metric(f"judge/{judge}/win_rate", f"{judge} win rate", SCORED, origin, "higher", 1, True, 0.5)
        seen.add(win, row["prompt_id"], {"method": 1.0, "tie": 0.5, "initial": 0.0}[row["verdict"]])
        by_prompt[row["prompt_id"], origin].append(row)
    for (prompt, origin), both in by_prompt.items():
        share = partial(Metric, group=SCORED, prompts=origin, digits=1, percent=True, shown=False)
        if len(both) == 2:
            metric = share(f"judge/{judge}/disagreement", f"{judge} orders disagree")
            seen.add(metric, prompt, both[0]["verdict"] != both[1]["verdict"])
        for row in both:
            metric = share(f"judge/{judge}/unread", f"{judge} unread")
            seen.add(metric, prompt, row["reason"] in ("unparsable", "refused"))


def _answered(seen: Observed, task: str, facts: Mapping[str, Any], questions: list[dict]) -> None:
    """A task's metric over all questions, which is MMLU's usual figure, and over the means of several subjects."""
    name, percent = facts["metric"], any(word in facts["metric"] for word in _SHARES)
    measured = partial(Metric, group=TASKS, prompts="", better=facts["better"], digits=1 if percent else 3)
    overall = measured(f"task/{task}/{name}", f"{task} {name}", percent=percent)
    by_subject = measured(
        f"task/{task}/{name}_by_subject", f"{task}, mean of subjects", percent=percent, macro=True, shown=False
    )
    several = len({row["subject"] for row in questions}) > 1
    for row in questions:
        for metric in (overall, by_subject) if several else (overall,):
            seen.add(metric, f"{row['subject']}/{row['question']}", row["value"], row["subject"])


# Parts of the names of metrics that are shares of questions.
_SHARES = ("acc", "exact_match")

_NEGATIVES = Metric("human/negative_logprob", "log-prob of negatives", HUMAN, better="lower", digits=3)
_POSITIVES = Metric("human/positive_logprob", "log-prob of positives", HUMAN, better="higher", digits=3)
_SAFE = Metric("human/safe_positive_logprob", "log-prob of safe positives", HUMAN, better="higher", digits=3)
_MARGIN = Metric("human/margin", "margin", HUMAN, better="higher", digits=3)
_IMPLICIT = Metric(
    "human/implicit_accuracy", "implicit accuracy", HUMAN, better="higher", digits=1, percent=True, neutral=0.5
)

HUMAN_METRICS = (_NEGATIVES, _POSITIVES, _SAFE, _MARGIN, _IMPLICIT)

_Logprobs = dict[str, tuple[float, int]]


def _logprobs(archive: Archive, run: Run) -> _Logprobs:
    rows = archive.table(f"{run.path}/likelihoods.parquet", records.LOGPROBS)
    return {row["response_id"]: (row["logprob"], row["tokens"]) for row in rows}


def _likely(seen: Observed, human: list[dict], logprobs: _Logprobs, initial: _Logprobs | None) -> None:
    """Log-probs of held-out human answers, in nats per token; each distinct answer counts once, as does each
    pair. Answers that are too long for the forward pass have no log-prob and are left out."""
    done = set()

    def value(prompt: str, text: str | None) -> tuple[str, float] | None:
        identity = records.response_id(prompt, text) if text is not None else ""
        if identity not in logprobs:
            return None
        logprob, tokens = logprobs[identity]
        return identity, logprob / tokens

    for row in human:
        prompt = row["prompt_id"]
        negative, positive = value(prompt, row["negative"]), value(prompt, row["positive"])
        wanted = [(_NEGATIVES, negative), (_POSITIVES, positive)]
        if row["positive_unsafe"] is False:
            wanted.append((_SAFE, positive))
        for metric, side in wanted:
            if side and (metric, side[0]) not in done:
                done.add((metric, side[0]))
                seen.add(metric, prompt, side[1])
        if negative and positive and (negative[0], positive[0]) not in done:
            done.add((negative[0], positive[0]))
            seen.add(_MARGIN, prompt, positive[1] - negative[1])
            if initial and {negative[0], positive[0]} <= initial.keys():
                up, down = (logprobs[i][0] - initial[i][0] for i in (positive[0], negative[0]))
                seen.add(_IMPLICIT, prompt, up > down)


# What tells whether the answers are still whole.
WHOLE = ("answers/cut", "answers/tokens", "answers/distinct_2")


def _written(seen: Observed, row: Mapping[str, Any], origin: str) -> None:
    prompt, text = row["prompt_id"], row["text"]
    seen.add(Metric("answers/tokens", "length, tokens", STYLE, origin, digits=0), prompt, row["tokens"])
    cut = Metric("answers/cut", "cut by length", STYLE, origin, "lower", 1, True)
    seen.add(cut, prompt, row["finish"] == "length")
    if (value := texts.distinct([text], 2)) is not None:
        seen.add(Metric("answers/distinct_2", "distinct-2", STYLE, origin), prompt, value)
    refusal = Metric("answers/refusal", "refusals", STYLE, origin, digits=1, percent=True)
    seen.add(refusal, prompt, texts.refuses(text))
