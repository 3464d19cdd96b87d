"""Step times of all ways on the same groups, in one process; train_step.py describes the method."""

from __future__ import annotations

import gc
import json
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor
from tqdm import tqdm

from d2o.groups import Group
from peers import PEERS, Peer
from plan import Cell, Plan
from workload import Shape, matmul_peak, seconds, shared_work

# Largest relative difference of a response's log-prob between two ways that counts as rounding.
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}


@dataclass(frozen=True)
class Round:
    """Readings of one round.

    Attributes:
        tokens: of the group, its prompt counted once.
        seconds: of a step, by way.
        flops: of a step, by way.
        useful: FLOPs of our step, without what it computes twice.
        peak: FLOP/s of the fastest matrix product.
        difference: largest relative difference between a log-prob of ours and of another way.
    """

    tokens: int
    seconds: Mapping[str, float]
    flops: Mapping[str, float]
    useful: float
    peak: float
    difference: float


def time_grid(plan: Plan) -> list[dict]:
    """One row per cell of the grid and peer; each is also printed once it is measured.

    Raises:
        RuntimeError: where a way computes other log-probs than ours.
    """
    by_precision = {precision: [c for c in plan.grid if c.precision == precision] for precision in TOLERANCE}
    return [row for precision, cells in by_precision.items() if cells for row in _time(plan, precision, cells)]


def _time(plan: Plan, precision: str, cells: Sequence[Cell]) -> list[dict]:
    """The rows of the cells of one precision; only its ways are in memory meanwhile."""
    ways = _ways(plan, precision)
    groups = [[_group(plan, cell, turn) for turn in range(cell.turns)] for cell in cells]
    total = sum(
        _flops(ways[way], group, plan.shape)
        for cell, of_cell in zip(cells, groups, strict=True)
        for turn, group in enumerate(of_cell)
        for way in cell.ways(turn)
    )
    rows = []
    with tqdm(total=total, bar_format="{desc}{percentage:.0f} % in {elapsed}, {remaining} left") as progress:
        for cell, of_cell in zip(cells, groups, strict=True):
            progress.set_description(f"{cell.precision}, {cell.lengths}, K = {cell.k}, N = {cell.negatives}")
            rounds = [_round(plan, cell, turn, ways, group, progress) for turn, group in enumerate(of_cell)]
            lines = [_row(cell, peer, rounds) for peer in cell.rounds]
            progress.write("\n".join(map(json.dumps, lines)), file=sys.stderr)
            rows += lines
    return rows


def _group(plan: Plan, cell: Cell, turn: int) -> Group:
    return plan.lengths[cell.lengths].sample(
        cell.k, plan.shape.vocabulary, cell.lengths, turn, negatives=cell.negatives
    )


def _ways(plan: Plan, precision: str) -> dict[str, Peer]:
    """Ours and the peers, warmed up on two small groups, on which their log-probs are compared."""
    lm = plan.shape.model(precision, plan.device)
    ways = {name: PEERS[name](lm) for name in plan.peers(precision)}
    for k in (2, 3):
        group = plan.lengths["brief"].over(4).sample(k, plan.shape.vocabulary, "warm-up")
        difference({name: _step(way, group, plan.device)[1] for name, way in ways.items()}, precision)
    return ways


def _round(plan: Plan, cell: Cell, turn: int, ways: Mapping[str, Peer], group: Group, progress: tqdm) -> Round:
    names = cell.ways(turn)
    random.Random(repr((cell, turn))).shuffle(names)
    taken, logprobs, flops = {}, {}, {}
    peak = matmul_peak(cell.precision, plan.device)
    for name in names:
        taken[name], logprobs[name] = _step(ways[name], group, plan.device)
        flops[name] = _flops(ways[name], group, plan.shape)
        progress.update(flops[name])
    peak = max(peak, matmul_peak(cell.precision, plan.device))
    return Round(
        group.tokens,
        taken,
        flops,
        shared_work([group], head_passes=3).flops(plan.shape),
        peak,
        difference(logprobs, cell.precision),
    )


def _step(way: Peer, group: Group, device: str) -> tuple[float, dict[str, list[float]]]:
    """Seconds of one step, and the log-probs that it computed for each response; a negative has one per pair."""
    groups = way.groups([group])
    sums: list[Tensor] = []

    def run() -> None:
        way.model.zero_grad()
        sums.append(way.step(groups))

    gc.collect()
    duration = seconds(run, device)
    logprobs = defaultdict(list)
    responses = [response for part in groups for response in part.responses]
    for response, value in zip(responses, sums[0].tolist(), strict=True):
        logprobs[response.response_id].append(value)
    return duration, logprobs


def _flops(way: Peer, group: Group, shape: Shape) -> float:
    return way.work(way.groups([group])).flops(shape)


def difference(logprobs: Mapping[str, Mapping[str, list[float]]], precision: str) -> float:
    """Largest relative difference of any way's log-probs from ours.

    Args:
        logprobs: by way and response, every log-prob that the way computed for the response; ours computes one.
    Raises:
        RuntimeError: where a difference is more than rounding.
    """
    worst = 0.0
    for way, responses in logprobs.items():
        for response, (expected,) in logprobs["ours"].items():
            for value in responses[response]:
                relative = abs(value / expected - 1)
                if not relative <= TOLERANCE[precision]:  # also where it is NaN
                    raise RuntimeError(f"{way}, {precision}: a log-prob of {value:.6g} where ours is {expected:.6g}")
                worst = max(worst, relative)
    return worst


def _row(cell: Cell, peer: str, rounds: list[Round]) -> dict:
    rounds = rounds[: cell.rounds[peer]]
    return {
        "precision": cell.precision,
        "lengths": cell.lengths,
        "k": cell.k,
        "negatives": cell.negatives,
        "peer": peer,
        "rounds": len(rounds),
        "tokens": median(r.tokens for r in rounds),
        "speedup": spread(r.seconds[peer] / r.seconds["ours"] for r in rounds),
        "flop_ratio": round(median(r.flops[peer] / r.flops["ours"] for r in rounds), 2),
        "seconds": spread(r.seconds[peer] for r in rounds),
        "our_seconds": spread(r.seconds["ours"] for r in rounds),
        "our_flop_utilisation": spread(r.useful / r.seconds["ours"] / r.peak for r in rounds),
        "matmul_peak_gflops": spread(r.peak / 1e9 for r in rounds),
        "largest_logprob_difference": max(r.difference for r in rounds),
    }


def spread(values) -> dict[str, float]:
    """Median, lowest and highest, to four digits."""
    values = sorted(values)
    return {"median": _short(median(values)), "low": _short(values[0]), "high": _short(values[-1])}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
