"""The contract of each loss. This module imports no torch, so a wrong method is refused before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Contract:
    """The requirements of a loss on a response group and on the settings of its method.

    Attributes:
        positives: how many positives a group must have: `none`, `one`, `many` (one or more) or `any` (zero or more).
        negative: whether the loss takes the negative.
        reference: whether the loss takes log-probs under the reference.
        parameters: the keys of a method that the loss reads, with their defaults.
        unit: whether the loss compares log-probs as `sums` over the tokens of a response or as `means` per token.
        mismatched: whether the loss also takes log-ratios of responses under the prompts of other groups.
    """

    positives: Literal["none", "one", "many", "any"]
    negative: bool
    reference: bool
    parameters: Mapping[str, float] = field(default_factory=dict)
    unit: Literal["sums", "means"] = "sums"
    mismatched: bool = False


_PAIR = {"positives": "one", "negative": True}

# β = 0.1 as in the paper, for every method but SimPO: its authors advise more, because log-probs per token are small.
CONTRACTS = {
    "d2o": Contract("many", negative=True, reference=True, parameters={"beta": 0.1, "alpha": 0.1}),
    "d2o-instance": Contract("many", negative=True, reference=True, parameters={"beta": 0.1, "alpha": 0.1}),
    "dpo": Contract(**_PAIR, reference=True, parameters={"beta": 0.1}),
    "cdpo": Contract(**_PAIR, reference=True, parameters={"beta": 0.1, "epsilon": 0.1}),
    "robust-dpo": Contract(**_PAIR, reference=True, parameters={"beta": 0.1, "epsilon": 0.1}),
    "dpop": Contract(**_PAIR, reference=True, parameters={"beta": 0.1, "penalty": 50.0}),
    "ipo": Contract(**_PAIR, reference=True, parameters={"tau": 0.1, "token_means": False}),
    "slic-hf": Contract(**_PAIR, reference=False, parameters={"delta": 1.0, "weight": 0.1}),
    "simpo": Contract(**_PAIR, reference=False, parameters={"beta": 2.0, "gamma": 1.0}, unit="means"),
    "kto": Contract(
        "many",
        negative=True,
        reference=True,
        parameters={"beta": 0.1, "desirable": 1.0, "undesirable": 1.0},
        mismatched=True,
    ),
    "orpo": Contract(**_PAIR, reference=False, parameters={"weight": 0.1}, unit="means"),
    "npo": Contract("none", negative=True, reference=True, parameters={"beta": 0.1}),
    "ga": Contract("none", negative=True, reference=False, unit="means"),
    "unlikelihood": Contract("any", negative=True, reference=False, unit="means"),
    "sft": Contract("many", negative=False, reference=False, unit="means"),
}

# Every key of a method that at least one loss reads.
PARAMETERS = {key for contract in CONTRACTS.values() for key in contract.parameters}
