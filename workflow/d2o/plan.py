"""What Snakemake needs to know of an experiment: targets, and per rule the settings and sources it depends on.

The rules stay declarative: each asks a `Plan` for its `params`, so that changing one key of the config
redoes only what depends on that key.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from d2o import rounds, settings
from d2o.contracts import CONTRACTS
from d2o.errors import D2OError
from d2o.settings.messages import suggestion
from d2o.sources import source_digest


class Plan:
    """The crossing of an experiment's names, as paths and params."""

    def __init__(self, config: dict[str, Any], origin: str):
        """
        Args:
            config: the parsed YAML.
            origin: the file it came from, for messages.
        Raises:
            D2OError: as `settings.load`, or where a local file or folder of the config does not exist.
        """
        self.settings = settings.load(config, origin)
        self._check_files(origin)
        self._check_entries(origin)

    # Targets -------------------------------------------------------------------------------------

    def targets(self, stage: str) -> list[str]:
        """All files of a stage, over all experiments, each once."""
        return list(dict.fromkeys(path for e in self.settings.experiments for path in self._files(stage, e)))

    def report_inputs(self, wildcards) -> list[str]:
        """What an experiment's report is made from."""
        stages = ("negatives", "quality", "train", "responses", "likelihoods", "scores", "judge", "tasks")
        made = [path for stage in stages for path in self._files(stage, wildcards.experiment)]
        sheets = [path.replace(".parquet", ".sheet.json") for path in self._files("positives", wildcards.experiment)]
        sheets += [
            f"results/{run}/rounds/{number}/positives.sheet.json"
            for run in self.runs(wildcards.experiment)
            if (method := self.settings.methods.get(run.split("/")[2]))
            for number in self._rounds_of(method)
        ]
        e = self.settings.experiments[wildcards.experiment]
        crossed = product(e.datasets, e.models, (method for method in e.methods if method != "initial"))
        scores = [path for names in crossed for path in self._pool_scores(*names)]
        return list(dict.fromkeys(made + sheets + scores))

    def quality_inputs(self, wildcards) -> list[str]:
        """What Figure 1 is drawn from: scores and verdicts of the human pairs of an experiment's data sets."""
        e = self.settings.experiments[wildcards.experiment]
        sides = ("chosen", "rejected")
        folders = [f"results/{dataset}/quality" for dataset in e.datasets]
        return (
            [f"{folder}/prompts.parquet" for folder in folders]
            + [f"{folder}/scores/{r}/{side}.parquet" for folder in folders for r in e.rewards for side in sides]
            + [f"{folder}/judge/{judge}.parquet" for folder in folders for judge in e.judges]
        )

    def runs(self, experiment: str) -> Iterator[str]:
        """`dataset/model/method/seed<n>` of every run. The initial model is the same for all seeds."""
        e = self.settings.experiments[experiment]
        for dataset in e.datasets:
            for model in e.models:
                for method in e.methods:
                    for seed in e.seeds[:1] if method == "initial" else e.seeds:
                        yield f"{dataset}/{model}/{method}/seed{seed}"

    def _with_snapshots(self, runs: list[str]) -> Iterator[str]:
        """Each run, then `<run>/step<n>` of each of its snapshots."""
        for run in runs:
            yield run
            method = self.settings.methods.get(run.split("/")[2])  # none for the initial model
            for step in self.settings.train_of(method).snapshots if method else []:
                yield f"{run}/step{step}"

    def _files(self, stage: str, experiment: str) -> Iterator[str]:
        e = self.settings.experiments[experiment]
        runs = list(self.runs(experiment))
        match stage:
            case "organisms":
                for dataset in e.datasets:
                    if organism := self.settings.datasets[dataset].organism:
                        yield f"results/organisms/{organism}/train.jsonl"
            case "models":
                for model in e.models:
                    yield f"results/models/{model}/manifest.json"
            case "datasets":
                for dataset in e.datasets:
                    yield f"results/{dataset}/rows.parquet"
            case "negatives":
                for dataset in e.datasets:
                    yield f"results/{dataset}/negatives.parquet"
            case "quality":
                if e.quality:
                    yield f"results/reports/{experiment}/figures/quality.svg"
            case "positives" | "references":
                for dataset in e.datasets:
                    for model in e.models:
                        for method in e.methods:
                            if method != "initial":
                                yield from self._shared(stage, dataset, model, method)
            case "train":
                for run in runs:
                    if "/initial/" not in run:
                        yield f"results/{run}/model/manifest.json"
            case "responses":
                for run in self._with_snapshots(runs):
                    yield f"results/{run}/responses.parquet"
            case "likelihoods":
                for run in self._with_snapshots(runs):
                    yield f"results/{run}/likelihoods.parquet"
            case "scores":
                for run in self._with_snapshots(runs):
                    for reward in e.rewards:
                        yield f"results/{run}/scores/{reward}.parquet"
            case "judge":
                for run in runs:
                    if "/initial/" not in run:
                        for judge in e.judges:
                            yield f"results/{run}/judge/{judge}.parquet"
            case "tasks":
                for run in runs:
                    for task in e.tasks:
                        yield f"results/{run}/tasks/{task}.parquet"
            case "report":
                yield f"results/reports/{experiment}/report.html"

    def _shared(self, stage: str, dataset: str, model: str, method: str) -> Iterator[str]:
        wanted = self.pools(method) if stage == "positives" else self.reference_tables(method)
        for table in wanted:
            yield f"results/{dataset}/{model}/{stage}/{table}.parquet"

    # What a method takes -------------------------------------------------------------------------

    def pools(self, method: str) -> list[str]:
        """The pool of self-generated answers that a method draws from: none, or one."""
        entry = self.settings.methods[method]
        if entry.positives != "self":
            return []
        return ["corrected" if entry.self_correction else "plain"]

    def comparisons(self, method: str) -> str:
        """The table of human answers that a method sees: `negatives` or `pairs`."""
        return "pairs" if self.settings.methods[method].pairs == "all" else "negatives"

    def reference_tables(self, method: str) -> list[str]:
        """The tables whose responses a method needs under the reference model."""
        entry = self.settings.methods[method]
        if not CONTRACTS[entry.loss].reference or entry.ema:
            return []
        human = entry.negatives or entry.positives in ("human", "safe-human")
        return self.pools(method) + ([self.comparisons(method)] if human else [])

    def model_of(self, wildcards) -> str:
        """The manifest of the model that a run's answers come from."""
        if wildcards.method == "initial":
            return f"results/models/{wildcards.model}/manifest.json"
        return f"results/{_run(wildcards)}/model/manifest.json"

    def weights_of(self, wildcards) -> str:
        """The manifest of the weights that answer: a snapshot's, or those of `model_of`, which stands for both.

        Snapshots are no outputs of the training's rule: a rule's outputs cannot differ by method, and Snakemake would
        delete what a killed training has already kept.
        """
        if not wildcards.snapshot:
            return self.model_of(wildcards)
        return f"results/{_run(wildcards)}{wildcards.snapshot}/model/manifest.json"

    def initial_responses(self, wildcards) -> str:
        """The initial model's answers to the same prompts: of the first seed of an experiment that has them."""
        for e in self.settings.experiments.values():
            if wildcards.dataset in e.datasets and wildcards.model in e.models and int(wildcards.seed) in e.seeds:
                seed = e.seeds[0]
                return f"results/{wildcards.dataset}/{wildcards.model}/initial/seed{seed}/responses.parquet"
        return f"results/{wildcards.dataset}/{wildcards.model}/initial/seed{wildcards.seed}/responses.parquet"

    def reference_inputs(self, wildcards) -> dict[str, str]:
        """The tables whose responses are scored: human answers, or a pool and the prompts it answers."""
        if wildcards.table in ("corrected", "plain"):
            pool = f"results/{wildcards.dataset}/{wildcards.model}/positives/{wildcards.table}.parquet"
            return {"comparisons": f"results/{wildcards.dataset}/negatives.parquet", "samples": pool}
        return {"comparisons": f"results/{wildcards.dataset}/{wildcards.table}.parquet"}

    def train_inputs(self, wildcards) -> dict[str, str | list[str]]:
        """The tables that a method is trained on."""
        names = (wildcards.dataset, wildcards.model, wildcards.method)
        references = list(self._shared("references", *names))
        rounds = [f"results/{_run(wildcards)}/rounds/{number}" for number in self._rounds(wildcards)]
        return {
            "comparisons": f"results/{wildcards.dataset}/{self.comparisons(wildcards.method)}.parquet",
            "samples": list(self._shared("positives", *names)),
            "scores": self._pool_scores(wildcards.dataset, wildcards.model, wildcards.method),
            "references": references,
            "fresh": [f"{folder}/positives.parquet" for folder in rounds],
            "fresh_references": [f"{folder}/references.parquet" for folder in rounds if references],
        }

    def _pool_scores(self, dataset: str, model: str, method: str) -> list[str]:
        """The scores that a method filters its pool by: none, or one table."""
        chosen = self.settings.methods[method].filter
        pools = self.pools(method) if chosen else []
        return [f"results/{dataset}/{model}/positives/{pool}.scores/{chosen.reward}.parquet" for pool in pools]

    def _rounds(self, wildcards) -> range:
        """The online rounds that a training needs: all of them, or those before the one that it leads to."""
        found = self._rounds_of(self.settings.methods[wildcards.method])
        return range(found.start, int(wildcards.get("round", found.stop)))

    def _rounds_of(self, method: settings.Method) -> range:
        return rounds.numbers(method, self.settings.train_of(method).steps)

    # Params --------------------------------------------------------------------------------------

    def params(self, stage: str) -> Callable[[Any], str]:
        """Input for a rule's `params.settings`: the settings that a stage depends on, as one line of JSON."""
        return lambda wildcards: self._stage_settings(stage, wildcards).model_dump_json()

    def _stage_settings(self, stage: str, w) -> settings.Section:
        s = self.settings
        match stage:
            case "models":
                return s.models[w.model]
            case "organisms":
                return s.organisms[w.organism]
            case "datasets":
                dataset = s.datasets[w.dataset]
                files = {split: self._split_files(dataset, split) for split in ("train", "test")}
                return _part(settings.Reading, dataset, organism=None, **files)
            case "negatives":
                return _part(settings.Extraction, s.datasets[w.dataset])
            case "quality":
                return s.quality
            case "positives":
                # In how many jobs a pool is drawn is told apart: it draws nothing anew.
                changed = {"shards": 1} | ({"instructions": {}} if w.pool == "plain" else {})
                return settings.PositivesStage(
                    sampling=s.positives.model_copy(update=changed), backend=s.engine.backend
                )
            case "rounds":
                method = s.methods[w.method]
                changed = {
                    "shards": 1,
                    "k": max(1, rounds.count(method.online, method.k or s.positives.k)),
                    # Of its own: with the pool's, a policy that has moved little would say what the pool says.
                    "seed": random.Random(f"{s.positives.seed} {w.seed} {w.round}").getrandbits(31),
                }
                if not method.self_correction:
                    changed["instructions"] = {}
                return settings.PositivesStage(
                    sampling=s.positives.model_copy(update=changed), backend=s.engine.backend
                )
            case "references" | "likelihoods":
                return s.forward
            case "train":
                method = s.methods[w.method]
                return settings.TrainStage(
                    method=method.model_copy(update={"extends": None, "train": {}}),
                    train=_part(settings.Optimisation, s.train_of(method)),
                    forward=s.forward,
                    better=s.rewards[method.filter.reward].better if method.filter else None,
                    seed=int(w.seed),
                )
            case "responses":
                return settings.ResponsesStage(sampling=s.responses, backend=s.engine.backend, seed=int(w.seed))
            case "rewards" | "scores":
                # Which scores count as toxic is the report's matter.
                return s.rewards[w.reward].model_copy(update={"toxic_above": None})
            case "judge":
                # How many requests at once is told apart: to change it must not repeat paid requests.
                return s.judges[w.judge].model_copy(update={"concurrency": 1})
            case "questions":
                return _part(settings.Questions, s.tasks[w.task])
            case "tasks":
                return s.tasks[w.task]
            case "report":
                return s.only(w.experiment)
        raise KeyError(stage)

    def option(self, name: str) -> Callable:
        """Input for a rule's `params`: `--name FILE` for each of the rule's inputs of that name, or nothing."""
        flag = name.replace("_", "-")

        def flags(wildcards, input) -> str:
            return " ".join(f"--{flag} {path}" for path in _as_list(input.get(name, [])))

        return flags

    def code(self, stage: str) -> Callable[[Any], str]:
        """Input for a rule's `params.code`: digest of the sources that a stage runs; it reruns when they change."""
        return lambda wildcards: source_digest(f"d2o.{stage}", *self._entries(stage, wildcards))

    def _entries(self, stage: str, w) -> tuple[str, ...]:
        """The entries of a stage's tables that it uses: a training its own loss, a reader its own format."""
        match stage:
            case "train":
                return (self.settings.methods[w.method].loss,)
            case "datasets":
                return (self.settings.datasets[w.dataset].format,)
        return ()

    def concurrency(self, wildcards) -> int:
        """Requests that a judge answers at once."""
        return self.settings.judges[wildcards.judge].concurrency

    def capacity(self, wildcards) -> str:
        """What generation takes of the machine, as JSON: a resource of the rule, for no answer depends on it."""
        return _part(settings.Capacity, self.settings.engine).model_dump_json()

    def upkeep(self, wildcards) -> str:
        """What is kept and watched of a training, as JSON: a resource of the rule, for no weight depends on it."""
        train = self.settings.train_of(self.settings.methods[wildcards.method])
        return _part(settings.Upkeep, train).model_dump_json()

    def training_gpus(self, wildcards) -> int:
        """GPUs of one training: one a rank, none on a CPU."""
        ranks = self.settings.train_of(self.settings.methods[wildcards.method]).ranks
        return ranks if self.settings.compute.gpus else 0

    # Local inputs --------------------------------------------------------------------------------

    def model_files(self, wildcards) -> list[str]:
        """The files of a local model folder; none for a model of the Hub, of a package or of a run."""
        return _model_files(self.settings.models[wildcards.model].path)

    def run_of(self, wildcards) -> list[str]:
        """The manifest of the training that made a model; none where it comes from elsewhere."""
        run = self.settings.models[wildcards.model].run
        return [f"results/{_run(run)}/model/manifest.json"] if run else []

    def organism_files(self, wildcards) -> list[str]:
        """The texts that an organism is written from."""
        from d2o.organisms import files

        return [str(path) for path in files(Path(self.settings.organisms[wildcards.organism].texts))]

    def reward_files(self, wildcards) -> list[str]:
        """The files of a local reward model; none otherwise."""
        source = self.settings.rewards[wildcards.reward].source
        return _model_files(source.path if source else None)

    def dataset_files(self, wildcards) -> list[str]:
        """The local files of a data set; none for one of the Hub."""
        dataset = self.settings.datasets[wildcards.dataset]
        return [path for split in ("train", "test") for path in self._split_files(dataset, split) if not dataset.hub]

    def _split_files(self, dataset: settings.Dataset, split: str) -> list[str]:
        """What a data set reads a split from: files, those of its organism among them, or splits of the Hub."""
        names = getattr(dataset, split)
        return [f"results/organisms/{dataset.organism}/{n}.jsonl" for n in names] if dataset.organism else names

    def evaluation_files(self, wildcards) -> list[str]:
        """The files with further prompts to answer."""
        return self.settings.datasets[wildcards.dataset].evaluation_prompts

    def task_files(self, wildcards) -> list[str]:
        """The local files that a task is made from; none where all comes from the Hub."""
        return _task_files(self.settings.tasks[wildcards.task])

    def tasks_beside(self, wildcards) -> list[str]:
        """The questions of every task that some experiment runs on a data set's models."""
        return [
            f"results/tasks/{task}/manifest.json"
            for e in self.settings.experiments.values()
            if wildcards.dataset in e.datasets
            for task in e.tasks
        ]

    def reward_model(self, wildcards) -> list[str]:
        """The manifest of a reward model: trained on this data set's labels, or fetched once; none for a rule."""
        reward = self.settings.rewards[wildcards.reward]
        if reward.rule:
            return []
        place = wildcards.dataset + "/" if reward.train else ""
        return [f"results/{place}rewards/{wildcards.reward}/manifest.json"]

    def rule_files(self, wildcards) -> list[str]:
        """What a rule reads beside the answers: an organism's texts, or a user's module; none otherwise."""
        rule = self.settings.rewards[wildcards.reward].rule
        if not rule:
            return []
        from d2o import exact

        return [os.path.relpath(path) for path in exact.files(rule)]

    def scoring(self, need: str) -> Callable:
        """Input for a rule's threads and resources: what a reward model takes of the machine; a rule takes little."""
        compute = self.settings.compute
        model = {"threads": compute.threads, "mem_mb": compute.memory_gb * 1000, "runtime": compute.minutes}
        rule = {"threads": 1, "mem_mb": 4000, "runtime": 60}

        def needed(wildcards) -> int:
            is_rule = self.settings.rewards[wildcards.reward].rule
            return (rule | {"gpu": 0} if is_rule else model | {"gpu": compute.gpus})[need]

        return needed

    def backbone(self, wildcards) -> str:
        """The manifest of the model that a reward model is trained from."""
        return f"results/models/{self.settings.rewards[wildcards.reward].train.backbone}/manifest.json"

    def _check_files(self, origin: str) -> None:
        wanted = [(f"models.{name}.path", m.path) for name, m in self.settings.models.items() if m.path]
        for name, task in self.settings.tasks.items():
            wanted += [(f"tasks.{name}.{key}", path) for key, path in task.local()]
        for name, reward in self.settings.rewards.items():
            if reward.source and reward.source.path:
                wanted.append((f"rewards.{name}.source.path", reward.source.path))
            if reward.rule and reward.rule.organism:
                wanted.append((f"rewards.{name}.rule.organism", reward.rule.organism))
        wanted += [(f"organisms.{name}.texts", o.texts) for name, o in self.settings.organisms.items()]
        for name, dataset in self.settings.datasets.items():
            if not (dataset.hub or dataset.organism):
                wanted += [(f"datasets.{name}.train", path) for path in dataset.train]
                wanted += [(f"datasets.{name}.test", path) for path in dataset.test]
            wanted += [(f"datasets.{name}.evaluation_prompts", path) for path in dataset.evaluation_prompts]
        for key, path in wanted:
            if not Path(path).exists():
                raise D2OError(f"{origin}: {key}: no such file or folder: {path} (looked in {Path.cwd()})")

    def _check_entries(self, origin: str) -> None:
        """What can be known of models, organisms and rules before anything runs."""
        made = {run for experiment in self.settings.experiments for run in self.runs(experiment)}
        for name, model in self.settings.models.items():
            if model.run and _run(model.run) not in made:
                raise D2OError(
                    f"{origin}: models.{name}.run: no experiment makes {_run(model.run)}; "
                    f"add its data set, model, method and seed to one" + suggestion(_run(model.run), made)
                )
        for name, task in self.settings.tasks.items():
            if task.task:
                from d2o import harness

                if fault := harness.fault(task.task, task.include):
                    raise D2OError(f"{origin}: tasks.{name}.task: {fault}")
        for name, organism in self.settings.organisms.items():
            from d2o.organisms import load

            try:
                load(Path(organism.texts))
            except D2OError as error:
                raise D2OError(f"{origin}: organisms.{name}.texts: {error}") from None
        for name, reward in self.settings.rewards.items():
            if reward.rule:
                from d2o import exact

                if fault := exact.fault(reward.rule):
                    raise D2OError(f"{origin}: rewards.{name}.rule.{fault}")


def _run(wildcards: Any) -> str:
    """The folder of a run below results/."""
    return f"{wildcards.dataset}/{wildcards.model}/{wildcards.method}/seed{wildcards.seed}"


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _part(section: type[settings.Section], whole: settings.Section, **changed) -> settings.Section:
    """The keys of `whole` that `section` declares."""
    return section.model_validate(whole.model_dump(include=set(section.model_fields)) | changed)


def _model_files(folder: str | None) -> list[str]:
    return sorted(str(path) for path in Path(folder).iterdir() if path.is_file()) if folder else []


def _task_files(task: settings.Task) -> list[str]:
    found = {file for _, path in task.local() for file in [Path(path), *Path(path).rglob("*")] if file.is_file()}
    return sorted(str(file) for file in found if "__pycache__" not in file.parts)
