"""One row for many groups: every prompt once, then its responses, each at the positions after its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2o.groups import Group


@dataclass(frozen=True)
class Span:
    """Where a group lies in a row: its prompt, then its responses, each (start, length); tokens."""

    prompt: tuple[int, int]
    responses: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Row:
    """Groups as one sequence of L tokens, T of them in R responses.

    Attributes:
        ids: int64 [1, L], `prompt | y_1 | … | y_n` of each group in turn.
        positions: int64 [1, L]: 0…P−1 in a prompt, and from P again in each of its responses.
        sources: int64 [T], the state that predicts each response token. The first token of every response is
            predicted by the last state of the prompt.
        targets: int64 [T], the response tokens.
        lengths: int64 [R], tokens of each response.
        spans: where each group lies.
    """

    ids: Tensor
    positions: Tensor
    sources: Tensor
    targets: Tensor
    lengths: Tensor
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Row:
        """Lay out groups, on the CPU.

        Args:
            groups: each with a prompt of at least one token, and responses likewise.
        """
        ids: list[Sequence[int]] = []
        positions, sources, lengths, spans = [], [], [], []
        end = 0
        for group in groups:
            prompt = (end, len(group.prompt))
            ids.append(group.prompt)
            end += len(group.prompt)
            positions.append(torch.arange(len(group.prompt)))
            responses = []
            for response in group.responses:
                start, length = end, len(response.ids)
                ids.append(response.ids)
                end += length
                positions.append(torch.arange(prompt[1], prompt[1] + length))
                sources.append(torch.arange(start - 1, start + length - 1))
                sources[-1][0] = prompt[0] + prompt[1] - 1
                responses.append((start, length))
                lengths.append(length)
            spans.append(Span(prompt, tuple(responses)))
        row = torch.from_numpy(np.concatenate(ids, dtype=np.int64))[None]
        starts = [torch.arange(start, start + n) for span in spans for start, n in span.responses]
        return cls(
            row,
            torch.cat(positions)[None],
            torch.cat(sources),
            row[0, torch.cat(starts)],
            torch.tensor(lengths),
            tuple(spans),
        )

    @property
    def reach(self) -> int:
        """Tokens of the longest prompt with one of its responses: how far back a token may look."""
        return max(span.prompt[1] + n for span in self.spans for _, n in span.responses)

    def to(self, device: torch.device) -> Row:
        """The row with its tensors on a device."""
        tensors = (self.ids, self.positions, self.sources, self.targets, self.lengths)
        return Row(*(tensor.to(device) for tensor in tensors), self.spans)

    def mask(self) -> Tensor:
        """What each token sees, bool [1, 1, L, L]: its own segment up to itself, and a response all of its prompt."""
        length = self.ids.shape[1]
        sees = torch.zeros(length, length, dtype=torch.bool)
        for span in self.spans:
            for start, n in (span.prompt, *span.responses):
                sees[start : start + n, start : start + n] = torch.ones(n, n, dtype=torch.bool).tril()
            first, n = span.prompt
            for start, m in span.responses:
                sees[start : start + m, first : first + n] = True
        return sees[None, None].to(self.ids.device)
