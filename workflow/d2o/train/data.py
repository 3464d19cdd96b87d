"""The data of a training: what it is read from, and which groups each step sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2o import chat, dtypes, groups, records, rounds, schemas
from d2o.errors import D2OError
from d2o.groups import Group
from d2o.settings import Online, TrainStage
from d2o.train import schedule


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
        fresh: the pools of the online rounds sampled by now, in order.
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
        """The files that are there from the first step on."""
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
        groups: those of the pool, in the order that `schedule` permutes.
        probe: the few that the training is watched by.
        total: steps of the whole training.
        until: the step before which the next round has to be sampled, or `total`.
        next: the steps of that round; empty after the last.
        route: of the forward pass, the one that the tables of references were computed on: in bf16 the log-probs of
            one route agree, however rows are filled, and those of two do not.
    """

    def __init__(self, by_round: Sequence[Sequence[Group]], probe: Sequence[Group], stage: TrainStage, route: str):
        """
        Args:
            by_round: the groups of the pool, and for each round sampled by now the same ones, some with fresh
                positives.
            probe, route: as the attributes.
        Raises:
            D2OError: where a snapshot lies beyond the last step.
        """
        self.groups, self._rounds, self._train, self._seed = by_round[0], by_round, stage.train, stage.seed
        self.probe, self.route = probe, route
        self.total = schedule.total_steps(stage.train, len(self.groups))
        if max(stage.train.snapshots, default=0) > self.total:
            last = max(stage.train.snapshots)
            raise D2OError(f"train.snapshots: step {last} is beyond the last one, {self.total}; leave it out")
        boundaries = rounds.boundaries(stage.method.online, self.total) if stage.method.online else ()
        self._starts = [0, *boundaries]
        ends = [*boundaries, self.total, self.total]
        self.until = ends[len(by_round) - 1]
        self.next = range(self.until, ends[len(by_round)])

    def batch(self, step: int) -> list[Group]:
        """The groups of a step; beyond the rounds sampled by now those of the last one."""
        return self._batch(step, self._round(step))

    def freshness(self, step: int) -> dict[str, float]:
        """What to log of a step: the share of its positives that is fresh, and its age in steps."""
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


def read(stage: TrainStage, inputs: Inputs) -> tuple[Data, dict[str, int | str]]:
    """The groups with their references, and counts of those of the pool.

    The counts are those of `groups.tokenise`, and how many groups have fewer than K positives (`short_groups`).

    Raises:
        D2OError: where there is no group to train on, a response lacks its reference, a table was made by another
            model or in another precision, or a snapshot lies beyond the last step.
    """
    tokenizer = chat.load_tokenizer(inputs.model)
    human = records.read_table(inputs.negatives, schemas.NEGATIVES)
    pool = [row for path in inputs.samples for row in records.read_table(path, schemas.POOL)]
    for path in inputs.scores:
        scores = records.read_table(path, schemas.SCORES)
        pool = list(groups.best(pool, scores, stage.method.filter.best, stage.better))
    texts = list(groups.view(stage.method, human, pool))
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
    base, counts = groups.tokenise(texts, tokenizer, stage.forward)
    if not base:
        raise D2OError(
            f"{inputs.negatives}: nothing to train on: {counts['long_prompts']} of {len(texts)} groups have "
            f"prompts longer than forward.max_prompt_tokens ({stage.forward.max_prompt_tokens})"
        )
    if stage.method.positives != "none":
        asked = {row["prompt_id"] for row in human if row["split"] == "train"}
        counts["prompts_without_positive"] = len(asked - {text.prompt_id for text in texts})
    if stage.method.positives == "self":
        counts["pool"] = inputs.samples[0].stem
        counts["short_groups"] = sum(len(group.positives) < (stage.method.k or 0) for group in base)
    fitting = {group.prompt_id for group in base}
    texts = [text for text in texts if text.prompt_id in fitting]
    probe, _ = groups.tokenise(groups.probed(stage.method, human, pool, fitting), tokenizer, stage.forward)
    by_round = [base]
    for path in inputs.fresh:
        renewed = _renewed(stage.method.online, texts, path)
        tokenised, _ = groups.tokenise(renewed.values(), tokenizer, stage.forward)
        in_place = dict(zip(renewed, tokenised, strict=True))
        by_round.append([in_place.get(place, group) for place, group in enumerate(base)])

    tables = (*inputs.reference_logprobs, *inputs.fresh_logprobs)
    for path in (*inputs.samples, *tables):
        if records.file_digest(inputs.model / "manifest.json") not in records.read_manifest(path)["inputs"].values():
            raise D2OError(f"{path}: made by another model than {inputs.model}; delete it and run again")
    made = [records.read_manifest(path) for path in tables]
    precision = dtypes.precision(stage.forward.precision)
    for path, manifest in zip(tables, made, strict=True):
        if manifest.get("precision") != precision:
            raise D2OError(
                f"{path}: computed in {manifest.get('precision')}, and this training would run in {precision}: their "
                f"rounding differs; set forward.precision, or delete it and run again on this kind of machine"
            )
    if tables:
        rows = [row for path in tables for row in records.read_table(path, schemas.LOGPROBS)]
        groups.attach_references((group for part in by_round for group in part), rows)
    routes = {manifest.get("route") for manifest in made} - {None}
    if len(routes) > 1:
        raise D2OError(
            f"{' and '.join(map(str, tables))}: computed on different routes ({' and '.join(sorted(routes))}), whose "
            f"rounding differs in bf16; delete the older one and run again, or set forward.precision: fp32"
        )
    return Data(by_round, probe, stage, routes.pop() if routes else "shared"), counts


def _renewed(online: Online, texts: Sequence[groups.Texts], pool: Path) -> dict[int, groups.Texts]:
    """The groups that a round changes, by their places."""
    answers = groups.usable_answers(records.read_table(pool, schemas.POOL))
    return {
        place: groups.refreshed(text, answers[text.prompt_id], online)
        for place, text in enumerate(texts)
        if text.prompt_id in answers
    }


def write_prompts(data: Data, stage: TrainStage, negatives: Path, output: Path) -> None:
    """The rows of `negatives` whose prompts the next round asks: what it is sampled for."""
    prompts = {group.prompt_id for step in data.next for group in data.batch(step)}
    rows = records.read_table(negatives, schemas.NEGATIVES)
    with records.artifact(output, stage, [negatives]) as draft:
        chosen = [row for row in rows if row["split"] == "train" and row["prompt_id"] in prompts]
        draft.facts["rows"] = records.write_table(draft.path, schemas.NEGATIVES, chosen)
