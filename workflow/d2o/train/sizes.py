"""Bytes that a training writes, known before it starts."""

from __future__ import annotations


def checkpoint(trained: float, width: int, moving: bool) -> float:
    """Bytes of one checkpoint: the weights that are trained, their float32 copy and AdamW's two moments.

    Args:
        trained: parameters that are trained.
        width: bytes of a weight.
        moving: whether it includes the float32 weights of two moving references.
    """
    return trained * (width + 12 + 8 * moving)
