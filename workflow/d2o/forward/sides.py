"""The two sides of each term of a loss, from groups by one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from d2o.forward.rows import Row
from d2o.groups import Group
from d2o.losses import Side, terms


def sides(policy: nn.Module, groups: Sequence[Group], device: torch.device | str) -> list[tuple[Side, Side]]:
    """The positives and the negatives of each term of the groups' losses, as `losses.terms` divides them.

    Args:
        policy: a `Policy`, or a module that wraps one; it is called once.
        device: where its weights are.
    """
    row = Row.of(groups).to(device)
    logprobs = [response.reference_logprob for group in groups for response in group.responses]
    whole = Side.of(policy(row), row.lengths, torch.tensor(logprobs, device=device))
    pairs, start = [], 0
    for group in groups:
        middle, stop = start + len(group.positives), start + len(group.responses)
        pairs += terms(whole.part(start, middle), whole.part(middle, stop))
        start = stop
    return pairs
