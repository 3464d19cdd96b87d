"""The groups and the learning rate of each step: functions of the step alone, so that resuming is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from d2o import identities
from d2o.groups import Group, packs
from d2o.settings import Train


def total_steps(train: Train, groups: int) -> int:
    """Optimizer steps of a training on `groups` groups."""
    return train.steps or max(1, math.ceil(train.epochs * groups / train.groups_per_step))


def step_groups(step: int, groups: int, train: Train, seed: int) -> list[int]:
    """Indices of the groups of one optimizer step, over all ranks.

    Each epoch is a permutation of its own; a step may span two, so that every step is full and every group is
    seen once per epoch.

    Args:
        step: from 0.
        groups: number of groups.
    """
    positions = range(step * train.groups_per_step, (step + 1) * train.groups_per_step)
    orders = {epoch: _permutation(groups, seed, epoch) for epoch in {p // groups for p in positions}}
    return [int(orders[p // groups][p % groups]) for p in positions]


def _permutation(groups: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(identities.derived_seed(seed, epoch)).permutation(groups)


def rate(step: int, total: int, train: Train) -> float:
    """Share of the peak learning rate at a step: a linear rise, then the chosen decay down to 0."""
    rise = math.ceil(train.warmup * total)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    match train.decay:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "constant":
            return 1.0


def passes(batch: Sequence[Group], ranks: int, tokens: int) -> list[list[list[Group]]]:
    """The groups of a step, by rank and by forward pass: [rank][pass].

    Ranks get about the same work. All make the same number of passes, because under ZeRO 2 and 3 each pass is a
    collective operation; a rank with fewer groups than passes has empty ones.

    Args:
        tokens: the most in one pass, unless a single group is larger.
    """
    shares = _spread(batch, ranks)
    filled = [packs(share, tokens) for share in shares]
    needed = max(map(len, filled))
    return [
        rows if len(rows) == needed else _spread(share, needed) for share, rows in zip(shares, filled, strict=True)
    ]


def _spread(groups: Sequence[Group], bins: int) -> list[list[Group]]:
    """Groups in `bins` bins of about the same work: the largest first, each into the lightest bin."""
    filled: list[list[Group]] = [[] for _ in range(bins)]
    loads = [0] * bins
    for group in sorted(groups, key=lambda group: group.tokens, reverse=True):
        lightest = loads.index(min(loads))
        filled[lightest].append(group)
        loads[lightest] += group.tokens
    return filled
