"""Renders the page, and collects what it shows beside tables and figures: counts, pools, trainings, answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from d2o import refusals, rounds, runs, schemas
from d2o.errors import D2OError
from d2o.metrics import Archive
from d2o.report import browser, figures, labelled, tables
from d2o.report.tables import Block, Measured
from d2o.settings import Experiment, Online, Reward, Settings
from d2o.texts import policy_digest, visible

# Below this accuracy on held-out human pairs a scorer is called weak evidence: it misorders one pair in four.
WEAK = 0.75
# Text alternative of the figure of a pool, for readers who do not see it.
POOL = "Lengths of the samples, and their flags"
_FOLDER = Path(__file__).parent


def render(
    settings: Settings,
    archive: Archive,
    measured: Measured,
    svgs: Mapping[str, bytes],
    pools: Sequence[Mapping[str, Any]],
    files: Sequence[str],
) -> str:
    """The page, with everything it needs inside.

    Its Content-Security-Policy allows one script and one style sheet, by their digests, and nothing else.

    Args:
        settings: the whole config with one experiment.
        archive: the results.
        measured: the data of the tables and figures.
        svgs: the figures, by their names in `figures.FIGURES`; some only where there is something to plot.
        pools: as from `pools`.
        files: the tables beside the page.
    Raises:
        D2OError: where an artifact is missing.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "heading": tables.heading,
        "compared": tables.COMPARED,
        "named": measured.named,
        "digest": policy_digest,
    }
    ((name, experiment),) = settings.experiments.items()
    blocks, effects = measured.blocks, measured.effects
    trained = [settings.methods[method] for method in runs.trained(experiment)]
    packed, left_out = browser.pack(measured, browser.gather(archive, measured))
    trained_rewards = [reward for reward in experiment.rewards if settings.rewards[reward].train]
    return environment.get_template("report.html.jinja").render(
        name=name,
        experiment=experiment,
        k=sorted({method.k for method in trained if method.positives == "self"}),
        settings=json.dumps(settings.model_dump(mode="json"), indent=2, ensure_ascii=False),
        effects=effects,
        exact=[reward for reward in experiment.rewards if settings.rewards[reward].rule],
        thresholds=[name for name in experiment.rewards if settings.rewards[name].safe_at is not None],
        harms=[name for name in experiment.rewards if browser.measures_harm(settings.rewards[name])],
        packed=packed,
        left_out_answers=left_out,
        style=(_FOLDER / "page.css").read_text(),
        script=(_FOLDER / "browser.js").read_text(),
        start={(block.dataset, block.model): dict(grid.rows)["initial"][0] for block, grid in effects},
        prompts={dataset: _prompts(archive, dataset) for dataset in experiment.datasets},
        refusals={by: {kind: labelled.accuracy(kind, by) for kind in refusals.KINDS} for by in labelled.ORIGINS},
        checks=[_check(archive, dataset, r) for dataset in experiment.datasets for r in trained_rewards],
        notes=[*measured.notes, *_cautions(settings, experiment)],
        blocks=[(block, tables.grids(measured, block), _with_bos(archive, experiment, block)) for block in blocks],
        primary=[(block, table) for block in blocks if len(table := tables.primary(measured, block))],
        uncompared=len(measured.methods) if len(measured.methods) > tables.MOST_METHODS else 0,
        matrices=[(block, own) for block in blocks if (own := tables.matrices(measured, block))],
        figures=[
            (name, entry, figures.inline(svgs[name], name, entry.label))
            for name, entry in figures.FIGURES.items()
            if name in svgs
        ],
        files=files,
        data=[
            (dataset, _splits(archive, dataset), _counts(archive, dataset), _leaks(archive, dataset))
            for dataset in experiment.datasets
        ],
        task_leaks={
            dataset: {task: archive.manifest("leaks", dataset=dataset, task=task) for task in experiment.tasks}
            for dataset in experiment.datasets
        },
        pools=[pool | {"figure": figures.inline(pool["svg"], pool["name"], POOL)} for pool in pools],
        rounds=[(block, list(_rounds(archive, settings, block))) for block in blocks],
        trials=[(block, block.trials.to_dict("records")) for block in blocks if len(block.trials)],
        trainings=[(block, list(_trainings(archive, block))) for block in blocks],
    )


def _prompts(archive: Archive, dataset: str) -> dict[str, int]:
    """Number of prompts that were answered, by origin."""
    return archive.table("prompts", schemas.PROMPTS, dataset=dataset)["origin"].value_counts(sort=False).to_dict()


def _check(archive: Archive, dataset: str, reward: str) -> dict[str, Any]:
    """Agreement of a reward model trained here with held-out human labels.

    Its scores are `weak` evidence unless it orders the answers to one prompt: its AUC may come from knowing prompts.
    """
    manifest = archive.manifest("trained_reward", dataset=dataset, reward=reward)
    measures = []
    for key, label in (("pair_accuracy", "pair accuracy"), ("auc", "AUC")):
        value, low, high, n = (manifest.get(key + end) for end in ("", "_low", "_high", "_n"))
        if value is not None:
            interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
            measures.append(f"{label} {value:.2f}{interval}, n = {n}")
    accuracy = manifest.get("pair_accuracy")
    return {
        "dataset": dataset,
        "reward": reward,
        "paired": accuracy is not None,
        "weak": accuracy is None or accuracy < WEAK,
        "measures": measures,
    }


def _cautions(settings: Settings, experiment: Experiment) -> Iterator[str]:
    """Cautions about a config for the reader: scorers that chose the positives, values of online rounds."""
    methods = {name: settings.methods[name] for name in runs.trained(experiment)}
    for name, method in methods.items():
        for reward in experiment.rewards if method.filter else ():
            if _origin(settings.rewards[reward]) == _origin(settings.rewards[method.filter.reward]):
                yield (
                    f"Scores of {reward} are circular for {name}: the same model chose the positives that it was "
                    f"trained on. Judge it by other scorers."
                )
    online: dict[Online, list[str]] = {}
    for name, method in methods.items():
        if method.online:
            online.setdefault(method.online, []).append(name)
    for rounds_of, names in online.items():
        yield (
            f"{', '.join(names)}: online from step {rounds_of.start} on; every {rounds_of.every} steps fresh answers "
            f"of the policy replace {rounds_of.share * 100:.0f} % of a group's positives. The paper gives none of "
            f"these values: they are this config's."
        )


def _origin(reward: Reward) -> tuple[Any, ...]:
    """The settings by which two scorers are the same model."""
    return reward.source, reward.train, reward.rule, reward.label


def _with_bos(archive: Archive, experiment: Experiment, block: Block) -> dict[str, bool]:
    """Per task, whether a model's prompts began with a BOS token: from any run, as all have the same tokenizer."""
    run = runs.runs(experiment, block.dataset, block.model)[0]
    return {task: archive.manifest("task_values", task=task, **run.names)["bos"] for task in experiment.tasks}


def _splits(archive: Archive, dataset: str) -> pd.DataFrame:
    """Per split: prompts, negatives, those with a human positive, those with a positive labelled safe."""
    rows = archive.table("negatives", schemas.NEGATIVES, dataset=dataset)
    rows = rows.assign(safe=rows["positive"].notna() & rows["positive_unsafe"].eq(False))
    counts = rows.groupby("split").agg(
        prompts=("prompt_id", "nunique"),
        negatives=("negative", "size"),
        positives=("positive", "count"),
        safe=("safe", "sum"),
    )
    validation = ["validation"] if "validation" in counts.index else []
    return counts.reindex(["train", *validation, "test"], fill_value=0)


def _counts(archive: Archive, dataset: str) -> dict[str, str]:
    """The counts in the manifest of the negatives, one line per group of counts."""
    counts = archive.manifest("negatives", dataset=dataset).get("counts", {})
    lines = {}
    for key, value in counts.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        text = ", ".join(f"{visible(name.replace('_', ' '))} {_counted(n)}".strip() for name, n in parts.items())
        lines[key.replace("_", " ")] = text or "none"
    return lines


def _counted(number: float) -> str:
    """A count, or a share in per cent."""
    return f"{number * 100:.1f}\u00a0%" if isinstance(number, float) else f"{number:,}"


def categories(archive: Archive, dataset: str) -> dict[str, dict[str, int]]:
    """Negatives in each harm category, by split; nothing where the data set has no categories."""
    counts = archive.manifest("negatives", dataset=dataset).get("counts", {})
    keys = {split: f"{split}_categories" for split in ("train", "test")}
    return {
        split: {visible(name): number for name, number in counts[key].items()}
        for split, key in keys.items()
        if key in counts
    }


def _leaks(archive: Archive, dataset: str) -> list[dict[str, Any]]:
    """Examples of train prompts that equal or nearly equal prompts that are evaluated."""
    return archive.manifest("negatives", dataset=dataset).get("leaks", [])


def pools(archive: Archive, settings: Settings, block: Block) -> Iterator[dict[str, Any]]:
    """The data sheets of the pools that the runs take their positives from: `block`, `pool`, `sheet`, and the `name`,
    `data` and `svg` of a figure, with the scores that methods filter by.

    Where each seed has its own pools, only those of the first seed are shown.
    """
    experiment = settings.experiment
    filters: dict[str, set[str]] = {}
    for run in runs.runs(experiment, block.dataset, block.model):
        method = settings.methods.get(run.method)  # none for the initial model
        other = settings.positives.per_seed and run.seed != experiment.seeds[0]
        if method and method.positives == "self" and not other:
            rewards = filters.setdefault(_pool_of(archive, run), set())
            rewards |= {method.filter.reward} if method.filter else set()
    for number, (pool, rewards) in enumerate(filters.items()):
        names = {"dataset": block.dataset, "model": block.model, "pool": pool}
        sheet = json.loads(archive.content("pool_sheet", **names))
        if not sheet["samples"]:  # no prompt fitted the context
            continue
        scores = {
            reward: archive.table("pool_scores", schemas.SCORES, reward=reward, **names)["score"]
            for reward in sorted(rewards)
        }
        data = figures.pool_data(sheet, scores)
        svg = figures.render(figures.pool(data, sheet["samples"]), "svg")
        name = f"pool-{block.dataset}-{block.model}-{number}"
        yield {"block": block, "pool": pool, "sheet": sheet, "name": name, "data": data, "svg": svg}


def _pool_of(archive: Archive, run: runs.Run) -> str:
    """The pool that a run was trained on."""
    made = archive.manifest("trained", **run.names)
    if "pool" not in made:
        raise D2OError(f"{archive.path('trained', **run.names)}: made by another version; delete it and train again")
    return made["pool"]


def _rounds(archive: Archive, settings: Settings, block: Block) -> Iterator[dict[str, Any]]:
    """The data sheets of the online rounds, run by run."""
    experiment = settings.experiment
    for run in runs.runs(experiment, block.dataset, block.model):
        method = settings.methods.get(run.method)  # none for the initial model
        for number in rounds.numbers(method, runs.train_of(settings, method).steps) if method else ():
            sheet = json.loads(archive.content("round_sheet", round=number, **run.names))
            if sheet["samples"]:
                lengths = [int(length) * count for length, count in sheet["tokens"].items()]
                yield {"run": run, "round": number, "sheet": sheet, "length": sum(lengths) / sheet["samples"]}


def _trainings(archive: Archive, block: Block) -> Iterator[dict[str, Any]]:
    """One row per run; loss and margin are means over the last tenth of the steps, the shifts are the last ones."""
    for (method, seed), log in block.logs.groupby(["method", "seed"], sort=False):
        made = archive.manifest("trained", **runs.Run(block.dataset, block.model, method, seed).names)
        yield {
            "method": method,
            "seed": seed,
            "steps": log["step"].iloc[-1],
            "epochs": log["epoch"].iloc[-1],
            "tokens": (log["tokens_per_second"] * log["seconds"]).sum() / 1e6,
            "time": duration(log["seconds"].sum()),
            "rate": log["tokens_per_second"].median(),
            "memory": log["memory_gb"].max(),
            "groups": made.get("groups"),
            "short": made.get("short_groups"),
            "noise": made.get("reference_noise"),
            **log[["loss", "margin"]].tail(max(1, len(log) // 10)).mean(),
            **log[["positive_shift", "negative_shift"]].ffill().iloc[-1],
        }


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
