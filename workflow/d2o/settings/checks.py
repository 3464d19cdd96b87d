"""Checks that involve several keys: entries that name one another, methods that extend others, methods and losses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from d2o import runs, trials
from d2o.contracts import CONTRACTS, PARAMETERS
from d2o.settings.messages import lines, suggestion
from d2o.splits import SPLITS

if TYPE_CHECKING:
    from d2o.settings import Experiment, Method, Settings

# The sections whose entries are named by others.
KINDS = ("organisms", "datasets", "models", "methods", "rewards", "judges", "tasks")
# Names that a section's entries must not have, in lower case: beside the entries' folders in results/ there are
# folders, or the tracked page, of these names.
_RESERVED = {
    "experiments": {"logs"},
    "organisms": {"logs"},
    "datasets": {"organisms", "models", "rewards", "tasks", "reports", "benchmarks", "readme.md"},
    "models": {"leaks", "logs", "pair_quality", "rewards"},
    "methods": {"initial", "logs", "positives", "reference_logprobs"},
    "rewards": {"logs"},
    "tasks": {"logs"},
}


def extended(methods: dict[str, Any]) -> dict[str, Any]:
    """Methods, not validated yet, with what they extend filled in; `train` is merged key by key.

    Raises:
        ValueError: where a method extends itself, or one that does not exist.
    """
    done: dict[str, Any] = {}

    def resolve(name: str, chain: tuple[str, ...]) -> Any:
        own = methods[name]
        if name in done or not isinstance(own, dict) or not own.get("extends"):
            return done.setdefault(name, own)
        parent = own["extends"]
        if not isinstance(parent, str):
            return done.setdefault(name, own)
        if parent in (*chain, name):
            raise ValueError(f"methods.{name}.extends: {' → '.join((*chain, name, parent))} is a circle")
        if parent not in methods:
            raise ValueError(
                f"methods.{name}.extends: {parent!r} is not an entry of methods" + suggestion(parent, methods)
            )
        base = resolve(parent, (*chain, name))
        if not isinstance(base, dict):
            return own
        trains = [one.get("train") or {} for one in (base, own)]
        if not all(isinstance(train, dict) for train in trains):
            return own
        merged = {**base, **own, "train": {**trains[0], **trains[1]}}
        # A parameter of the parent's loss that this method's loss does not read is not inherited.
        read = _parameters(merged.get("loss"))
        done[name] = {key: value for key, value in merged.items() if key in own or key not in PARAMETERS - read}
        return done[name]

    return {name: resolve(name, ()) for name in methods}


def with_k(methods: dict[str, Any], pool: Any) -> dict[str, Any]:
    """Methods, not validated yet, with a missing `k` filled in: the `best` of a filter, or the size of the `pool`."""

    def k(own: dict[str, Any]) -> Any:
        return own["filter"].get("best") if isinstance(own.get("filter"), dict) else pool

    return {
        name: {**own, "k": k(own)}
        if isinstance(own, dict) and own.get("positives") == "self" and own.get("k") is None
        else own
        for name, own in methods.items()
    }


def problems(settings: Settings) -> Iterator[str]:
    """Problems between the sections of a config, one message each."""
    for kind, names in _RESERVED.items():
        for name in (name for name in getattr(settings, kind) if name.lower() in names):
            yield f"{kind}.{name}: this name is taken in results/; choose another"
    for kind in ("models", "methods"):  # folders where tables and choices lie beside them
        for name in getattr(settings, kind):
            if name.endswith((".parquet", ".json", ".jsonl")):
                yield f"{kind}.{name}: this is a name for a file; choose another"
    for kind in (*KINDS, "experiments"):
        by_folder: dict[str, str] = {}
        for name in getattr(settings, kind):
            if (other := by_folder.setdefault(name.lower(), name)) != name:
                yield f"{kind}.{name}: {other} differs by case only, which some file systems do not see"
    if settings.engine.tensor_parallel > max(1, settings.compute.gpus):
        yield (
            f"engine.tensor_parallel: {settings.engine.tensor_parallel} GPUs are to share a model, and a job has "
            f"{settings.compute.gpus}; raise compute.gpus"
        )
    missing = list(_missing(settings))
    yield from missing
    if not missing:
        yield from _circles(settings)
    for name, experiment in settings.experiments.items():
        if not missing:
            yield from (f"experiments.{name}.{problem}" for problem in _of_experiment(settings, experiment))
            yield from (f"experiments.{name}.{problem}" for problem in _of_trials(settings, experiment))
    folders: dict[str, str] = {}
    for name, experiment in settings.experiments.items():
        if experiment.human_eval:
            folder = os.path.normpath(experiment.human_eval.answers)
            if (other := folders.setdefault(folder, name)) != name:
                yield f"experiments.{name}.human_eval.answers: {folder} is that of {other}; name another folder"
    for name, dataset in settings.datasets.items():
        if dataset.organism and (strange := {*dataset.train, *dataset.test}.difference(SPLITS)):
            yield f"datasets.{name}: {min(strange)!r} is no split of an organism" + suggestion(min(strange), SPLITS)
    for name, method in settings.methods.items():
        if problem := against_loss(method):
            yield f"methods.{name}: {problem}"
        if method.k and method.k > settings.positives.k:
            yield (
                f"methods.{name}.k: {method.k} positives are asked of a pool of {settings.positives.k}; "
                f"raise positives.k"
            )
        try:
            steps = runs.train_of(settings, method).steps
        except ValidationError as error:
            yield from lines(error, type(settings.train), f"methods.{name}.train")
            continue
        if method.online and (steps is None or method.online.start >= steps):
            yield (
                f"methods.{name}.online: the first round lies after step {method.online.start}; "
                f"set methods.{name}.train.steps to more than that, not {steps or 'null'}"
            )


def _of_experiment(settings: Settings, experiment: Experiment) -> Iterator[str]:
    """Problems of an experiment's comparisons, tables, human evaluation, and entries of `failed`."""
    trained = runs.trained(experiment)
    seen = set()
    for pair in experiment.comparisons:
        for method in pair:
            if method not in experiment.methods:
                yield f"comparisons: {method!r} is not among the methods" + suggestion(method, experiment.methods)
        if pair[0] == pair[1]:
            yield f"comparisons: {pair[0]} is compared with itself"
        elif frozenset(pair) in seen:
            yield f"comparisons: {' and '.join(pair)} are compared twice"
        seen.add(frozenset(pair))
    if "table2" in experiment.shows and len(trained) < 2:
        yield "shows: table2 compares trained methods; name two or more in `methods`"
    if people := experiment.human_eval:
        for method in people.methods:
            if method not in trained:
                yield f"human_eval.methods: {method!r} is no trained method of the experiment" + suggestion(
                    method, trained
                )
        for seed in people.seeds:
            if seed not in experiment.seeds:
                yield f"human_eval.seeds: {seed} is no seed of the experiment, which has {experiment.seeds}"
        if not trained:
            yield "human_eval: nothing is compared with the initial model; name another one in `methods`"
    known = [*trained, *(f"{method}/seed{seed}" for method in trained for seed in experiment.seeds)]
    known += [trial for method in trained for trial in trials.names(method, settings.methods[method].tune)]
    for failed in experiment.failed.keys() - known:
        yield f"failed.{failed}: no such method or training" + suggestion(failed, known)


def _of_trials(settings: Settings, experiment: Experiment) -> Iterator[str]:
    """Problems of the trials of an experiment's methods: each must have the same number, and prompts to choose by."""
    methods = {name: settings.methods[name] for name in runs.trained(experiment)}
    counts = {name: len(trials.combinations(method.tune)) for name, method in methods.items()}
    if not any(method.tune for method in methods.values()):
        return
    fewest, most = min(counts, key=counts.get), max(counts, key=counts.get)
    if counts[fewest] != counts[most]:
        yield (
            f"methods: {most} is tuned in {counts[most]} trials and {fewest} in {counts[fewest]}, which is no fair "
            f"comparison; give each `tune` as many combinations"
        )
    for dataset in experiment.datasets:
        if not settings.datasets[dataset].validation_prompts:
            yield f"datasets: {dataset} has no prompts to tune by; set datasets.{dataset}.validation_prompts"
    kind, _, name = (settings.tuning.metric or "").partition("/")
    if kind not in ("reward", "human", "answers") or (kind == "reward" and name not in settings.rewards):
        yield (
            f"tuning.metric: set it to a metric of answers or log-probs, such as reward/NAME, not "
            f"{settings.tuning.metric or 'null'}"
        )


def names_in(kind: str, name: str, entry: Any) -> Iterator[tuple[str, str, str]]:
    """Every name of another entry in an entry: the key that has it, the name, and the section of the other entry."""
    place = f"{kind}.{name}"
    match kind:
        case "experiments":
            for section in KINDS:
                for wanted in getattr(entry, section, ()):
                    if (section, wanted) != ("methods", "initial"):
                        yield f"{place}.{section}", wanted, section
        case "datasets" if entry.organism:
            yield f"{place}.organism", entry.organism, "organisms"
        case "models" if entry.run:
            for key in ("dataset", "model", "method"):
                yield f"{place}.run.{key}", getattr(entry.run, key), f"{key}s"
        case "rewards" if entry.train:
            yield f"{place}.train.backbone", entry.train.backbone, "models"
        case "methods":
            if entry.extends:
                yield f"{place}.extends", entry.extends, "methods"
            if entry.filter:
                yield f"{place}.filter.reward", entry.filter.reward, "rewards"
            yield from ((f"{place}.tune", trial, "methods") for trial in trials.names(name, entry.tune))


def _missing(settings: Settings) -> Iterator[str]:
    """Names of entries that do not exist."""
    for kind in ("experiments", *KINDS):
        for name, entry in getattr(settings, kind).items():
            for key, wanted, section in names_in(kind, name, entry):
                if wanted not in getattr(settings, section):
                    known = [*getattr(settings, section), *(["initial"] if key.endswith(".methods") else [])]
                    yield f"{key}: {wanted!r} is not an entry of {section}" + suggestion(wanted, known)


def _circles(settings: Settings) -> Iterator[str]:
    """Models that are made from themselves: through runs, or through the reward models that runs filter with."""

    def made_from(kind: str, name: str, chain: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...] | None:
        if (kind, name) in chain:
            return (*chain[chain.index((kind, name)) :], (kind, name))
        entry = getattr(settings, kind)[name]
        for _, wanted, section in names_in(kind, name, entry):
            if section in ("models", "methods", "rewards") and (
                circle := made_from(section, wanted, (*chain, (kind, name)))
            ):
                return circle
        return None

    for name, model in settings.models.items():
        if not model.run or not (circle := made_from("models", name, ())):
            continue
        models = [wanted for kind, wanted in circle if kind == "models"]
        if name == min(models) == models[0]:  # each circle once
            path = " → ".join(models)
            yield f"models.{name}.run: {path} is a circle; a model cannot be made from itself"


def against_loss(method: Method) -> str | None:
    """Why a method's parameters or view of the group do not fit its loss, or None."""
    contract = CONTRACTS[method.loss]
    for key in sorted(PARAMETERS - _parameters(method.loss)):
        if getattr(method, key) is not None:
            return f"the loss {method.loss} reads no `{key}`; it reads: {', '.join(contract.parameters) or 'none'}"
    if method.beta == 0 and not method.alpha:
        return f"the loss {method.loss} learns nothing with `beta: 0`"
    if contract.negative != method.negatives:
        wanted = "needs `negatives: true`" if contract.negative else "takes no negatives"
        return f"the loss {method.loss} {wanted}"
    if contract.positives == "none" and method.positives != "none":
        return f"the loss {method.loss} takes no positives: leave `positives` out"
    if contract.positives in ("one", "many") and method.positives == "none":
        return f"the loss {method.loss} needs `positives`: self, human or safe-human"
    if method.ema and (contract.mismatched or not contract.reference):
        return f"the loss {method.loss} takes no moving references: leave `ema` out"
    if method.filter and method.positives != "self":
        return "filter: it chooses among self-generated answers: set `positives: self`"
    if method.filter and method.filter.best < method.k:
        return f"filter.best: {method.filter.best} samples cannot give the {method.k} positives of `k`"
    if method.online and (contract.mismatched or method.positives != "self"):
        wanted = "takes no online rounds" if contract.mismatched else "takes them with `positives: self` alone"
        return f"online: the loss {method.loss} {wanted}"
    if contract.positives == "one" and method.positives == "self" and method.k != 1:
        return f"the loss {method.loss} takes one positive a group: set `k: 1`"
    return None


def _parameters(loss: Any) -> set[str]:
    """The parameters that a loss reads; all parameters for an unknown loss, which is reported elsewhere."""
    contract = CONTRACTS.get(str(loss))
    return set(contract.parameters) if contract else PARAMETERS
