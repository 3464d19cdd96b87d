"""The data of a training: the files that it is read from, and the groups of each step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from d2o import chat, dtypes, groups, records, rounds, schemas
from d2o.errors import D2OError
from d2o.groups import Group, Texts
from d2o.settings import Online, TrainStage
from d2o.train import schedule, stored

# Columns of a pool that groups are made of.
_SEEN = ["prompt_id", "sample", "text", "finish", "usable"]


@dataclass(frozen=True)
class Inputs:
    """The files that a training reads.

    Attributes:
        model: folder of the initial model.
        negatives: human answers (`schemas.NEGATIVES`).
        samples: pools of self-generated answers (`schemas.POOL`), none or one.
        scores: scores of the pools' samples (`schemas.SCORES`) where the method filters them, else none.
        reference_logprobs: log-probs under the reference (`schemas.LOGPROBS`); none where the loss needs none, or
            where the references move.
        fresh: the pools of the online rounds sampled so far, in order.
        fresh_logprobs: their log-probs under the reference, in order; none as above.
        tuned: the best trial of a method that is tuned.
    """

    model: Path
    negatives: Path
    samples: Sequence[Path] = ()
    scores: Sequence[Path] = ()
    reference_logprobs: Sequence[Path] = ()
    fresh: Sequence[Path] = ()
    fresh_logprobs: Sequence[Path] = ()
    tuned: Path | None = None

    @property
    def lasting(self) -> list[Path]:
        """The files that exist from the first step on."""
        tables = [self.negatives, *self.samples, *self.scores, *self.reference_logprobs]
        return [self.model / "manifest.json", *tables, *([self.tuned] if self.tuned else [])]

    @property
    def rounds(self) -> list[Path]:
        """The files of the online rounds, in order."""
        if not self.fresh_logprobs:
            return list(self.fresh)
        return [path for both in zip(self.fresh, self.fresh_logprobs, strict=True) for path in both]


class Data:
    """The groups of every step, as online rounds renew them.

    Attributes:
        counts: those of `groups.Tokeniser`, and others, of the groups of the pool.
        groups: those of the pool, in the order that `schedule` permutes.
        probe: the few groups on which the training is monitored.
        total: steps of the whole training.
        until: the step before which the next round has to be sampled, or `total`.
        next: the steps of that round; empty after the last.
        route: the route of the forward pass by which the reference log-probs were computed: in bf16 the log-probs of
            one route agree, however rows are filled, and those of two routes do not.
    """

    def __init__(self, stage: TrainStage, path: Path):
        """
        Args:
            path: made by `prepare`.
        """
        made = records.read_manifest(path)
        self.counts, self.route = made["counts"], made["route"]
        self._rounds, self.probe = stored.read(path, made["rounds"])
        self.groups, self._train, self._seed = self._rounds[0], stage.train, stage.seed
        self.total = schedule.total_steps(stage.train, len(self.groups))
        boundaries = rounds.boundaries(stage.method.online, self.total) if stage.method.online else ()
        self._starts = [0, *boundaries]
        ends = [*boundaries, self.total, self.total]
        self.until = ends[len(self._rounds) - 1]
        self.next = range(self.until, ends[len(self._rounds)])

    def batch(self, step: int) -> list[Group]:
        """The groups of a step; beyond the rounds sampled so far, those of the last one."""
        return self._batch(step, self._round(step))

    def freshness(self, step: int) -> dict[str, float]:
        """Values to log for a step: the share of its positives that is fresh, and the age of its round in steps."""
        now = self._round(step)
        pool, fresh = (
            [response.response_id for group in self._batch(step, which) for response in group.positives]
            for which in (0, now)
        )
        share = sum(old != new for old, new in zip(pool, fresh, strict=True)) / len(fresh)
        return {"fresh_share": share, "fresh_age": step - self._starts[now] if now else 0}

    def _batch(self, step: int, which: int) -> list[Group]:
        order = schedule.step_groups(step, len(self.groups), self._train, self._seed)
        return [self._rounds[which][place] for place in order]

    def _round(self, step: int) -> int:
        begun = sum(start <= step for start in self._starts) - 1
        return min(begun, len(self._rounds) - 1)


def prepare(stage: TrainStage, inputs: Inputs, output: Path) -> None:
    """Write the groups with their reference log-probs into one file, for `Data`.

    Raises:
        D2OError: where there is no group to train on, a response lacks its reference log-prob, a table was made
            by another model or in another precision, or a snapshot lies beyond the last step.
    """
    route = _route(stage, inputs)
    human = records.read_table(inputs.negatives, schemas.NEGATIVES)
    texts = _texts(stage, inputs, human)
    tables, columns = [*inputs.reference_logprobs, *inputs.fresh_logprobs], ["response_id", "logprob", "tokens"]
    known = groups.reference_logprobs(_rows(tables, schemas.LOGPROBS, columns)) if tables else None
    tokenizer = chat.load_tokenizer(inputs.model)
    ours, others = (groups.Tokeniser(tokenizer, stage.forward) for _ in range(2))
    with records.artifact(output, stage) as draft, stored.Writer(draft.path) as file:
        fitting, short = {}, 0
        for place, group in _tokenised(ours, dict(enumerate(texts)), known):
            file.add(0, place, group)
            fitting[place] = texts[place]
            short += len(group.positives) < (stage.method.k or 0)
        counts = _counts(stage, inputs, human, texts, ours.counts, short)
        if marked := counts["broken_up"]:
            print(f"train: {marked:,} texts hold special tokens, which are read as text", file=sys.stderr)
        for number, path in enumerate(inputs.fresh, start=1):
            for place, group in _tokenised(others, _renewed(stage.method.online, fitting, path), known):
                file.add(number, place, group)
        prompts = {text.prompt_id for text in fitting.values()}
        probe = groups.probed(stage.method, human, _pool(stage, inputs), prompts)
        for place, group in _tokenised(others, dict(enumerate(probe)), None):
            file.add(stored.PROBE, place, group)
        draft.facts |= {"counts": counts, "route": route, "rounds": len(inputs.fresh)}


def _texts(stage: TrainStage, inputs: Inputs, human: Sequence[Mapping[str, Any]]) -> list[Texts]:
    """The method's groups before tokenisation, in the order of the data."""
    texts = list(groups.view(stage.method, human, _pool(stage, inputs)))
    if stage.train.group_by == "prompt":
        texts = groups.merged(texts)
    if not texts and stage.method.positives in ("human", "safe-human"):
        raise D2OError(
            f"{inputs.negatives}: {stage.method.loss} needs pairs, and no negative here has a human positive; "
            f"take a method with `positives: self`, such as d2o"
        )
    if not texts and stage.method.positives == "self":
        raise D2OError(
            f"{inputs.samples[0]}: no sample of any train prompt is usable; its data sheet says why: "
            f"shorten positives.exclude, or raise positives.max_tokens or positives.resamples"
        )
    return texts


def _pool(stage: TrainStage, inputs: Inputs) -> Iterator[Mapping[str, Any]]:
    """The samples of the pool that the method sees."""
    pool = _rows(inputs.samples, schemas.POOL, _SEEN)
    for path in inputs.scores:
        pool = groups.best(pool, records.read_table(path, schemas.SCORES), stage.method.filter.best, stage.better)
    return pool


def _rows(paths: Iterable[Path], schema: pa.Schema, columns: list[str]) -> Iterator[dict[str, Any]]:
    return chain.from_iterable(
        batch.to_pylist() for path in paths for batch in records.read_columns(path, schema, columns)
    )


def _tokenised(
    tokeniser: groups.Tokeniser, texts: Mapping[int, Texts], known: groups.ReferenceLogprobs | None
) -> Iterator[tuple[int, Group]]:
    """The groups that fit, by their places; groups of one prompt come one after the other, to share its answers."""
    places = sorted(texts, key=lambda place: texts[place].prompt_id)
    for index, group in tokeniser.groups(texts[place] for place in places):
        if known is not None:
            groups.attach_reference_logprobs(group, known)
        yield places[index], group


def _counts(
    stage: TrainStage,
    inputs: Inputs,
    human: Sequence[Mapping[str, Any]],
    texts: Sequence[Texts],
    counts: Mapping[str, int],
    short: int,
) -> dict[str, int | str]:
    """Counts of the data to train on: `counts` of the groups, and how many prompts lack positives.

    Raises:
        D2OError: where there is no group, or a snapshot lies beyond the last step.
    """
    if not counts["groups"]:
        raise D2OError(
            f"{inputs.negatives}: nothing to train on: {counts['long_prompts']} of {len(texts)} groups have "
            f"prompts longer than forward.max_prompt_tokens ({stage.forward.max_prompt_tokens})"
        )
    total = schedule.total_steps(stage.train, counts["groups"])
    if max(stage.train.snapshots, default=0) > total:
        last = max(stage.train.snapshots)
        raise D2OError(f"train.snapshots: step {last} is beyond the last one, {total}; leave it out")
    more: dict[str, int | str] = {}
    if stage.method.positives != "none":
        asked = {row["prompt_id"] for row in human if row["split"] == "train"}
        more["prompts_without_positive"] = len(asked - {text.prompt_id for text in texts})
    if stage.method.positives == "self":
        more |= {"pool": inputs.samples[0].stem, "short_groups": short}
    return {**counts, **more}


def _route(stage: TrainStage, inputs: Inputs) -> str:
    """The route that the reference log-probs were computed on; `shared` where there are no reference log-probs.

    Raises:
        D2OError: where a table was made by another model or in another precision, or two on different routes.
    """
    tables = [*inputs.reference_logprobs, *inputs.fresh_logprobs]
    model = records.file_digest(inputs.model / "manifest.json")
    for path in (*inputs.samples, *tables):
        if model not in records.read_manifest(path)["inputs"].values():
            raise D2OError(f"{path}: made by another model than {inputs.model}; delete it and run again")
    made = [records.read_manifest(path) for path in tables]
    precision = dtypes.precision(stage.forward.precision)
    for path, manifest in zip(tables, made, strict=True):
        if manifest.get("precision") != precision:
            raise D2OError(
                f"{path}: computed in {manifest.get('precision')}, and this training would run in {precision}: their "
                f"rounding differs; set forward.precision, or delete it and run again on this kind of machine"
            )
    routes = {manifest.get("route") for manifest in made} - {None}
    if len(routes) > 1:
        raise D2OError(
            f"{' and '.join(map(str, tables))}: computed on different routes ({' and '.join(sorted(routes))}), whose "
            f"rounding differs in bf16; delete the older one and run again, or set forward.precision: fp32"
        )
    return routes.pop() if routes else "shared"


def _renewed(online: Online, texts: Mapping[int, Texts], pool: Path) -> dict[int, Texts]:
    """The groups that a round changes, by their places."""
    answers = groups.usable_answers(_rows([pool], schemas.POOL, _SEEN))
    return {
        place: groups.refreshed(text, answers[text.prompt_id], online)
        for place, text in texts.items()
        if text.prompt_id in answers
    }


def write_prompts(data: Data, stage: TrainStage, negatives: Path, output: Path) -> None:
    """Write the rows of `negatives` with the prompts that the next round is sampled for."""
    prompts = {group.prompt_id for step in data.next for group in data.batch(step)}
    rows = records.read_table(negatives, schemas.NEGATIVES)
    with records.artifact(output, stage, [negatives]) as draft:
        chosen = [row for row in rows if row["split"] == "train" and row["prompt_id"] in prompts]
        draft.facts["rows"] = records.write_table(draft.path, schemas.NEGATIVES, chosen)
