"""Checks before the first job: missing files, entries that cannot work, artifacts that will be replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from d2o import checksums, layout, runs, settings
from d2o.errors import D2OError
from d2o.layout import Layout
from d2o.plan import stages
from d2o.plan.artifacts import ARTIFACTS
from d2o.settings import Settings
from d2o.settings.checks import KINDS
from d2o.settings.messages import suggestion


def check(s: Settings, origin: str) -> None:
    """Raise D2OError where a file or folder of a config does not exist, or an entry cannot work."""
    for key, path in _files(s):
        if not os.path.exists(path):  # noqa: PTH110 - Path raises where a name is too long
            raise D2OError(f"{origin}: {key}: no such file or folder: {path} (looked in {Path.cwd()})")
    for problem in _problems(s):
        raise D2OError(f"{origin}: {problem}")


def _files(s: Settings) -> Iterator[tuple[str, str]]:
    """Each local file or folder of a config, and the key that names it."""
    yield from ((f"models.{name}.path", model.path) for name, model in s.models.items() if model.path)
    yield from ((f"tasks.{name}.{key}", path) for name, task in s.tasks.items() for key, path in task.local())
    for name, reward in s.rewards.items():
        if reward.source and reward.source.path:
            yield f"rewards.{name}.source.path", reward.source.path
        if reward.rule and reward.rule.organism:
            yield f"rewards.{name}.rule.organism", reward.rule.organism
    yield from ((f"organisms.{name}.texts", organism.texts) for name, organism in s.organisms.items())
    for name, dataset in s.datasets.items():
        if not (dataset.hub or dataset.organism):
            yield from ((f"datasets.{name}.train", path) for path in dataset.train)
            yield from ((f"datasets.{name}.test", path) for path in dataset.test)
        yield from ((f"datasets.{name}.evaluation_prompts", path) for path in dataset.evaluation_prompts)


# Limit of the bytes in the paths of an experiment's data sets: its report gets them in one argument. Linux allows
# 131,072.
_LONGEST = 100_000


def _problems(s: Settings) -> Iterator[str]:
    """Problems of models, data sets, tasks, methods, experiments, organisms and rules, one message each."""
    made = {
        layout.below("run", run.names)
        for experiment in s.experiments.values()
        for dataset, model in product(experiment.datasets, experiment.models)
        for run in runs.runs(experiment, dataset, model)
    }
    for name, model in s.models.items():
        if model.run and (run := layout.below("run", model.run.model_dump())) not in made:
            yield (
                f"models.{name}.run: no experiment makes {run}; add its data set, model, method and seed to one"
                + suggestion(run, made)
            )
    for name, dataset in s.datasets.items():
        paths = [] if dataset.hub or dataset.organism else [*dataset.train, *dataset.test]
        for path in filter(os.path.isdir, paths):
            from d2o import datasets

            try:
                datasets.files(path)
            except D2OError as error:
                yield f"datasets.{name}: {error}"
    for name, task in s.tasks.items():
        if task.task:
            from d2o import harness

            if problem := harness.problem(task.task, task.include):
                yield f"tasks.{name}.task: {problem}"
    tuned = sorted(name for name, method in s.methods.items() if method.tune)
    if tuned and not s.tuning.metric.startswith("reward/"):
        from d2o import metrics

        if s.tuning.metric not in (known := metrics.CHOOSABLE):
            yield f"tuning.metric: {s.tuning.metric!r} says not which trial is better" + suggestion(
                s.tuning.metric, known
            )
    for name in tuned:
        if not stages.finished_trials(s, name):
            yield f"methods.{name}.tune: all of its trials failed; say so of the method"
    for name, experiment in s.experiments.items():
        keys = {f"datasets.{n}.{key}" for n in experiment.datasets for key in ("train", "test", "evaluation_prompts")}
        paths = [path for key, path in _files(s) if key in keys]
        if sum(len(os.fsencode(path)) for path in paths) > _LONGEST:
            yield (
                f"experiments.{name}: its data sets name {len(paths):,} files, more than a command line holds; put "
                f"them in a folder, and name it in their place"
            )
        if experiment.human_eval and len(stages.of(s, "human_eval", SimpleNamespace(experiment=name)).seeds) == 1:
            yield (
                f"experiments.{name}.human_eval: every training that it asks about has failed, and the initial model "
                f"is left; name other methods or seeds, or leave it out"
            )
    for name, organism in s.organisms.items():
        from d2o.organisms import load

        try:
            load(Path(organism.texts))
        except D2OError as error:
            yield f"organisms.{name}.texts: {error}"
    for name, reward in s.rewards.items():
        if reward.rule:
            from d2o import exact

            if problem := exact.problem(reward.rule):
                yield f"rewards.{name}.rule.{problem}"


# A date such as 2024-08-06, 20240806 or 0613.
_DATE = re.compile(r"(?<!\d)(\d{4}-?\d{2}-?\d{2}|[01]\d[0-3]\d)(?!\d)")


def undated(s: Settings) -> Iterator[str]:
    """One line per judge of an experiment whose model may change while its name stays the same."""
    for name in sorted({judge for experiment in s.experiments.values() for judge in experiment.judges}):
        model = s.judges[name].model
        if not _DATE.search(model):
            yield (
                f"judges.{name}.model: {model!r} has no date: the model behind the name may change, and the verdicts "
                f"with it; name a dated snapshot, such as gpt-4-0613"
            )


_COMMIT = re.compile(r"[0-9a-f]{40}")


def moving(s: Settings) -> Iterator[str]:
    """One line per entry of an experiment that follows a branch or a tag of the Hub."""
    for section, used in _used(s).items():
        for name in sorted(used):
            entry = getattr(s, section)[name]
            source = entry.source if section == "rewards" else entry
            revision = getattr(source, "revision", None)
            if revision and not _COMMIT.fullmatch(revision):
                yield (
                    f"{section}.{name}: revision {revision!r} may be another one tomorrow; name the whole hash of a "
                    f"commit, 40 digits"
                )


def _used(s: Settings) -> dict[str, set[str]]:
    """The entries that experiments name, by section."""
    return {kind: set().union(*(getattr(s.only(e), kind) for e in s.experiments)) for kind in KINDS}


# Existing artifacts ------------------------------------------------------------------------------


def replaced(s: Settings, crossed: Callable[[str, str], list[dict[str, Any]]]) -> Iterator[str]:
    """One line per entry or section with an artifact of an experiment that exists, made with other settings.

    The other settings may be those of another config.

    Args:
        crossed: gives, for a place and an experiment, the names of each artifact of the place that it needs.
    """
    reported = set()
    for place, known in ARTIFACTS.items():
        section = known.section
        for names in _names(s, section, place, crossed) if section else ():
            name = names.get(section.removesuffix("s"))
            entry = f"{section}.{name}" if name else section
            artifact = Layout(s.results).path(place, names)
            changed = differing(artifact, stages.of(s, known.stage, SimpleNamespace(**names)))
            if section == "datasets" and s.datasets[name].organism:  # its files lie in the results themselves
                changed = {key: values for key, values in changed.items() if key not in ("train", "test")}
            changes = ", ".join(f"{key}: {then!r} → {now!r}" for key, (then, now) in changed.items())
            if changes and (entry, changes) not in reported and Path(artifact).exists():
                reported.add((entry, changes))
                way_out = "give the entry another name, or set" if name else "set"
                yield (
                    f"{entry}: {artifact} was made with other settings ({changes}); it will be made again, and what "
                    f"comes from it. To keep it, {way_out} `results` to another folder."
                )


def _names(
    s: Settings, section: str, place: str, crossed: Callable[[str, str], list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The names of each artifact of a place that experiments need."""
    kind = section.removesuffix("s")
    for experiment in s.experiments:
        # This includes entries that no experiment names itself, such as a backbone.
        if section != "experiments" and layout.wildcards(place) <= {kind, "split"}:
            yield from ({kind: name, "split": "train"} for name in sorted(getattr(s.only(experiment), section)))
        else:
            # What a method with `tune` is trained with is not known beforehand.
            rows = crossed(place, experiment)
            yield from (row for row in rows if place != "trained" or not s.methods[row["method"]].tune)


def manifest(artifact: str) -> dict[str, Any]:
    """The manifest of an artifact; empty where it is missing or cannot be read."""
    try:
        return checksums.manifest(layout.manifest_path(artifact).read_text(errors="replace")) or {}
    except OSError:
        return {}


def unchanged(artifact: str, section: settings.Section) -> bool:
    """Whether an artifact exists and was made with settings that give the same result."""
    return not differing(artifact, section) and bool(manifest(artifact))


def differing(artifact: str, section: settings.Section) -> dict[str, tuple[Any, Any]]:
    """By key, such as `method.beta`: the value that an artifact was made with and the new one, where they differ."""
    before = manifest(artifact).get("settings")
    if before is None:
        return {}
    now = settings.result_keys(section)
    try:
        then = settings.result_keys(type(section).model_validate(before))
    except ValidationError:  # made by another version
        then = before
    return _changes(then, now)


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By dotted key, the values that differ."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*then, *now]):
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed |= {f"{key}.{inner}": values for inner, values in _changes(before, after).items()}
        elif before != after:
            changed[key] = (before, after)
    return changed
