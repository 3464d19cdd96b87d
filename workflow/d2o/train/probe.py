"""The probe: a few fixed groups whose log-probs show how far the policy has gone from the initial model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from d2o.groups import Group
from d2o.train.engine import TrainingEngine
from d2o.train.references import initial_logprobs, response_logprobs

# Steps between two evaluations of the probe, each one forward pass.
EVERY = 10


class Probe:
    """The log-probs of fixed groups against the initial model, for every method, whatever its loss sees.

    The log-ratios of a step cannot replace it: other groups come with each step, fresh positives replace old ones,
    and moving references follow the policy.
    """

    def __init__(self, engine: TrainingEngine, groups: Sequence[Group], folder: Path, tokens: int):
        """
        Args:
            groups: those on which the training is monitored.
            folder: keeps the log-probs under the initial model for a resume.
            tokens: tokens in one forward pass.
        """
        self._engine, self._groups, self._tokens = engine, groups, tokens
        self._initial = initial_logprobs(engine, groups, folder / "probe.json", tokens)

    def shifts(self) -> dict[str, float]:
        """`positive_shift` and `negative_shift`: the log-prob per token less that under the initial model, nats.

        Means over the responses; NaN where no group has such a side. Called on all ranks.
        """
        now = response_logprobs(self._engine, self._groups, self._tokens)
        lengths = [len(response.ids) for group in self._groups for response in group.responses]
        shifts = ((a - b) / n for a, b, n in zip(now, self._initial, lengths, strict=True))
        sides: dict[str, list[float]] = {"positive_shift": [], "negative_shift": []}
        for group in self._groups:
            sides["positive_shift"] += islice(shifts, len(group.positives))
            sides["negative_shift"] += islice(shifts, len(group.negatives))
        return {key: sum(values) / len(values) if values else math.nan for key, values in sides.items()}
