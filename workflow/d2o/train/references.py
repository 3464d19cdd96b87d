"""The references that no table can hold.

Those of `ema` are moving averages of the policy, so their log-probs change during the training. Those of KTO's zero
point are log-probs of mismatched pairs, which exist only once the groups are in order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from d2o import checksums, records
from d2o.errors import D2OError
from d2o.groups import Group, Response, packs
from d2o.settings import MovingAverages
from d2o.train.engine import TrainingEngine


class MovingReferences:
    """r− for the positives and r+ for the negatives, each a moving average of the policy (arXiv 2403.03419).

    Each is kept in float32 on the shards of the weights that DeepSpeed gives this rank, so an update is local. To
    compute log-probs under one, its shards are swapped with the policy's for that time: no second model is held. (In
    bf16, an average would not change by steps that are smaller than its rounding.)

    A window is the steps between two updates, in which a reference does not change. The order of the data is known,
    so one sweep at the window's start computes the log-probs of the responses of all its steps, and no others.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        settings: MovingAverages,
        batch: Callable[[int], list[Group]],
        total: int,
        tokens: int,
    ):
        """
        Args:
            batch: the groups of a step.
            total: steps of the training.
            tokens: tokens in one forward pass.
        """
        self._engine, self._batch, self._total, self._tokens = engine, batch, total, tokens
        self._averages = {"positives": settings.positives, "negatives": settings.negatives}
        self._shards = {side: [shard.detach().clone() for shard in engine.shards()] for side in self._averages}
        self._computed: dict[str, int] = {}
        self._logprobs: dict[str, dict[int, list[float]]] = {}

    def state(self) -> dict[str, list[Tensor]]:
        """Both references' shards, for a checkpoint."""
        return self._shards

    def restore(self, state: dict[str, list[Tensor]]) -> None:
        """Use the shards of a checkpoint."""
        self._shards = state

    def refresh(self, step: int, members: Sequence[Group]) -> None:
        """Before a step: update the references whose window begins here, and fill in their log-probs.

        After a resume in the middle of a window, the whole window is computed again, to the same numbers.

        Args:
            step: steps done.
            members: the groups of the step.
        """
        for side, average in self._averages.items():
            start = step - step % average.every
            if step == start and step > 0:
                for mine, theirs in zip(self._shards[side], self._engine.shards(), strict=True):
                    mine.lerp_(theirs.detach(), 1 - average.decay)
            if self._computed.get(side) != start:
                self._computed[side] = start
                self._logprobs[side] = self._compute(side, range(start, min(start + average.every, self._total)))
            for group in members:
                for response, logprob in zip(getattr(group, side), self._logprobs[side][group.row], strict=True):
                    response.reference_logprob = logprob

    def _compute(self, side: str, steps: range) -> dict[int, list[float]]:
        """The log-probs of one side of each group of these steps, by the group's row."""
        groups = {group.row: group for step in steps for group in self._batch(step)}.values()
        halves = [Group(g.prompt_id, g.prompt, getattr(g, side)) for g in groups if getattr(g, side)]
        with self._engine.weights(self._shards[side]):
            logprobs = iter(response_logprobs(self._engine, halves, self._tokens))
        return {group.row: list(islice(logprobs, len(getattr(group, side)))) for group in groups}


class MismatchedPairs:
    """KTO's zero point: the log-ratio of answers under prompts that they do not belong to (arXiv 2402.01306).

    Each group's pair is its prompt with the first answer of the next group of another prompt. The log-probs of all
    pairs under the initial model are computed before the first step.
    """

    def __init__(self, engine: TrainingEngine, groups: Sequence[Group], folder: Path, tokens: int):
        """
        Args:
            groups: all groups, in the order of the data.
            folder: keeps the log-probs for a resume.
            tokens: tokens in one forward pass.
        Raises:
            D2OError: where all groups have the same prompt.
        """
        self._engine, self._tokens = engine, tokens
        pairs = [
            Group(group.prompt_id, group.prompt, [_stranger(groups, place)], row=group.row)
            for place, group in enumerate(groups)
        ]
        logprobs = initial_logprobs(engine, pairs, folder / "mismatched.json", tokens)
        self._pairs = {pair.row: (pair, logprob) for pair, logprob in zip(pairs, logprobs, strict=True)}

    def zero_point(self, members: Sequence[Group]) -> Tensor:
        """z0 = max(0, mean log-ratio of the mismatched pairs of a step's groups), nats, a scalar without gradient."""
        pairs, references = zip(*(self._pairs[group.row] for group in members), strict=True)
        logprobs = response_logprobs(self._engine, pairs, self._tokens)
        ratios = [logprob - reference for logprob, reference in zip(logprobs, references, strict=True)]
        return torch.tensor(ratios, device=self._engine.device).mean().clamp(min=0)


def _stranger(groups: Sequence[Group], place: int) -> Response:
    prompt = groups[place].prompt_id
    for further in range(1, len(groups)):
        other = groups[(place + further) % len(groups)]
        if other.prompt_id != prompt:
            answer = other.responses[0]
            return Response(answer.response_id, answer.ids)
    raise D2OError("kto: all groups have the same prompt; it compares answers of different prompts, so give it more")


def response_logprobs(engine: TrainingEngine, groups: Sequence[Group], tokens: int) -> list[float]:
    """The log-prob of every response under the engine's weights, nats; all ranks share the work."""
    rows = packs(groups, tokens)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gathered: list[list[float]] = []
    # Every rank makes as many passes: under ZeRO 3 all ranks must gather together.
    for first in range(0, len(rows), ranks):
        together: list = [None] * ranks
        dist.all_gather_object(together, engine.sums(rows[min(first + rank, len(rows) - 1)]).tolist())
        gathered += together
    return [logprob for sums in gathered[: len(rows)] for logprob in sums]


def initial_logprobs(engine: TrainingEngine, groups: Sequence[Group], kept: Path, tokens: int) -> list[float]:
    """As `response_logprobs`, while the weights are still the initial model's; kept in a file for a resume.

    A damaged file is replaced: its log-probs are computed again.
    """
    read = [_logprobs(kept, groups) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(read)
    if read[0] is not None:
        return read[0]
    logprobs = response_logprobs(engine, groups, tokens)
    if dist.get_rank() == 0:
        records.write_json(kept, checksums.seal({"logprobs": logprobs}))
        records.sync(kept)
    return logprobs


def _logprobs(kept: Path, groups: Sequence[Group]) -> list[float] | None:
    """The log-probs in a file, one for each response of the groups; None where it is missing or damaged."""
    try:
        logprobs = checksums.unsealed(kept.read_text(errors="replace"))["logprobs"]
        whole = len(logprobs) == sum(len(group.responses) for group in groups)
    except (OSError, TypeError, KeyError):
        whole = False
    if kept.exists() and not whole:
        print(f"train: {kept}: damaged; its log-probs are computed again", file=sys.stderr)
    return logprobs if whole else None
