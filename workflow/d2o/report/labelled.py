"""Accuracy of the refusal rules on labelled answers, `labelled.jsonl`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from d2o import refusals

# Who gave the labelled answers.
ORIGINS = ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct under D2O", "hand")
_LABELLED = Path(__file__).with_suffix(".jsonl")


class Accuracy(NamedTuple):
    """Agreement of the rules with the labels on one kind of refusal, for answers of one origin.

    Attributes:
        predicted: number of answers that the rules assign to the kind.
        labelled: number of answers that are labelled with it.
        right: number of answers that are both.
    """

    predicted: int
    labelled: int
    right: int


@cache
def accuracy(wanted: refusals.Kind, by: str) -> Accuracy:
    """Accuracy of the rules for one kind, on labelled answers.

    280 answers: of SmolLM2-135M-Instruct to prompts of XSTest (125) and PKU-SafeRLHF (20), of the same model after 18
    steps of D2O to both (60, a random sample), and written to be hard (75). The language model that wrote these rules
    and the hard answers labelled all of them. The rules were written with every second answer at hand, and are
    measured on the others. For answers under D2O the rules were changed after all of these had been read, including
    the measured ones; the 20 were added later, and no rule was changed for them.

    Args:
        by: who gave the answers, one of `ORIGINS`.
    """
    lines = _LABELLED.read_text(encoding="utf-8").splitlines()[1::2]
    rows = [row for line in lines if (row := json.loads(line))["by"] == by]
    predicted, labelled = [refusals.kind(row["text"]) for row in rows], [row["kind"] for row in rows]
    right = sum(pair == (wanted, wanted) for pair in zip(predicted, labelled, strict=True))
    return Accuracy(predicted.count(wanted), labelled.count(wanted), right)
