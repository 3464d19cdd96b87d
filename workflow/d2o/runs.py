"""The runs of an experiment, and what each trains with: defined once for the plan and the report.

Unlike settings, this module is part of the digest of what uses it: an edit here makes reports again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2o.settings import Experiment, HumanEvalStage, Method, Settings, Train

# The initial model answers once for all experiments and seeds: no experiment changes what another compares with.
INITIAL_SEED = 0


@dataclass(frozen=True)
class Run:
    """One model: a method's training with one seed, a snapshot of it after `step` steps, or the initial model."""

    dataset: str
    model: str
    method: str
    seed: int
    step: int | None = None

    @property
    def names(self) -> dict[str, Any]:
        """The names that its artifacts' paths are made of."""
        return {
            "dataset": self.dataset,
            "model": self.model,
            "method": self.method,
            "seed": self.seed,
            "snapshot": "" if self.step is None else f"/step{self.step}",
        }


def runs(experiment: Experiment, dataset: str, model: str) -> list[Run]:
    """The runs of an experiment on one data set and model, method by method, without those that failed."""
    return [Run(dataset, model, method, seed) for method in experiment.methods for seed in seeds(experiment, method)]


def seeds(experiment: Experiment, method: str) -> list[int]:
    """The seeds of a method that did not fail; of the initial model, `INITIAL_SEED`."""
    if method == "initial":
        return [INITIAL_SEED]
    failed = experiment.failed
    return [seed for seed in experiment.seeds if method not in failed and f"{method}/seed{seed}" not in failed]


def trained(experiment: Experiment) -> list[str]:
    """The methods of an experiment but `initial`."""
    return [method for method in experiment.methods if method != "initial"]


def train_of(s: Settings, method: Method) -> Train:
    """The section `train` with a method's own keys over it."""
    return s.train.model_validate({**s.train.model_dump(), **method.train})


def has(experiment: Experiment, names: Mapping[str, Any]) -> bool:
    """Whether a training, given by the names in its path, belongs to an experiment."""
    return (
        names["dataset"] in experiment.datasets
        and names["model"] in experiment.models
        and names["method"] in experiment.methods
        and int(names["seed"]) in seeds(experiment, names["method"])
    )


def compared(stage: HumanEvalStage) -> list[Run]:
    """The runs whose answers people compare, the initial model among them."""
    trainings = [(method, seed) for method, own in stage.seeds.items() for seed in own]
    return [Run(*block, *training) for block in product(stage.datasets, stage.models) for training in trainings]
