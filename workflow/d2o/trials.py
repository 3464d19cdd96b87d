"""Trials of a method: the combinations of the values that its `tune` lists, each a method of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2o.settings import TrainStage

# Keys on which the inputs of a training depend: the plan must know them before any trial has run.
FIXED = {"extends", "loss", "positives", "negatives", "pairs", "k", "self_correction", "filter", "online", "tune",
         "train", "ema", "train.steps", "train.snapshots", "train.ranks", "train.nodes"}  # fmt: skip


def combinations(tune: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of one value per key; a single empty one where nothing is tuned."""
    return [dict(zip(tune, values, strict=True)) for values in product(*tune.values())]


def names(method: str, tune: Mapping[str, Sequence[Any]]) -> list[str]:
    """The names of a method's trials, such as `dpo.trial-3fa2c1`; none where it has no `tune`.

    A name contains a digest of the values, so that a trial stays the same when others are added.
    """
    return [f"{method}.trial-{_digest(values)}" for values in combinations(tune)] if tune else []


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]


def parted(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split chosen values into keys of the method itself and keys of its section `train`."""
    train = {key.removeprefix("train."): value for key, value in values.items() if key.startswith("train.")}
    return {key: value for key, value in values.items() if not key.startswith("train.")}, train


def with_trials(methods: dict[str, Any]) -> dict[str, Any]:
    """Methods, not validated yet, with the trials of those with `tune` added where they are missing.

    Raises:
        ValueError: where `tune` has a key that must be known beforehand.
    """
    whole = dict(methods)
    for method, own in methods.items():
        tune = own.get("tune") if isinstance(own, dict) else None
        if not isinstance(tune, dict) or not all(isinstance(values, list) for values in tune.values()):
            continue
        if fixed := sorted(FIXED & tune.keys()):
            raise ValueError(f"methods.{method}.tune: {fixed[0]} cannot be tuned; make a method for each value")
        for trial, values in zip(names(method, tune), combinations(tune), strict=False):
            keys, train = parted(values)
            rest = {key: value for key, value in own.items() if key not in ("tune", "extends")}
            # No snapshots: trials are compared at their end.
            train = {**(own.get("train") or {}), "snapshots": [], **train}
            whole.setdefault(trial, {**rest, **keys, "train": train})
    return whole


def tuned(stage: TrainStage, choice: Path) -> TrainStage:
    """The stage with the values that the stage `tune` has chosen; errors as `records.check_file`."""
    from d2o import records  # which the settings, that import this, must not load

    keys, train = parted(json.loads(records.check_file(choice).read_text())["chosen"])
    whole = stage.model_dump()
    return type(stage).model_validate(
        {**whole, "method": {**whole["method"], **keys}, "train": {**whole["train"], **train}}
    )
