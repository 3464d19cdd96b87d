"""Online rounds: before which steps they are sampled, and how many positives of a group their answers replace."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2o.settings import Method, Online


def boundaries(online: Online, steps: int) -> range:
    """The steps before which a round is sampled, in a training of `steps` steps."""
    return range(online.start, steps, online.every)


def numbers(method: Method, steps: int | None) -> range:
    """The numbers of a method's rounds, from 1 on; empty where it has no rounds."""
    return range(1, 1 + len(boundaries(method.online, steps)) if method.online else 1)


def count(online: Online, positives: int) -> int:
    """How many of a group's `positives` the fresh ones replace: at least one, unless the share is 0."""
    return max(1, round(online.share * positives)) if online.share else 0
