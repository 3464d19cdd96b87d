"""The crossing of a config's names: which artifacts each experiment needs, what a method takes, which weights go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from d2o import layout, rounds, runs, settings, trials
from d2o.contracts import CONTRACTS
from d2o.layout import Layout
from d2o.plan import artifacts, checks, stages

# For each wildcard, the wildcards that must be known before it.
_NEEDS = {"organism": {"dataset"}, "seed": {"method"}, "snapshot": {"method"}}
_NEEDS |= {name: {"dataset", "model", "method", "seed"} for name in ("round", "pool", "table")}


class Crossing:
    """A config's names, crossed: one row per artifact that an experiment needs, and the artifact's path."""

    def __init__(self, s: settings.Settings):
        """
        Args:
            s: the config.
        """
        self.settings, self.layout = s, Layout(s.results)

    def targets(self, place: str, *experiments: str) -> list[str]:
        """Every artifact of one kind that experiments need, each once; of all experiments where none is named.

        The wildcards of the artifact's path determine which names are crossed.
        """
        names = experiments or self.settings.experiments
        paths = (self.layout.path(place, row) for name in names for row in self.crossed(place, name))
        return list(dict.fromkeys(paths))

    def crossed(self, place: str, experiment: str) -> list[dict[str, Any]]:
        """One row of names per artifact of a kind that an experiment needs."""
        e = self.settings.experiments[experiment]
        wanted = layout.wildcards(place)
        wanted |= {need for name in wanted for need in _NEEDS.get(name, ())}
        key = artifacts.of(place).only_with
        has = not key or getattr(e, key)
        rows: list[dict[str, Any]] = [{"experiment": experiment}] if has else []
        for name, choices in self._choices(e, place).items():
            if name in wanted:
                rows = [row | {name: choice} for row in rows for choice in choices(row)]
        return rows

    def _choices(self, e: settings.Experiment, place: str) -> dict[str, Callable[[Mapping], Sequence]]:
        """The values of each wildcard in an experiment, given the wildcards before it."""
        methods = e.methods if artifacts.of(place).of_initial else runs.trained(e)
        if place == "tuned":
            methods = [m for m in methods if self.settings.methods[m].tune and runs.seeds(e, m)]
        if place == "released":
            tuned = [method for method in methods if runs.seeds(e, method)]
            methods += [trial for method in tuned for trial in stages.finished_trials(self.settings, method)]
        return {
            "dataset": lambda row: e.datasets,
            "model": lambda row: e.models,
            "method": lambda row: methods,
            "seed": lambda row: self._seeds(e, row, place),
            "organism": lambda row: [o] if (o := self.settings.datasets[row["dataset"]].organism) else [],
            "split": lambda row: ["train"],
            "snapshot": lambda row: ["", *(f"/step{step}" for step in self._snapshots(row["method"]))],
            "round": lambda row: self.rounds_of(row["method"]),
            "pool": self.pools,
            "table": self.reference_tables,
            "reward": lambda row: self.filters(row) if "pool" in row else e.rewards,
            "judge": lambda row: e.judges,
            "task": lambda row: e.tasks,
            "preference": lambda row: ["chosen", "rejected"],
        }

    def _seeds(self, e: settings.Experiment, row: Mapping[str, Any], place: str) -> list[int]:
        method = row["method"]
        seeds = runs.seeds(e, method) if method in e.methods else [self.settings.tuning.seed]
        return [seed for seed in seeds if place != "released" or self.keep({**row, "seed": seed}) != "model"]

    # Weights that go -----------------------------------------------------------------------------

    def keep(self, run: Any) -> str:
        """Which of a training's weights stay: the most that any of its experiments' `keep` asks for, or all of them
        where another model is made from them."""
        names = _training(dict(run.items()))
        sources = [_training(model.run.model_dump()) for model in self.settings.models.values() if model.run]
        keeps = {self.settings.experiments[name].keep for name in self._having(names)}
        most = next((keep for keep in get_args(settings.Keep) if keep in keeps), "model")
        return "model" if names in sources else most

    def made_from_weights(self, wildcards) -> list[str]:
        """The artifacts that all experiments make from a training's weights; for a trial, also the choice."""
        run = _training(dict(wildcards.items()))
        having = self._having(run)
        places = [place for place, artifact in artifacts.ARTIFACTS.items() if artifact.of_weights]
        rows = ((place, row) for place in places for name in having for row in self.crossed(place, name))
        made = [self.layout.path(place, row) for place, row in rows if _training(row) == run]
        if any(run["method"] not in self.settings.experiments[name].methods for name in having):
            made.append(self.layout.path("tuned", run, method=self._trial_of(run["method"])))
        return list(dict.fromkeys(made))

    def _having(self, run: Mapping[str, Any]) -> list[str]:
        """The experiments that have a training; for a trial, also those that have its method."""
        trial_of = self._trial_of(run["method"])
        return [
            name
            for name, e in self.settings.experiments.items()
            if runs.has(e, run)
            or (run["dataset"] in e.datasets and run["model"] in e.models
                and trial_of in e.methods and runs.seeds(e, trial_of))
        ]  # fmt: skip

    def _trial_of(self, name: str) -> str | None:
        """The method that a trial is of; None for another name."""
        methods = self.settings.methods.items()
        return next((method for method, entry in methods if name in trials.names(method, entry.tune)), None)

    def released_after(self, experiment: str) -> list[str]:
        """The releases of weights of trainings that only this experiment has: it waits for no other experiment."""
        own = (row for row in self.crossed("released", experiment) if self._having(row) == [experiment])
        return [self.layout.path("released", row) for row in own]

    # What a method takes -------------------------------------------------------------------------

    def pools(self, run: Mapping[str, Any]) -> list[str]:
        """The pool of self-generated answers that a run takes its positives from: none, or one."""
        method = self.settings.methods[run["method"]]
        if method.positives != "self":
            return []
        kind = "corrected" if method.self_correction else "plain"
        if self.settings.positives.per_seed:
            kind += f"-seed{run['seed']}"
        return [self._smaller_pool(run, kind) or f"{kind}-k{self.settings.positives.k}"]

    def _smaller_pool(self, run: Mapping[str, Any], kind: str) -> str | None:
        """The smallest existing pool that gives a run the same positives as the config's would.

        A method takes the first `k` usable samples of each prompt: where a pool has `k` of every prompt, a larger one
        gives the same samples.
        """
        method, largest = self.settings.methods[run["method"]], self.settings.positives.k
        pools = Path(self.layout.path("pool", run, pool="")).parent.glob(f"{kind}-k*.parquet.manifest.json")
        names = sorted((path.name.partition(".")[0] for path in pools), key=stages.size)
        for name in names if not method.filter else []:
            usable = checks.manifest(self.layout.path("pool", run, pool=name)).get("fewest_usable", 0)
            enough = method.k <= min(usable, stages.size(name)) and stages.size(name) < largest
            if enough and self.as_before({**run, "pool": name}):
                return name
        return None

    def as_before(self, names: Mapping[str, Any]) -> bool:
        """Whether an existing pool would come out the same, as far as settings determine it."""
        w = SimpleNamespace(**names)
        return all(
            checks.unchanged(self.layout.path(place, names), stages.of(self.settings, artifacts.of(place).stage, w))
            for place in ("pool", "negatives", "rows", "model")
        )

    def human_table(self, method: str) -> str:
        """The table of human answers that a method sees: `negatives` or `pairs`."""
        return "pairs" if self.settings.methods[method].pairs == "all" else "negatives"

    def reference_tables(self, run: Mapping[str, Any]) -> list[str]:
        """The tables whose responses a run needs under the reference model."""
        method = self.settings.methods[run["method"]]
        if not CONTRACTS[method.loss].reference or method.ema:
            return []
        human = method.negatives or method.positives in ("human", "safe-human")
        return self.pools(run) + ([self.human_table(run["method"])] if human else [])

    def filters(self, run: Mapping[str, Any]) -> list[str]:
        """The reward model that a run filters its pool by: none, or one."""
        chosen = self.settings.methods[run["method"]].filter
        return [chosen.reward] if chosen else []

    def _snapshots(self, method: str) -> list[int]:
        return [] if method == "initial" else runs.train_of(self.settings, self.settings.methods[method]).snapshots

    def rounds_of(self, method: str) -> range:
        """The numbers of a method's online rounds."""
        entry = self.settings.methods[method]
        return rounds.numbers(entry, runs.train_of(self.settings, entry).steps)


def _training(names: Mapping[str, Any]) -> dict[str, str]:
    """The names of a training, taken from the names of one of its artifacts."""
    return {key: str(names[key]) for key in ("dataset", "model", "method", "seed")}
