"""What each stage depends on: its settings, and its entries of the tables that it uses."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from d2o import rounds, runs, settings, trials
from d2o.layout import Layout
from d2o.settings import Settings


def of(s: Settings, stage: str, w: Any) -> settings.Section:
    """The settings of a stage, for the names in `w`."""
    match stage:
        case "models":
            return s.models[w.model]
        case "organisms":
            return s.organisms[w.organism]
        case "datasets":
            return _reading(s, s.datasets[w.dataset])
        case "negatives":
            return _part(settings.Extraction, s.datasets[w.dataset])
        case "pair_quality":
            return s.pair_quality
        case "positives":
            return pool(s, w.pool)
        case "sampling":  # common to all pools and rounds, for the keys that state how jobs run
            return settings.PositivesStage(sampling=s.positives, engine=s.engine)
        case "rounds":
            method = s.methods[w.method]
            sampling = _sampling(
                s,
                method.self_correction,
                k=max(1, rounds.count(method.online, method.k)),
                # Its own seed: with the pool's, a policy that has changed little would repeat the pool's answers.
                seed=random.Random(f"{s.positives.seed} {w.seed} {w.round}").getrandbits(31),
            )
            return settings.PositivesStage(sampling=sampling, engine=s.engine)
        case "logprobs":
            return s.forward
        case "train":
            method = s.methods[w.method]
            return settings.TrainStage(
                method=method.model_copy(update={"extends": None, "train": {}, "tune": {}}),
                train=runs.train_of(s, method),
                forward=s.forward,
                better=s.rewards[method.filter.reward].better if method.filter else None,
                seed=int(w.seed),
            )
        case "tune":
            kind, _, name = s.tuning.metric.partition("/")
            return settings.TuneStage(
                tuning=s.tuning,
                trials=finished_trials(s, w.method),
                reward=of(s, "scores", SimpleNamespace(reward=name)) if kind == "reward" else None,
            )
        case "responses":
            return settings.ResponsesStage(sampling=s.responses, engine=s.engine, seed=int(w.seed))
        case "rewards" | "scores":
            # Only the report depends on which scores count as toxic or safe.
            return s.rewards[w.reward].model_copy(update={"toxic_above": None, "safe_at": None})
        case "judge":
            return s.judges[w.judge]
        case "human_eval":
            e = s.experiments[w.experiment]
            people = e.human_eval
            seeds = {"initial": runs.seeds(e, "initial")}
            for method in people.methods or runs.trained(e):
                if own := [seed for seed in runs.seeds(e, method) if seed in (people.seeds or e.seeds)]:
                    seeds[method] = own
            return settings.HumanEvalStage(
                pages=_part(settings.HumanPages, people), datasets=e.datasets, models=e.models, seeds=seeds
            )
        case "human_verdicts":
            return _part(settings.HumanVerdicts, s.experiments[w.experiment].human_eval)
        case "questions":
            return _part(settings.Questions, s.tasks[w.task])
        case "tasks":
            return s.tasks[w.task]
        case "report":
            return s.only(w.experiment)
        case "card":
            names = {key: getattr(w, key) for key in settings.TrainedRun.model_fields}
            config = s.only(carded(s, w))
            return settings.CardStage(
                run=settings.TrainedRun.model_validate(names),
                settings=config,
                licences=_licences(config),
                watts=s.compute.watts,
            )
    raise KeyError(stage)


def carded(s: Settings, w: Any) -> str:
    """The experiment whose report a training's card quotes: the first one that has the training."""
    return next(name for name, e in s.experiments.items() if runs.has(e, vars(w)))


def _licences(s: Settings) -> dict[str, str]:
    """By entry, such as `models.smollm2`: the licence that the config states."""
    entries = {
        f"{kind}.{name}": entry
        for kind in ("models", "datasets", "organisms", "rewards")
        for name, entry in getattr(s, kind).items()
    }
    sources = {key: entry.source if key.startswith("rewards.") else entry for key, entry in entries.items()}
    return {key: source.licence for key, source in sources.items() if source and source.licence}


def finished_trials(s: Settings, method: str) -> dict[str, dict[str, Any]]:
    """The trials of a method, each with its values, without those that an experiment lists as failed."""
    tune = s.methods[method].tune
    if not tune:
        return {}
    failed = {name for experiment in s.experiments.values() for name in experiment.failed}
    named = zip(trials.names(method, tune), trials.combinations(tune), strict=True)
    return {name: values for name, values in named if name not in failed}


def entries(s: Settings, stage: str, w: Any) -> tuple[str, ...] | None:
    """The entries of the tables in `sources` that a stage uses, such as a training's loss. None: it may use all."""
    match stage:
        case "models":
            return (template,) if (template := s.models[w.model].chat_template) else ()
        case "tune":
            return (s.tuning.metric,)
        case "train":
            return (s.methods[w.method].loss,)
        case "datasets":
            return (s.datasets[w.dataset].format,)
    return None


def pool(s: Settings, name: str) -> settings.PositivesStage:
    """The settings of a pool, such as `corrected-k11` or, for the trainings of one seed, `plain-seed1-k11`."""
    kind, *seed = name.partition("-k")[0].split("-seed")
    own = {"seed": s.positives.seed + int(seed[0])} if seed else {}
    return settings.PositivesStage(sampling=_sampling(s, kind == "corrected", k=size(name), **own), engine=s.engine)


def size(name: str) -> int:
    """The samples per prompt of a pool, by its name."""
    return int(name.rpartition("-k")[2])


def _sampling(s: Settings, corrected: bool, **changed: Any) -> settings.Positives:
    """How a pool is sampled: one without self-correction has no instructions."""
    return s.positives.model_copy(update=changed if corrected else changed | {"instructions": {}})


def _reading(s: Settings, dataset: settings.Dataset) -> settings.Reading:
    """How a data set is read; the splits of an organism are files."""
    files = {}
    if dataset.organism:
        place = Layout(s.results).path
        for split in ("train", "test"):
            names = getattr(dataset, split)
            files[split] = [place("organism", organism=dataset.organism, split=name) for name in names]
    return _part(settings.Reading, dataset, organism=None, **files)


def _part(section: type[settings.Section], whole: settings.Section, **changed: Any) -> settings.Section:
    """The keys of `whole` that `section` declares."""
    return section.model_validate(whole.model_dump(include=set(section.model_fields)) | changed)
