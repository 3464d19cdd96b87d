"""Merges the shards of a pool after a check that they are complete."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from d2o import records, schemas
from d2o.errors import D2OError
from d2o.positives import sheet
from d2o.settings import PositivesStage, result_keys


def merge(stage: PositivesStage, model: Path, prompts: Path, shards: Sequence[Path], output: Path) -> None:
    """Write the pool, sorted by prompt and sample, and beside it its data sheet `<name>.sheet.json`.

    Raises:
        D2OError: where a shard was sampled from another model or other prompts or by another plan, or where a sample
            is missing or occurs twice.
    """
    inputs = [model / "manifest.json", prompts]
    long = set().union(*(_check(shard, stage, inputs) for shard in shards))
    expected = {
        row["prompt_id"]
        for batch in records.read_batches(prompts, schemas.NEGATIVES)
        for row in batch
        if row["split"] == "train"
    } - long
    with records.artifact(output, stage, inputs) as draft:
        with records.TableWriter(draft.path, schemas.POOL) as table:
            usable: Counter[str] = Counter(dict.fromkeys(expected, 0))
            for row in _complete(_sorted(shards), expected, stage.sampling.k, output):
                usable[row["prompt_id"]] += row["usable"]
                table.add(row)
        draft.facts |= {"rows": table.count, "shards": len(shards), "long_prompts": sorted(long)}
        # A method with at most this many positives gets the same ones from a larger pool.
        draft.facts["fewest_usable"] = min(usable.values(), default=0)
        description = sheet.describe(draft.path, prompts, stage.sampling)
        with records.artifact(output.with_suffix(".sheet.json"), stage, inputs) as page:
            records.write_json(page.path, {"long_prompts": len(long)} | description)


def _check(shard: Path, stage: PositivesStage, inputs: Sequence[Path]) -> set[str]:
    """Check that a shard belongs to this pool; return the prompts that it left out."""
    made = records.read_manifest(shard)
    if result_keys(PositivesStage.model_validate(made["settings"])) != result_keys(stage):
        raise D2OError(f"{shard}: sampled by another plan than this pool's; delete it and run again")
    for path in inputs:
        if records.file_digest(path) not in made["inputs"].values():
            raise D2OError(f"{shard}: not sampled from {path} as it is now; delete it and run again")
    return set(made["long_prompts"])


def _sorted(shards: Sequence[Path]) -> Iterator[dict]:
    """The rows of all shards by prompt and sample; each shard is sorted already."""
    tables = [(row for batch in records.read_batches(shard, schemas.POOL) for row in batch) for shard in shards]
    return heapq.merge(*tables, key=lambda row: (row["prompt_id"], row["sample"]))


def _complete(rows: Iterator[dict], expected: set[str], k: int, output: Path) -> Iterator[dict]:
    """Yield the rows unchanged; check that every expected prompt has each of its k samples exactly once."""
    missing = set(expected)
    for prompt, group in groupby(rows, key=lambda row: row["prompt_id"]):
        samples = list(group)
        numbers = [row["sample"] for row in samples]
        if prompt not in missing or numbers != list(range(k)):
            raise D2OError(
                f"{output}: prompt {prompt} has the samples {numbers} in the shards, and should have "
                f"{f'0 to {k - 1}, each once' if prompt in expected else 'none'}; delete the shards and run again"
            )
        missing.remove(prompt)
        yield from samples
    if missing:
        raise D2OError(f"{output}: no shard holds prompt {min(missing)}; delete the shards and run again")
