"""Numerical error of our step, compared with padded rows with full logits in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from d2o.groups import Group
from peers import PEERS
from workload import Lengths, Shape


def exactness(shape: Shape, lengths: Lengths) -> dict[str, float]:
    """Differences from the padded rows in the responses' log-probs and in the gradient, with K = 11.

    In fp32 with all layers: the largest relative difference of a log-prob, and the relative L2 difference of the
    gradient. In bf16 with four layers: the relative L2 errors of ours and of the padded rows against the fp32 result
    with the same weights, and their ratio.
    """
    groups = [lengths.sample(11, shape.vocabulary, "exactness", i) for i in range(3)]
    lm = shape.model("fp32")
    (sums, gradient), (true_sums, true_gradient) = (_step(way, lm, groups[:1]) for way in ("ours", _PADDED))
    differences = {
        "fp32_logprob_max_relative": float((sums / true_sums - 1).abs().max()),
        "fp32_gradient_relative_l2": _relative(gradient, true_gradient),
    }
    lm = replace(shape, layers=min(4, shape.layers)).model("bf16")
    ours, padded = (_step(way, lm, groups) for way in ("ours", _PADDED))
    truth = _step(_PADDED, lm.float(), groups)
    for name, mine, theirs, true in zip(("logprob", "gradient"), ours, padded, truth, strict=True):
        differences[f"bf16_{name}_error"] = _relative(mine, true)
        differences[f"bf16_{name}_error_of_padded"] = _relative(theirs, true)
        differences[f"bf16_{name}_error_ratio"] = _relative(mine, true) / _relative(theirs, true)
    return {name: float(f"{value:.3g}") for name, value in differences.items()}


_PADDED = "padded_full_logits"


def _step(way: str, lm: PreTrainedModel, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Log-probs of the responses and the whole gradient, both flat and in double precision."""
    lm.zero_grad()
    sums = PEERS[way](lm).step(groups)
    return sums.double(), torch.cat([weight.grad.flatten() for weight in lm.parameters()]).double()


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())
