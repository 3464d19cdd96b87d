"""The card of a trained model, in the Hub's format: its sources, training, scores and known failures."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from d2o import hub, metrics, records, runs
from d2o.metrics import TASKS, Archive, Metric
from d2o.report import tables
from d2o.report.page import duration
from d2o.settings import CardStage, Dataset, Licensed, Settings
from d2o.settings.docs import loss_source
from d2o.texts import visible

# Number of known failures that are listed.
WORST = 10
NOT_STATED = "licence not stated"
NOT_ASKED = "licence not asked: the Hub is not reached"
_PIPELINE = "[D2O](https://arxiv.org/abs/2403.03419)'s pipeline"
# A licence identifier that the Hub accepts, such as apache-2.0; any other licence appears in the text only.
_IDENTIFIER = re.compile(r"[a-z0-9]+([.+-][a-z0-9]+)*")
# The metadata at the start of a card; in them a key of the licence, whose value may go on in lines that are indented.
_METADATA = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_LICENCE_KEY = re.compile(r"^(license|license_name):(.*(?:\n(?:[ \t]+|-[ \t]).*)*)", re.MULTILINE)
# Maximum characters of its value.
_LONGEST = 2000


@dataclass(frozen=True)
class Material:
    """Something that a model was made from, or is measured by.

    Attributes:
        key: its entry in the config, such as `datasets.pku`.
        use: what it was used for.
        source: where it came from.
        licence: as the config, its own model card, its licence file or the Hub states it; `` where none does, None
            where the Hub is not reached.
        made_from: whether the model was made from it; False for what only measures the model.
    """

    key: str
    use: str
    source: str
    licence: str | None
    made_from: bool


@dataclass(frozen=True)
class Result:
    """One metric of the model on prompts of one origin: rows of `table.csv`, None where the row is missing.

    Attributes:
        prompts: `test`, an evaluation file, or `` for a task's questions.
        own: the row of this training.
        every: the row of all trainings of the method, where there are several.
        initial: the row of the initial model.
    """

    metric: Metric
    prompts: str
    own: Mapping[str, str]
    every: Mapping[str, str] | None
    initial: Mapping[str, str] | None


def write(stage: CardStage, results: Path, output: Path) -> None:
    """Write the card of one training, from the report of the experiment in the settings.

    Args:
        results: folder that holds all artifacts.
        output: the card, Markdown below YAML with a `model-index`.
    Raises:
        D2OError: where an artifact is missing or not readable.
    """
    from huggingface_hub import ModelCardData

    archive, run = Archive(results), stage.run
    ((experiment, _),) = stage.settings.experiments.items()
    archive.content("page", experiment=experiment)
    used = _merged(_materials(archive, stage))
    for material in used:
        if not material.licence:
            print(f"card: {material.key}: {_lack(material)}; name it in its key `licence`", file=sys.stderr)
    measured = list(_results(archive, stage, experiment))
    data = ModelCardData(
        model_name=f"{run.method}-{run.dataset}-{run.model}-seed{run.seed}",
        eval_results=[_evaluation(stage.settings, run.dataset, one) for one in measured if one.own["mean"]] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["d2o", stage.settings.methods[run.method].loss],
        **_on_the_hub(stage.settings, run),
        **_licence(used),
    )
    sections = {
        "What it was made from": _made_from(archive, run.dataset, used),
        "Training": _training(archive, stage),
        "Results": _scores(stage, experiment, measured),
        "Known failures": _failures(archive, stage),
    }
    title = f"{run.method} on {run.dataset}: {run.model}, seed {run.seed}"
    intro = (
        f"A language model that {_PIPELINE} made from `{run.model}` by the method `{run.method}` (seed {run.seed}). "
        f"It is the outcome of an experiment: what is known of it stands below, and no more."
    )
    body = [f"# {title}", intro, *(f"## {name}\n\n{text}" for name, text in sections.items())]
    with records.artifact(output, stage, archive.inputs) as draft:
        draft.facts["experiment"] = experiment
        draft.path.write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


# What it was made from ---------------------------------------------------------------------------


def _materials(archive: Archive, stage: CardStage) -> Iterator[Material]:
    """Everything that a training was made from, including the trainings before it; then what measures it."""
    yield from _of_training(archive, stage, stage.run)
    experiment = stage.settings.experiment
    for name in experiment.rewards:
        yield from _of_reward(archive, stage, name, "scores the answers", made_from=False)


def _merged(materials: Iterable[Material]) -> list[Material]:
    """One material per entry, with all its uses; `made_from` is set where it is set for one of them."""
    by_key: dict[str, Material] = {}
    for material in materials:
        first = by_key.setdefault(material.key, material)
        uses = first.use if material.use in first.use else f"{first.use}; {material.use}"
        by_key[material.key] = replace(first, use=uses, made_from=first.made_from or material.made_from)
    return list(by_key.values())


def _of_training(archive: Archive, stage: CardStage, run: Any) -> Iterator[Material]:
    s, method = stage.settings, stage.settings.methods[run.method]
    yield from _of_model(archive, stage, run.model, "initial model", made_from=True)
    dataset = s.datasets[run.dataset]
    if dataset.organism:
        key, entry = f"organisms.{dataset.organism}", s.organisms[dataset.organism]
        source = f"written from the texts {_code(_name(entry.texts))}"
    else:
        key, entry, source = f"datasets.{run.dataset}", dataset, _rows_of(dataset)
    yield Material(key, f"training data of {_code(run.method)}", source, _stated(stage, key, entry), True)
    chosen_by = {"positives": method.filter and method.filter.reward}
    if method.tune and s.tuning.metric:
        chosen_by["values of the method"] = s.tuning.metric.removeprefix("reward/").partition("/")[0]
    for what, reward in chosen_by.items():
        if reward in s.rewards:
            yield from _of_reward(archive, stage, reward, f"chose the {what}", made_from=True)


def _of_model(archive: Archive, stage: CardStage, name: str, use: str, made_from: bool) -> Iterator[Material]:
    entry = stage.settings.models[name]
    if entry.run:
        yield from _of_training(archive, stage, entry.run)
    else:
        key, folder = f"models.{name}", archive.path("model", model=name).parent
        yield Material(key, use, _source(entry), _stated(stage, key, entry, folder), made_from)


def _of_reward(archive: Archive, stage: CardStage, name: str, use: str, made_from: bool) -> Iterator[Material]:
    reward = stage.settings.rewards[name]
    if reward.source:
        key, folder = f"rewards.{name}", archive.path("fetched_reward", reward=name).parent
        licence = _stated(stage, key, reward.source, folder)
        yield Material(key, use, _source(reward.source), licence, made_from)
    elif reward.train:
        yield from _of_model(
            archive, stage, reward.train.backbone, f"backbone of {_code(name)}, which {use}", made_from
        )


def _source(source: Any) -> str:
    """Where a model came from; for a local folder its name only, because the path is private."""
    if source.hub:
        return f"{_code(source.hub)} at {_code(source.revision)}"
    if source.package:
        return f"{_code(source.file)} of the Python package {_code(source.package)}"
    return f"local folder {_code(_name(source.path))}"


def _rows_of(dataset: Dataset) -> str:
    if dataset.hub:
        return f"{_code(dataset.hub)} at {_code(dataset.revision)}, {', '.join(map(_code, dataset.train))}"
    return f"local: {', '.join(_code(_name(path)) for path in dataset.train[:3])}" + ", …" * (len(dataset.train) > 3)


def _name(path: str) -> str:
    return PurePath(path).name


def _stated(stage: CardStage, key: str, entry: Licensed, folder: Path | None = None) -> str | None:
    """The licence of an entry, as of a `Material`, from the first place that states one; no licence is inferred."""
    if key in stage.licences:
        return stage.licences[key]
    if folder and (own := _own_licence(folder)):
        return own
    repository = getattr(entry, "hub", None)
    if not repository:
        return ""
    return hub.licence(repository, entry.revision, "dataset" if isinstance(entry, Dataset) else "model")


def _lack(material: Material) -> str:
    return NOT_ASKED if material.licence is None else NOT_STATED


def _own_licence(folder: Path) -> str | None:
    """The licence that a model's own card or a licence file in its folder states; None where neither does."""
    card = folder / "README.md"
    if card.is_file() and (stated := hub.stated(_licence_keys(card.read_text("utf-8-sig", "replace")))):
        return stated
    files = sorted(path.name for path in folder.glob("*") if path.name.lower().startswith(("license", "licence")))
    return f"that of its file {files[0]}" if files else None


def _licence_keys(text: str) -> dict[str, str | list[str]]:
    """The keys of the licence in a card's metadata, where they are a text or a list of texts.

    Nothing else of the metadata is read: aliases and nesting in a few bytes of YAML may take any memory.
    """
    import yaml

    block = _METADATA.match(text)
    keys = {}
    for entry in _LICENCE_KEY.finditer(block[1] if block else ""):
        if len(entry[2]) > _LONGEST:
            continue
        try:
            value = yaml.load(entry[2], yaml.BaseLoader)  # merges nothing, and every scalar is a text
        except (ValueError, RecursionError, yaml.YAMLError):
            continue
        names = value if isinstance(value, list) else [value]
        if all(isinstance(name, str) and name not in ("", "~", "null") for name in names):
            keys[entry[1]] = value
    return keys


def _on_the_hub(s: Settings, run: Any) -> dict[str, list[str]]:
    """The ids on the Hub of the first initial model and of the data sets that it was trained on, one after another.

    A reward model that chose the positives is no base of the model, nor is its backbone.
    """
    model, trained_on = s.models[run.model], [s.datasets[run.dataset].hub]
    while model.run:
        trained_on.append(s.datasets[model.run.dataset].hub)
        model = s.models[model.run.model]
    ids = {"base_model": [model.hub] if model.hub else [], "datasets": [*dict.fromkeys(filter(None, trained_on))]}
    return {key: value for key, value in ids.items() if value}


def _licence(used: Sequence[Material]) -> dict[str, str]:
    """The licence in a card's metadata: one where all parts state the same, none where one part states none."""
    stated = {(material.licence or "").lower() for material in used if material.made_from}
    if "" in stated:
        return {}
    (only, *others) = sorted(stated)
    if not others and _IDENTIFIER.fullmatch(only):
        return {"license": only}
    return {"license": "other", "license_name": "those-of-its-parts", "license_link": "README.md"}


def _made_from(archive: Archive, dataset: str, used: Sequence[Material]) -> str:
    head = ["entry", "what for", "source", "licence"]
    rows = [[_code(m.key), m.use, m.source, _escaped(m.licence or _lack(m))] for m in used]
    licence = _licence(used)
    if not licence:
        statement = (
            "Of a part that it was made from the licence is not known, so none is stated for the model: find it out "
            "before you use or share the model."
        )
    elif licence["license"] == "other":
        statement = "Its parts have the licences above; what they ask for together holds for the model."
    else:
        statement = "All parts that it was made from state this one licence."
    manifest = archive.manifest("negatives", dataset=dataset)
    counts = {
        "rows read": manifest["counts"]["rows"],
        "human negatives in all splits": manifest.get("rows"),
    }
    known = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count is not None)
    return "\n\n".join([_table(head, rows), statement, f"Of the data set `{dataset}`: {known}."])


# How -----------------------------------------------------------------------------------------------


def _training(archive: Archive, stage: CardStage) -> str:
    run, s = stage.run, stage.settings
    made = archive.manifest("trained", **run.model_dump())
    seconds = sum(row["seconds"] for row in archive.log(runs.Run(**run.model_dump())))
    ranks = made.get("ranks", 1)
    method = s.methods[run.method]
    facts = {
        "loss": f"`{method.loss}`. {_escaped(loss_source(method.loss))}",
        "groups": made.get("groups"),
        "steps": made.get("steps"),
        "seed": run.seed,
        "made": made["made"],
        "time": duration(seconds),
        "hardware": f"{ranks} rank{'s' * (ranks > 1)}, each a GPU, or a process on a CPU",
        "precision": made.get("precision"),
        "memory at most, GB": made.get("peak_memory_gb"),
        "versions": ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
    }
    if stage.watts:
        energy = seconds / 3.6e6 * ranks * stage.watts
        facts["energy"] = f"{energy:.3g} kWh: the time × {ranks} × {stage.watts:g} W, not measured"
    if method.tune:
        chosen = json.loads(archive.content("tuned", dataset=run.dataset, model=run.model, method=run.method))
        values = ", ".join(f"{key} {value}" for key, value in chosen["chosen"].items())
        facts["values"] = f"{_escaped(values)}, chosen among {len(chosen['trials'])} by {_escaped(chosen['metric'])}"
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    settings = json.dumps(made["settings"], indent=2)
    return "\n".join(lines) + f"\n\n```json\n{settings}\n```"


# How well ------------------------------------------------------------------------------------------


def _results(archive: Archive, stage: CardStage, experiment: str) -> Iterator[Result]:
    """The model's scores in the report, in reading order, without those on validation prompts, which chose it."""
    run = stage.run
    text = archive.content("report_table", experiment=experiment).decode()
    rows = {
        (row["method"], row["metric"], row["prompts"], row["seed"]): row
        for row in csv.DictReader(io.StringIO(text))
        if (row["dataset"], row["model"]) == (run.dataset, run.model)
    }
    declared = metrics.declared(archive, stage.settings)
    places = [(key, prompts) for method, key, prompts, seed in rows if (method, seed) == (run.method, "all")]
    for key, prompts in sorted(places, key=lambda place: list(declared).index(place[0])):
        every, own = (rows.get((run.method, key, prompts, seed)) for seed in ("all", str(run.seed)))
        if prompts != "validation":
            initial = rows.get(("initial", key, prompts, "all"))
            yield Result(declared[key], prompts, own or every, every if own else None, initial)


def _scores(stage: CardStage, experiment: str, measured: Sequence[Result]) -> str:
    several = any(one.every for one in measured)
    head = ["measure", "of", "this model"] + ["all seeds"] * several + ["initial model", "n"]
    rows = []
    for one in measured:
        every = [_shown(one.every, one.metric)] * several
        of = {"test": "test prompts", "": "questions"}.get(one.prompts, one.prompts)
        own, initial = _shown(one.own, one.metric), _shown(one.initial, one.metric)
        rows.append([_escaped(tables.heading(one.metric)), _escaped(of), own, *every, initial, one.own["n"]])
    over = f"{tables.OVER_PROMPTS}, of all seeds {tables.OVER_BOTH}" if several else tables.OVER_PROMPTS
    note = (
        f"Means with 95 % intervals {over}; n: prompts, or of a task questions. From the report of the experiment "
        f"`{experiment}`, which also has the differences and their tests. `model-index` has the means, shares as "
        f"fractions."
    )
    return f"{_table(head, rows)}\n\n{note}"


def _shown(row: Mapping[str, str] | None, metric: Metric) -> str:
    if row is None:
        return "–"
    mean, low, high = (float(row[key] or "nan") for key in ("mean", "low", "high"))
    return f"{tables.number(mean, metric)} {tables.interval(low, high, metric)}"


def _evaluation(s: Settings, dataset: str, result: Result) -> Any:
    """A result in the form of `model-index`."""
    from huggingface_hub import EvalResult

    metric, entry = result.metric, s.datasets[dataset]
    of = {"dataset_type": entry.hub or dataset, "dataset_name": dataset, "dataset_revision": entry.revision}
    of["dataset_split"] = "test"
    if metric.group == TASKS:
        name = metric.key.split("/")[1]
        task = s.tasks[name]
        of = {"dataset_type": task.hub or task.task or name, "dataset_name": name, "dataset_revision": task.revision}
    elif result.prompts != "test":
        of = {"dataset_type": result.prompts, "dataset_name": result.prompts}
    return EvalResult(
        task_type="text-generation",
        metric_type=metric.key,
        metric_name=metric.label,
        metric_value=float(result.own["mean"]),
        **of,
    )


def _failures(archive: Archive, stage: CardStage) -> str:
    """The worst test prompts by their ids, which are hashes: only those who have the data can look them up."""
    run, s = stage.run, stage.settings
    experiment = s.experiment
    metric = _primary(metrics.declared(archive, s))
    alone = {"datasets": [run.dataset], "models": [run.model], "methods": [run.method], "seeds": [run.seed]}
    values = metrics.single(archive, experiment.model_copy(update=alone), s.rewards, metric.key)
    values = values[values["prompts"] == "test"].dropna(subset="value").groupby("cluster")["value"].mean()
    sign = 1 if metric.better == "lower" else -1
    # Equal values are ordered by prompt id.
    order = sorted(values.items(), key=lambda item: (-sign * item[1], item[0]))
    best = {"higher": 1.0, "lower": 0.0}[metric.better] if metric.percent else None
    failed = [(prompt, value) for prompt, value in order if value != best]
    heading = _escaped(tables.heading(metric))
    if not order:
        return "Not known: nothing was measured on test prompts that says which answers are better."
    if not failed:
        return f"By {heading}: none of the {len(order):,} test prompts."
    worst = failed[0][1]
    as_bad = sum(value == worst for _, value in failed)
    rows = [[f"`{prompt}`", tables.number(value, metric)] for prompt, value in failed[:WORST]]
    note = (
        f"The worst of {len(order):,} test prompts, by their hashes (`prompt_id`). {as_bad:,} of them have the worst "
        f"value, {tables.number(worst, metric)}."
    )
    return f"{note}\n\n{_table(['prompt', heading], rows)}"


def _primary(declared: Mapping[str, Metric]) -> Metric:
    """The metric by which failures are listed: the first exact scorer, else the first other one with a `better`."""
    candidates = [
        m for m in declared.values() if m.better and m.neutral is None and m.key.startswith(("reward/", "human/"))
    ]
    return min(candidates, key=lambda metric: tables.GROUPS.index(metric.group))


# As Markdown ---------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    """Any text, escaped for one line of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", " ".join(visible(text).split()))


def _code(text: str) -> str:
    """A name as Markdown code where it has only characters of a name, else as escaped text."""
    return f"`{text}`" if re.fullmatch(r"[\w./@+-]+", text) else _escaped(text)
