"""The data of online rounds: after each boundary, groups whose positives are partly drawn from the policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from d2o.groups import Group


class Rounds:
    """The groups that a step draws from: the first ones, and from each boundary on those of its round."""

    def __init__(
        self, groups: Sequence[Group], fresh: Sequence[Sequence[Group]], boundaries: Sequence[int], total: int
    ):
        """
        Args:
            groups: those of the pool, in the order of the data.
            fresh: for each round that is drawn by now the same groups with its positives; others as they are.
            boundaries: the steps before which rounds begin, also of those not drawn yet.
            total: steps of the whole training.
        """
        self._groups = [groups, *fresh]
        self._starts = [0, *boundaries]
        # Until the next round has to be drawn, or to the end.
        self.until = [*boundaries, total][len(fresh)]

    def at(self, step: int) -> Sequence[Group]:
        """All groups as they are at a step; before a round is drawn those of the last one."""
        return self._groups[self._round(step)]

    def freshness(self, step: int, indices: Iterable[int]) -> dict[str, float]:
        """What to log of a step: which share of its positives is fresh, and how many steps ago they were drawn.

        Args:
            indices: of the step's groups.
        """
        now = self._round(step)
        old, new = (
            [response.response_id for i in indices for response in self._groups[n][i].positives] for n in (0, now)
        )
        share = sum(a != b for a, b in zip(old, new, strict=True)) / len(new)
        return {"fresh_share": share, "fresh_age": step - self._starts[now] if now else 0}

    def _round(self, step: int) -> int:
        begun = sum(start <= step for start in self._starts) - 1
        return min(begun, len(self._groups) - 1)


def upcoming(comparisons: Iterable[Mapping[str, Any]], groups: Iterable[Group]) -> list[Mapping[str, Any]]:
    """The rows of `records.COMPARISONS` whose prompts some groups ask: what a round is drawn for."""
    prompts = {group.prompt_id for group in groups}
    return [row for row in comparisons if row["split"] == "train" and row["prompt_id"] in prompts]
