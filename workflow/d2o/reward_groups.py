"""Scores of the answers to one prompt: the beginning that inputs share is computed once, as in the group forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from d2o.forward import COMPARED, Row, attention
from d2o.forward.policy import SHARING
from d2o.groups import Group, Response, packs

__all__ = ["COMPARED", "TOLERANCE", "logits", "rows", "serves"]

# Largest difference between a score and that of a padded row that counts as rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}


def serves(model) -> bool:
    """Whether a reward model is causal, of an architecture known to share prompts, with a head on its last state."""
    config, weight = model.config, getattr(getattr(model, "score", None), "weight", None)
    known = weight is not None and config.model_type in SHARING and not getattr(config, "sliding_window", None)
    return known and attention.serves(weight.device, weight.dtype)


def rows(inputs: Sequence[Sequence[int]], owners: Sequence[Hashable], tokens: int) -> Iterator[tuple[list[int], Row]]:
    """Rows of at most `tokens` tokens, each with the indices of its inputs; inputs without a sibling are in no row.

    Args:
        inputs: token ids.
        owners: the prompt that each input answers.
    """
    siblings: dict[Hashable, list[int]] = defaultdict(list)
    for place, owner in enumerate(owners):
        siblings[owner].append(place)
    groups = []
    for places in siblings.values():
        # Each input keeps a token of its own, whose state is scored.
        common = _beginning([inputs[place][:-1] for place in places])
        if len(places) > 1 and common:
            branches = [Response(str(place), inputs[place][len(common) :]) for place in places]
            room = max(tokens - len(common), 1)
            groups += [Group("", common, part) for part in _parts(branches, room)]
    for pack in packs(groups, tokens):
        yield [int(response.response_id) for group in pack for response in group.positives], Row.of(pack)


def _beginning(inputs: Sequence[Sequence[int]]) -> list[int]:
    """The common beginning of all inputs."""
    first, last = min(inputs), max(inputs)  # the two that differ first
    same = (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return list(first[: next(same, min(len(first), len(last)))])


def _parts(branches: Sequence[Response], tokens: int) -> Iterator[list[Response]]:
    """Split branches, in order, into parts of at most `tokens` tokens, but of at least one branch."""
    part, room = [], tokens
    for branch in branches:
        if part and len(branch.ids) > room:
            yield part
            part, room = [], tokens
        part.append(branch)
        room -= len(branch.ids)
    yield part


def logits(model, row: Row) -> Tensor:
    """Outputs of the head at the last token of each response of a row: float32 [R, L]."""
    row = row.to(model.device)
    model.set_attn_implementation(attention.NAME)
    states = model.get_decoder()(
        input_ids=row.ids, use_cache=False, position_ids=row.positions, spans=row.spans
    ).last_hidden_state
    ends = [start + length - 1 for span in row.spans for start, length in span.responses]
    return model.score(states[0, ends]).float()
