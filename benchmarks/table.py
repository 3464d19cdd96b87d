"""The benchmark's figures and its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Asked(NamedTuple):
    """Requirements for a figure in bf16 with K = 11: the minimum and the aim; the cell that it is measured in."""

    least: float
    aim: float
    lengths: str
    peer: str
    negatives: int = 1


SPEED = {
    "speedup_vs_trl": Asked(8, 14, "brief", "trl"),
    "speedup_vs_same_head_pairs": Asked(3.5, 5, "brief", "same_head_pairs"),
    "speedup_vs_padded_full_logits": Asked(2.6, 4, "brief", "padded_full_logits"),
    "speedup_vs_packed_chunked": Asked(1.5, 2.2, "brief", "packed_chunked"),
    "pku_like_speedup_vs_padded_chunked": Asked(1.5, 2, "pku_like", "padded_chunked"),
    "pku_like_speedup_vs_packed_chunked": Asked(1.0, 1.2, "pku_like", "packed_chunked"),
    "group_negatives_speedup_3": Asked(2.2, 2.6, "pku_like", "each_negative", 3),
    "group_negatives_speedup_9": Asked(4.5, 5.4, "pku_like", "each_negative", 9),
}
MEMORY = {"memory_ratio_vs_trl": (5, 8, "trl"), "memory_ratio_vs_same_head_pairs": (3.5, 5, "same_head_pairs")}
UTILISATION = {"bf16": (0.35, 0.55), "fp32": (0.60, 0.80)}
# Upper limits of the figures of exactness.
LIMITS = {
    "fp32_logprob_max_relative": 1e-6,
    "fp32_gradient_relative_l2": 2e-5,
    "bf16_logprob_error_ratio": 1.3,
    "bf16_gradient_error_ratio": 1.3,
}

WAYS = {
    "each_negative": "ours, a group and a pass a negative: prompt and positives again for each of N negatives",
    "packed_chunked": "each response with its own copy of the prompt, all in one row, one flash call a sequence; our "
    "head, reference cached",
    "padded_chunked": "K+1 padded rows; our head, reference cached",
    "padded_full_logits": "K+1 padded rows; log-softmax of all logits in float32; reference cached",
    "same_head_pairs": "the K pairs as 2K padded rows; our head, reference cached: what the pairs alone cost",
    "trl": "TRL's DPOTrainer on the K pairs, reference model in each step, no gradient checkpointing. On a CPU its "
    "head falls back to plain PyTorch, scores every position, prompt and padding too, and makes its gradients in "
    "float32",
    "trl_cached": "the same with `precompute_ref_log_probs`",
    "trl_checkpointing": "the same as `trl` with gradient checkpointing, TRL's default",
}


def figures(result: dict) -> dict:
    """The required figures by name, from grid and memory."""
    peaks = result["memory"]["peers"]
    speed = {name: _asked(result, asked)["speedup"] for name, asked in SPEED.items()}
    return {
        **{name: spread["median"] for name, spread in speed.items()},
        **{name: round(peaks[peer] / peaks["ours"], 2) for name, (*_, peer) in MEMORY.items()},
        "flop_utilisation": {precision: _utilisation(result, precision)["median"] for precision in UTILISATION},
    }


def markdown(result: dict) -> str:
    """The tables as Markdown, with explanations."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: dict) -> Iterator[str]:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield "# One training step: ours and others'\n"
    yield f"{machine['model']}. {machine['cpu']}, one thread, {versions}; {machine['date']}.\n"
    yield "Times are CPU seconds; ratios are medians over rounds of peer ÷ ours, with lowest–highest. The FLOP ratio"
    yield "is what the peer's way asks for over ours; ▲: measured above it, so the peer has handicaps beside its way."
    bf16, fp32 = (_agreed(result, precision) for precision in ("bf16", "fp32"))
    yield f"Log-probs of all ways agreed in every step, in bf16 to {bf16} of their size, in fp32 to {fp32}. On a CPU,"
    yield f"TRL with its own head takes about {_head_cost(result):.1f} times as long as the same pairs with ours"
    yield "(`trl_cached` over `same_head_pairs`), which does not carry over to a GPU.\n"
    yield from _rows(("bf16, K = 11", "measured", "FLOP ratio", "at least", "aim", ""), _figure_rows(result))
    yield "\n## Grid\n"
    header = (
        "precision",
        "lengths",
        "K",
        "N",
        "tokens",
        "peer",
        "rounds",
        "peer s",
        "ours s",
        "speed-up",
        "FLOP ratio",
    )
    yield from _rows(header, map(_grid_row, result["grid"]))
    yield "\n| peer | what it does |\n|---|---|"
    yield from (f"| {peer} | {what} |" for peer, what in WAYS.items())
    yield "\n## Memory of a step over weights and gradients, bf16\n"
    peaks = result["memory"]["peers"]
    peers = ((peer, f"{peak:.0f}", f"{peak / peaks['ours']:.2f}") for peer, peak in peaks.items())
    yield from _rows(("K = 11", "MB", "÷ ours"), peers)
    yield ""
    yield from _rows(("K", "ours, MB"), ((k, f"{peak:.0f}") for k, peak in result["memory"]["by_k"].items()))
    yield "\n## Wall time of an optimizer step against ranks, bf16, one thread a rank\n"
    yield from _rows(("ranks", "seconds", "speed-up"), map(_ranks_row, result["ranks"]))
    yield "\nThe share of a step on one rank that is not forward and backward:\n"
    steps = (result["ranks"][0], result["short_step"])
    shares = ((row["tokens"], _show(row["seconds"]), _show(row["share_beside_passes"])) for row in steps)
    yield from _rows(("tokens", "seconds", "share"), shares)
    yield "\n## Exactness against padded rows with full logits\n"
    yield from _rows(("", "measured", "at most"), ((n, v, LIMITS.get(n, "")) for n, v in result["exactness"].items()))


def _figure_rows(result: dict) -> Iterator[tuple]:
    for name, asked in SPEED.items():
        row, (least, aim, *_) = _asked(result, asked), asked
        yield name, _speedup(row), row["flop_ratio"], least, aim, _mark(row["speedup"]["median"], least, aim)
    for name, (least, aim, _) in MEMORY.items():
        yield name, result[name], "", least, aim, _mark(result[name], least, aim)
    for precision, (least, aim) in UTILISATION.items():
        spread = _utilisation(result, precision)
        yield f"flop_utilisation {precision}", _show(spread), "", least, aim, _mark(spread["median"], least, aim)


def _grid_row(row: dict) -> tuple:
    times = (f"{row[key]['median']:.2f}" for key in ("seconds", "our_seconds"))
    where = (row["precision"], row["lengths"], row["k"], row["negatives"], f"{row['tokens']:.0f}", row["peer"])
    where = (*where, row["rounds"])
    return (*where, *times, _speedup(row), row["flop_ratio"])


def _ranks_row(row: dict) -> tuple:
    return row["ranks"], _show(row["seconds"]), _show(row["speedup"])


def _speedup(row: dict) -> str:
    return _show(row["speedup"]) + (" ▲" if row["speedup"]["median"] > row["flop_ratio"] else "")


def _show(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})"


def _mark(value: float, least: float, aim: float) -> str:
    return "aim" if value >= aim else "met" if value >= least else "**missed**"


def _rows(header: Sequence, rows) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _asked(result: dict, asked: Asked) -> dict:
    return _cell(result, "bf16", asked.lengths, asked.peer, asked.negatives)


def _cell(result: dict, precision: str, lengths: str, peer: str, negatives: int = 1) -> dict:
    wanted = {"precision": precision, "lengths": lengths, "peer": peer, "negatives": negatives, "k": 11}
    return next(row for row in result["grid"] if wanted.items() <= row.items())


def _agreed(result: dict, precision: str) -> str:
    differences = (row["largest_logprob_difference"] for row in result["grid"] if row["precision"] == precision)
    return f"{max(differences):.0e}"


def _head_cost(result: dict) -> float:
    """Time of TRL's step with cached references over that of the same pairs with our head."""
    theirs, same = (_cell(result, "bf16", "brief", peer)["speedup"] for peer in ("trl_cached", "same_head_pairs"))
    return theirs["median"] / same["median"]


def _utilisation(result: dict, precision: str) -> dict[str, float]:
    return _cell(result, precision, "brief", "packed_chunked")["our_flop_utilisation"]
