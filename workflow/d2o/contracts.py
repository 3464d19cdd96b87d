"""What each loss of the zoo takes. No torch here: a method that cannot be served is refused before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Contract:
    """What a loss needs of a response group and of its method's settings.

    Attributes:
        positives: how many positives a group holds: `none`, `one`, `many` (one or more) or `any` (zero or more).
        negative: whether it takes the human negative.
        reference: whether it compares with the log-probs of the reference model.
        parameters: the keys of a method that it reads, with their defaults.
        unit: whether it compares log-probs as `sums` over a response's tokens or as `means` per token.
        mismatched: whether it also needs the log-ratios of answers under the prompts of other groups.
    """

    positives: Literal["none", "one", "many", "any"]
    negative: bool
    reference: bool
    parameters: Mapping[str, float] = field(default_factory=dict)
    unit: Literal["sums", "means"] = "sums"
    mismatched: bool = False


_PAIR = {"positives": "one", "negative": True}

# β = 0.1 for every method, as in the paper; SimPO's is its authors' advice, for per-token log-probs are small.
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
    "unlikelihood": Contract("any", negative=True, reference=False),
    "sft": Contract("many", negative=False, reference=False, unit="means"),
}

# Every key of a method that some loss reads.
PARAMETERS = {key for contract in CONTRACTS.values() for key in contract.parameters}
