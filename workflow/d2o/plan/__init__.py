"""What Snakemake needs to know of a config: targets, inputs, and per rule the settings and sources it depends on.

The rules stay declarative: each asks a `Plan`, so that changing one key of the config redoes only what depends on it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from d2o import layout, runs, settings
from d2o.plan import checks, stages
from d2o.plan.artifacts import ARTIFACTS
from d2o.plan.crossing import Crossing
from d2o.sources import source_digest
from d2o.texts import is_unicode, visible

# What Figure 1 is plotted from.
_PAIRS = ["pair_prompts", "pair_scores", "pair_verdicts"]


class Plan(Crossing):
    """The plan that rules query: the functions that take `wildcards` are their inputs, params and resources."""

    def __init__(self, config: Mapping[str, Any], origin: str):
        """
        Args:
            config: the parsed YAML.
            origin: the file it came from, for messages.
        Raises:
            D2OError: as `settings.load` and `checks.check`.
        """
        super().__init__(settings.load(config, origin))
        self.origin = origin
        checks.check(self.settings, origin)

    def warnings(self) -> list[str]:
        """One line for each judge without a date, each entry that follows a branch of the Hub, and each entry or
        section whose existing artifact was made with other settings."""
        s = self.settings
        return [*checks.undated(s), *checks.moving(s), *checks.replaced(s, self.crossed)]

    def names(self) -> dict[str, str]:
        """For each wildcard that stands for entries of the config, a pattern of their names: no rule makes others."""
        s = self.settings
        entries = {
            "organism": s.organisms,
            "dataset": s.datasets,
            "model": s.models,
            "method": ["initial", *s.methods],
            "reward": s.rewards,
            "judge": s.judges,
            "task": s.tasks,
            "experiment": s.experiments,
        }
        return {wildcard: "|".join(map(re.escape, names)) or r"(?!)" for wildcard, names in entries.items()}

    # Targets -------------------------------------------------------------------------------------

    def report_inputs(self, wildcards) -> list[str]:
        """The files that an experiment's report is made from, and the releases of weights that are its own."""
        reported = [place for place, artifact in ARTIFACTS.items() if artifact.reported]
        made = [path for place in reported for path in self.targets(place, wildcards.experiment)]
        return [*made, *self.released_after(wildcards.experiment)]

    def card_inputs(self, wildcards) -> list[str]:
        """The files that a training's card is made from: its model, and the report of the experiment it describes."""
        experiment = stages.carded(self.settings, wildcards)
        report = [self.layout.path(place, experiment=experiment) for place in ("page", "report_table")]
        return [self._path("trained", wildcards), *report]

    def asked(self, place: str) -> Callable[[Any], list[str]]:
        """As `targets` of all experiments; where there are none, Snakemake ends with one line."""
        nothing = f"no experiment asks for this; {ARTIFACTS[place].ask} in one"
        return lambda wildcards: self.targets(place) or self._end(nothing)

    def showing(self, exhibit: str) -> Callable[[Any], list[str]]:
        """The reports, or for Figure 1 the figures, of the experiments that show a table or figure of the paper.

        As `asked` where there are none.
        """
        if exhibit == "figure1":
            return self.asked("pair_quality_figure")

        def targets(wildcards) -> list[str]:
            chosen = [name for name, e in self.settings.experiments.items() if exhibit in e.shows]
            if not chosen:
                self._end(f"no experiment shows {exhibit}; set `shows: [{exhibit}]` in one")
            return self.targets("page", *chosen)

        return targets

    def _end(self, message: str) -> NoReturn:
        """End Snakemake with one line: for any other exception in an input function it shows the traceback."""
        raise SystemExit(f"{self.origin}: {message}")

    def pair_inputs(self, wildcards) -> list[str]:
        """The inputs of Figure 1: tables of scores and verdicts of the human pairs of an experiment's data sets.

        Snakemake ends with one line where the experiment has none.
        """
        tables = [path for place in _PAIRS for path in self.targets(place, wildcards.experiment)]
        ask = ARTIFACTS["pair_quality_figure"].ask
        return tables or self._end(f"experiments.{wildcards.experiment} has no such figure; {ask} in it")

    def compared_by_people(self, wildcards) -> list[str]:
        """The files that the pages of a human evaluation are made from: the prompts, and all answers to them."""
        stage = stages.of(self.settings, "human_eval", wildcards)
        prompts = [self.layout.path("prompts", dataset=dataset) for dataset in stage.datasets]
        return prompts + [self.layout.path("responses", run.names) for run in runs.compared(stage)]

    def annotations(self, wildcards) -> list[str]:
        """The files that annotators have sent back so far; other files in the folder are included, and refused later.

        Snakemake ends with one line where it cannot name a file.
        """
        files = sorted(map(str, Path(self.annotated(wildcards)).glob("[!.]*")))
        for file in files:
            if {"{", "}"} & {*file}:
                self._end(f"human_eval.answers: {visible(file)}: a name with braces; give the file another one")
            if not is_unicode(file):
                self._end(f"human_eval.answers: {visible(file)}: its name is not UTF-8; give the file another one")
        return files

    def annotated(self, wildcards) -> str:
        """The folder for annotators' files: a resource, because no result depends on its name."""
        return self.settings.experiments[wildcards.experiment].human_eval.answers

    # Inputs --------------------------------------------------------------------------------------

    def model_of(self, wildcards) -> str:
        """The manifest of the model that a run's answers come from."""
        return self._path("model" if wildcards.method == "initial" else "trained", wildcards)

    def weights_of(self, wildcards) -> str:
        """The manifest of the weights that answer: a snapshot's, or that of `model_of`, which is the input for both.

        Snapshots are no outputs of the training's rule: a rule's outputs cannot differ by method, and Snakemake would
        delete the snapshots that a killed training has kept.
        """
        return self._path("weights", wildcards) if wildcards.snapshot else self.model_of(wildcards)

    def initial_responses(self, wildcards) -> str:
        """The initial model's answers to the same prompts."""
        return self._path("responses", wildcards, method="initial", seed=runs.INITIAL_SEED, snapshot="")

    def reference_inputs(self, wildcards) -> dict[str, str]:
        """The tables whose responses get log-probs: human answers, or a pool and the prompts that it answers."""
        if wildcards.table in ("negatives", "pairs"):
            return {"negatives": self._path(wildcards.table, wildcards)}
        samples = self._path("pool", wildcards, pool=wildcards.table)
        return {"negatives": self._path("negatives", wildcards), "samples": samples}

    def pool_shards(self, wildcards) -> dict[str, list[str]]:
        """The shards of a pool and their manifests: an unchanged pool's own, or those of the config."""
        made_of = checks.manifest(self._path("pool", wildcards)).get("shards")
        kept = made_of and self.as_before(_names(wildcards))
        shards = made_of if kept else self.settings.positives.shards
        paths = [self._path("pool_shard", wildcards, shard=f"{n}-of-{shards}") for n in range(1, shards + 1)]
        return {"shards": paths, "manifests": [str(layout.manifest_path(path)) for path in paths]}

    def train_inputs(self, wildcards) -> dict[str, str | list[str]]:
        """The tables that a method is trained on; for a training up to a round, those that exist by then."""
        run = _names(wildcards)
        pools, references = self.pools(run), self.reference_tables(run)
        rounds = self.rounds_of(run["method"])
        before = range(rounds.start, int(run.get("round", rounds.stop)))
        fresh = {
            place: [self._path(place, run, round=n) for n in before] for place in ("round_pool", "round_logprobs")
        }
        return {
            "tuned": [self._path("tuned", run)] if self.settings.methods[run["method"]].tune else [],
            "negatives": self._path(self.human_table(run["method"]), run),
            "samples": [self._path("pool", run, pool=pool) for pool in pools],
            "scores": [self._path("pool_scores", run, pool=p, reward=r) for p in pools for r in self.filters(run)],
            "reference_logprobs": [self._path("reference_logprobs", run, table=table) for table in references],
            "fresh": fresh["round_pool"],
            "fresh_logprobs": fresh["round_logprobs"] if references else [],
        }

    def trial_inputs(self, wildcards) -> dict[str, list[str]]:
        """The tables that the trials of a method are chosen by."""
        kind, _, name = self.settings.tuning.metric.partition("/")
        place = {"reward": "scores", "human": "heldout_logprobs", "answers": "responses"}[kind]
        chosen = {"seed": self.settings.tuning.seed, "snapshot": "", "reward": name}
        names = stages.finished_trials(self.settings, wildcards.method)
        return {"trials": [self._path(place, wildcards, method=trial, **chosen) for trial in names]}

    def model_files(self, wildcards) -> list[str]:
        """The files of a local model folder; none for a model of the Hub, of a package or of a run."""
        return _folder_files(self.settings.models[wildcards.model].path)

    def run_of(self, wildcards) -> list[str]:
        """The manifest of the training that made a model; none where it comes from elsewhere."""
        run = self.settings.models[wildcards.model].run
        return [self.layout.path("trained", run.model_dump())] if run else []

    def organism_files(self, wildcards) -> list[str]:
        """The texts that an organism is written from."""
        from d2o.organisms import files

        return [str(path) for path in files(Path(self.settings.organisms[wildcards.organism].texts))]

    def dataset_files(self, wildcards) -> list[str]:
        """The local files of a data set; none for one of the Hub; for an organism, the files that it will have."""
        reading, sources = self.settings.datasets[wildcards.dataset], stages.of(self.settings, "datasets", wildcards)
        if reading.hub or reading.organism:
            return [] if reading.hub else [*sources.train, *sources.test]
        from d2o import datasets

        return [str(file) for source in (*sources.train, *sources.test) for file in datasets.files(source)]

    def evaluation_files(self, wildcards) -> list[str]:
        """The files with further prompts to answer."""
        return self.settings.datasets[wildcards.dataset].evaluation_prompts

    def task_files(self, wildcards) -> list[str]:
        """The local files that a task is made from; none where everything comes from the Hub."""
        places = [Path(path) for _, path in self.settings.tasks[wildcards.task].local()]
        files = {file for place in places for file in [place, *place.rglob("*")] if file.is_file()}
        return sorted(str(file) for file in files if "__pycache__" not in file.parts)

    def reward_files(self, wildcards) -> list[str]:
        """The files of a local reward model; none otherwise."""
        source = self.settings.rewards[wildcards.reward].source
        return _folder_files(source.path if source else None)

    def reward_model(self, wildcards) -> list[str]:
        """The manifest of a reward model: trained on this data set's labels, or fetched once; none for a rule."""
        reward = self.settings.rewards[wildcards.reward]
        if reward.rule:
            return []
        return [self._path("trained_reward" if reward.train else "fetched_reward", wildcards)]

    def rule_files(self, wildcards) -> list[str]:
        """The files that a scoring rule reads besides answers: an organism's texts or a user's module; or none."""
        rule = self.settings.rewards[wildcards.reward].rule
        if not rule:
            return []
        from d2o import exact

        return [os.path.relpath(path) for path in exact.files(rule)]

    def backbone(self, wildcards) -> str:
        """The manifest of the model that a reward model is trained from."""
        return self.layout.path("model", model=self.settings.rewards[wildcards.reward].train.backbone)

    # Params and resources ------------------------------------------------------------------------

    def params(self, stage: str) -> Callable[[Any], str]:
        """The settings that a stage's results depend on, as one line of JSON: a rule's `params.settings`."""

        def results(wildcards) -> str:
            return settings.params(stages.of(self.settings, stage, wildcards))

        return results

    def execution(self, stage: str) -> Callable[[Any], str]:
        """The settings of how a stage's job runs: a resource of its rule, because no result depends on them."""

        def keys(wildcards) -> str:
            section = stages.of(self.settings, stage, wildcards)
            return section.model_dump_json(include=settings.execution_keys(section))

        return keys

    def code(self, stage: str) -> Callable[[Any], str]:
        """The digest of the sources that a stage runs, a rule's `params.code`: it reruns when they change."""
        return lambda wildcards: source_digest(f"d2o.{stage}", stages.entries(self.settings, stage, wildcards))

    def environment(self, stage: str) -> str:
        """The file of a rule's `conda` environment, relative to the rules: for CPU or for GPU machines."""
        return f"../../envs/{'gpu' if self.settings.compute.gpus else 'cpu'}/{stage}.yaml"

    def metric(self, wildcards) -> str:
        """`--metric NAME` of a task, checked when questions are fetched; a resource: no question depends on it."""
        metric = self.settings.tasks[wildcards.task].metric
        return f"--metric {shlex.quote(metric)}" if metric else ""

    def folder(self, place: str, **names: Any) -> Callable[[Any], str]:
        """A folder that Snakemake does not own, as a rule's param."""
        return lambda wildcards: self._path(place, wildcards, **names)

    def option(self, name: str) -> Callable:
        """`--name FILE` for each of a rule's inputs of that name, or nothing: a rule's param."""
        flag = name.replace("_", "-")

        def flags(wildcards, input) -> str:
            paths = input.get(name, [])
            return " ".join(f"--{flag} {path}" for path in ([paths] if isinstance(paths, str) else paths))

        return flags

    def _path(self, place: str, wildcards, **names: Any) -> str:
        return self.layout.path(place, _names(wildcards), **names)


def _names(wildcards) -> dict[str, Any]:
    """The names that wildcards stand for; with a pool, also its kind: pools of one kind share answers."""
    names = dict(wildcards.items())
    return names | {"kind": names["pool"].rpartition("-k")[0]} if "pool" in names else names


def _folder_files(folder: str | None) -> list[str]:
    return sorted(str(path) for path in Path(folder).iterdir() if path.is_file()) if folder else []
