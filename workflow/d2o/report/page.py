"""What the page shows beside the tables and figures: counts, pools, trainings, answers; and its rendering."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from d2o import exact, records, rounds
from d2o.report import figures, tables
from d2o.report.metrics import Archive, Run, runs
from d2o.report.tables import Block
from d2o.settings import Rule, Settings

# Below this agreement with held-out human labels a scorer is called weak evidence: it misorders one pair in four.
WEAK = 0.75
EXAMPLES = 20
# Of these, the ones that the report opens with.
SHOWN = 3


def render(settings: Settings, archive: Archive, blocks: Sequence[Block], svgs: Mapping[str, bytes]) -> str:
    """The page, with everything it needs inside.

    Args:
        settings: the whole config with one experiment.
        archive: the results.
        blocks: what was estimated.
        svgs: the figures, by the names of `_LABELS`; some only where there is something to draw.
    Raises:
        D2OError: where an artifact is missing.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"heading": tables.heading, "legend": tables.LEGEND}
    ((name, experiment),) = settings.experiments.items()
    trained = [settings.methods[method] for method in experiment.methods if method != "initial"]
    trained_rewards = [reward for reward in experiment.rewards if settings.rewards[reward].train]
    return environment.get_template("report.html.jinja").render(
        name=name,
        experiment=experiment,
        k=sorted({method.k or settings.positives.k for method in trained if method.positives == "self"}),
        settings=json.dumps(settings.model_dump(mode="json"), indent=2, ensure_ascii=False),
        effects=[(block, grid) for block in blocks if (grid := tables.effect(block, experiment.methods))],
        exact=[reward for reward in experiment.rewards if settings.rewards[reward].rule],
        shown=SHOWN,
        start={
            (block.dataset, block.model): dict(grid.rows)["initial"][0]
            for block in blocks
            if (grid := tables.effect(block, experiment.methods))
        },
        prompts={dataset: _prompts(archive, dataset) for dataset in experiment.datasets},
        checks=[_check(archive, dataset, r) for dataset in experiment.datasets for r in trained_rewards],
        weak=WEAK,
        blocks=[(block, tables.grids(block, experiment.methods)) for block in blocks],
        figures={name: figures.inline(svg, name, _LABELS[name]) for name, svg in svgs.items()},
        points=figures.POINTS,
        bins=figures.BINS,
        data=[
            (dataset, _splits(archive, dataset), _counts(archive, dataset), _leaks(archive, dataset))
            for dataset in experiment.datasets
        ],
        pools=[pool for block in blocks for pool in _pools(archive, settings, block)],
        rounds=[(block, list(_rounds(archive, settings, block))) for block in blocks],
        trainings=[(block, list(_trainings(block, experiment.seeds))) for block in blocks if block.logs],
        answers=[(block, list(_examples(archive, settings, block))) for block in blocks],
    )


_LABELS = {
    "effect": "Exact scores of the answers, their length and repetition, by method",
    "methods": "Mean and 95 % interval of every metric, by method",
    "training": "Loss, margin and log-ratios against training steps, by method",
    "course": "Scores and log-probs of human answers against training steps, by method",
    "distributions": "Histograms of the scores at several training steps, by method",
    "quality": "Score differences, win rates and toxic shares of the human pairs, by data set",
    "categories": "Negatives in each harm category, by split and data set",
}


def _prompts(archive: Archive, dataset: str) -> dict[str, int]:
    """How many prompts were answered, by origin."""
    rows = archive.table(f"{dataset}/prompts.parquet", records.PROMPTS)
    return dict(Counter(row["origin"] for row in rows))


def _check(archive: Archive, dataset: str, reward: str) -> dict[str, Any]:
    """How well a reward model trained here agrees with held-out human labels: AUC, or accuracy on pairs where
    no answer is labelled, or nothing (`measure` is None)."""
    manifest = archive.manifest(f"{dataset}/rewards/{reward}/manifest.json")
    known = [key for key in ("auc", "pair_accuracy") if manifest.get(key) is not None]
    place = {"dataset": dataset, "reward": reward}
    if not known:
        return place | {"measure": None}
    value, low, high, n = (manifest[known[0] + end] for end in ("", "_low", "_high", "_n"))
    interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    measure = {"auc": "AUC", "pair_accuracy": "pair accuracy"}[known[0]]
    return place | {"measure": measure, "value": value, "text": f"{measure} {value:.2f}{interval}", "n": n}


def _splits(archive: Archive, dataset: str) -> list[tuple[str, list[int]]]:
    """Per split: prompts, negatives, those with a human positive, those with a positive labelled safe."""
    prompts, counts = defaultdict(set), Counter()
    for row in archive.table(f"{dataset}/negatives.parquet", records.COMPARISONS):
        split = row["split"]
        prompts[split].add(row["prompt_id"])
        counts[split, "negatives"] += 1
        counts[split, "positives"] += row["positive"] is not None
        counts[split, "safe"] += row["positive"] is not None and row["positive_unsafe"] is False
    columns = ("negatives", "positives", "safe")
    return [
        (split, [len(prompts[split]), *(counts[split, column] for column in columns)]) for split in ("train", "test")
    ]


def _counts(archive: Archive, dataset: str) -> dict[str, str]:
    """What the manifest of the negatives counts, a line for each group of counts."""
    counts = archive.manifest(f"{dataset}/negatives.parquet").get("counts", {})
    lines = {}
    for key, value in counts.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        text = ", ".join(f"{name.replace('_', ' ')} {n:,}".strip() for name, n in parts.items())
        lines[key.replace("_", " ")] = text or "none"
    return lines


def categories(archive: Archive, dataset: str) -> dict[str, dict[str, int]]:
    """Negatives in each harm category, by split; nothing where the data set has no categories."""
    counts = archive.manifest(f"{dataset}/negatives.parquet").get("counts", {})
    keys = {split: f"{split}_categories" for split in ("train", "test")}
    return {split: counts[key] for split, key in keys.items() if key in counts}


def _leaks(archive: Archive, dataset: str) -> list[dict[str, Any]]:
    """Examples of train prompts that are evaluated as well, or nearly so."""
    return archive.manifest(f"{dataset}/negatives.parquet").get("leaks", [])


def _pools(archive: Archive, settings: Settings, block: Block) -> Iterator[dict[str, Any]]:
    """The data sheets of the pools that this experiment's methods draw from, and the scores that they filter by."""
    ((_, experiment),) = settings.experiments.items()
    entries = [settings.methods[method] for method in experiment.methods if method != "initial"]
    filters: dict[str, set[str]] = {}
    for method in entries:
        if method.positives == "self":
            pool = filters.setdefault("corrected" if method.self_correction else "plain", set())
            pool |= {method.filter.reward} if method.filter else set()
    for number, (pool, rewards) in enumerate(filters.items()):
        place = f"{block.dataset}/{block.model}/positives/{pool}"
        sheet = archive.json(f"{place}.sheet.json")
        if not sheet["samples"]:  # no prompt fitted the context
            continue
        scores = {
            reward: [row["score"] for row in archive.table(f"{place}.scores/{reward}.parquet", records.SCORES)]
            for reward in sorted(rewards)
        }
        svg = figures.render(figures.pool(sheet, scores), "svg")
        name = f"pool-{block.dataset}-{block.model}-{number}"
        yield {
            "block": block,
            "pool": pool,
            "sheet": sheet,
            "figure": figures.inline(svg, name, "Lengths of the samples, and the reasons against them"),
        }


def _rounds(archive: Archive, settings: Settings, block: Block) -> Iterator[dict[str, Any]]:
    """The data sheets of the online rounds, run by run."""
    ((_, experiment),) = settings.experiments.items()
    for run in runs(experiment, block.dataset, block.model):
        method = settings.methods.get(run.method)  # none for the initial model
        for number in rounds.numbers(method, settings.train_of(method).steps) if method else ():
            sheet = archive.json(f"{run.path}/rounds/{number}/positives.sheet.json")
            if sheet["samples"]:
                lengths = [int(length) * count for length, count in sheet["tokens"].items()]
                yield {"run": run, "round": number, "sheet": sheet, "length": sum(lengths) / sheet["samples"]}


def _trainings(block: Block, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A line per run; the last values are means over the last tenth of the steps."""
    for method, logs in block.logs.items():
        for seed, log in zip(seeds, logs, strict=True):
            if not log:
                continue
            rates = [row["tokens_per_second"] for row in log if row.get("tokens_per_second") is not None]
            memory = [row["memory_gb"] for row in log if row.get("memory_gb") is not None]
            tail = log[-max(1, len(log) // 10) :]
            last = {}
            for key in ("loss", "margin", "positive_logratio", "negative_logratio"):
                values = [row[key] for row in tail if row.get(key) is not None]
                last[key] = fmean(values) if values else None
            yield {
                "method": method,
                "seed": seed,
                "steps": log[-1]["step"],
                "epochs": log[-1].get("epoch"),
                "time": duration(sum(row.get("seconds") or 0 for row in log)),
                "rate": median(rates) if rates else None,
                "memory": max(memory, default=None),
                **last,
            }


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _examples(archive: Archive, settings: Settings, block: Block) -> Iterator[dict[str, Any]]:
    """Test prompts drawn by a hash of their identity, with every method's first answer, first seed."""
    ((_, experiment),) = settings.experiments.items()
    asked = {
        row["prompt_id"]: row["messages"]
        for row in archive.table(f"{block.dataset}/prompts.parquet", records.PROMPTS)
        if row["origin"] == "test"
    }
    drawn = sorted(asked, key=lambda prompt: records.derived_seed("examples", prompt))[:EXAMPLES]
    answers: dict[str, list[dict[str, Any]]] = {prompt: [] for prompt in drawn}
    for run in runs(experiment, block.dataset, block.model):
        if run.seed == experiment.seeds[0]:
            scores = _first_scores(archive, settings, run, answers)
            for row in archive.table(f"{run.path}/responses.parquet", records.SAMPLES):
                if row["prompt_id"] in answers and row["sample"] == 0:
                    prompt = row["prompt_id"]
                    answers[prompt].append({"method": run.method, "scores": scores[prompt], **row})
    for prompt in drawn:
        yield {"messages": asked[prompt], "answers": answers[prompt]}


def _shown(score: float, rule: Rule | None) -> str:
    """A score for readers: of a rule that says yes or no, in words."""
    if rule and exact.is_share(rule) and score in (0, 1):
        return "yes" if score else "no"
    return f"{score:.2f}".replace("-", "−")


def _first_scores(archive: Archive, settings: Settings, run: Run, wanted) -> dict[str, list[tuple[str, str]]]:
    """Per prompt: (scorer, score) of a run's first answer, and (judge, outcome) over both orders."""
    ((_, experiment),) = settings.experiments.items()
    found = defaultdict(list)
    for reward in experiment.rewards:
        for row in archive.table(f"{run.path}/scores/{reward}.parquet", records.SCORES):
            if row["prompt_id"] in wanted and row["sample"] == 0:
                found[row["prompt_id"]].append((reward, _shown(row["score"], settings.rewards[reward].rule)))
    for judge in experiment.judges if run.method != "initial" else []:
        verdicts = defaultdict(set)
        for row in archive.table(f"{run.path}/judge/{judge}.parquet", records.VERDICTS):
            if row["prompt_id"] in wanted:
                verdicts[row["prompt_id"]].add(row["verdict"])
        words = {"method": "won", "initial": "lost", "tie": "tied"}
        for prompt, seen in verdicts.items():
            outcome = words[next(iter(seen))] if len(seen) == 1 else "orders disagree"
            found[prompt].append((judge, outcome))
    return found
