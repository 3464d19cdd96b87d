"""What a run of the benchmark measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from workload import LENGTHS, SMOLLM2, Lengths, Shape


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: precision, lengths, positives and negatives of the group, rounds of each peer."""

    precision: str
    lengths: str
    k: int
    rounds: Mapping[str, int]
    negatives: int = 1

    @property
    def turns(self) -> int:
        """Rounds of the cell."""
        return max(self.rounds.values())

    def ways(self, turn: int) -> list[str]:
        """The ways that run in a round."""
        return ["ours", *(peer for peer, rounds in self.rounds.items() if turn < rounds)]


@dataclass(frozen=True)
class Scaling:
    """The numbers of ranks to run, and for each: timed steps, groups per step over all ranks, positives per group."""

    ranks: Sequence[int]
    steps: int
    groups: int
    k: int


@dataclass(frozen=True)
class Plan:
    """What a run measures: the model and its device, the lengths by name, the grid, memory and scaling over ranks.

    Memory is measured at K = 11 for ours and for `memory_peers`, and for ours at each of `memory_ks`.
    """

    shape: Shape
    lengths: Mapping[str, Lengths]
    grid: Sequence[Cell]
    memory_peers: Sequence[str]
    memory_ks: Sequence[int]
    scaling: Scaling
    device: str = "cpu"

    def peers(self, precision: str) -> list[str]:
        """Ours and every peer that runs in a precision."""
        return list(dict.fromkeys(way for cell in self.grid if cell.precision == precision for way in cell.ways(0)))


def _rounds(count: int, *peers: str) -> dict[str, int]:
    return dict.fromkeys(peers, count)


_BEST = ("packed_chunked", "padded_chunked")
_FULL = "padded_full_logits"
_PAIRS = "same_head_pairs"  # the same as padded_chunked with K = 1
_TRL = "trl"
_TRL_OPTIONS = ("trl_cached", "trl_checkpointing")

# Five rounds where a figure is reported, fewer for TRL's other options and the other cells: under an hour in total.
_GRID = (
    Cell("bf16", "brief", 11, _rounds(5, *_BEST, _FULL, _PAIRS, _TRL) | _rounds(1, *_TRL_OPTIONS)),
    Cell("bf16", "pku_like", 11, _rounds(5, *_BEST) | _rounds(1, _FULL, _PAIRS)),
    Cell("bf16", "brief", 4, _rounds(5, *_BEST) | _rounds(1, _FULL, _PAIRS)),
    Cell("bf16", "pku_like", 4, _rounds(2, *_BEST)),
    Cell("bf16", "brief", 1, _rounds(5, *_BEST, _FULL)),
    Cell("bf16", "pku_like", 1, _rounds(5, *_BEST)),
    Cell("bf16", "pku_like", 11, _rounds(3, "each_negative"), negatives=3),
    Cell("bf16", "pku_like", 11, _rounds(3, "each_negative"), negatives=9),
    Cell("fp32", "brief", 11, _rounds(5, "packed_chunked") | _rounds(1, "padded_chunked", _FULL)),
    Cell("fp32", "brief", 4, _rounds(1, *_BEST)),
    Cell("fp32", "brief", 1, _rounds(1, *_BEST)),
)

FULL = Plan(
    SMOLLM2,
    LENGTHS,
    _GRID,
    (*_BEST, _FULL, _PAIRS, _TRL, "trl_checkpointing"),
    (1, 2, 4, 8, 16, 32),
    Scaling((1, 2), steps=5, groups=8, k=4),
)

QUICK = Plan(
    Shape(layers=2, vocabulary=2048),
    {name: lengths.over(8) for name, lengths in LENGTHS.items()},
    [replace(cell, rounds=dict.fromkeys(cell.rounds, 1)) for cell in _GRID if cell.k == 11],
    (_PAIRS, _TRL),
    (1,),
    Scaling((1, 2), steps=1, groups=3, k=4),
)
