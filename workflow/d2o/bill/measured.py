"""Cost of a finished job: time and memory from Snakemake's benchmark file, tokens from its tables and logs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from d2o import records
from d2o.bill.jobs import RULES, Job
from d2o.layout import Layout

# Kinds of jobs whose tables contain the number of tokens of each answer.
_ANSWERED = {"positives", "responses", "reference_logprobs", "heldout_logprobs"}
# The merged tables that hold the answers of shards; the shards' own tables are deleted after the merge.
_POOLS = {"sample_positives": "pool", "sample_round": "round_pool"}


def of(job: Job, results: str) -> dict[str, float] | None:
    """Seconds, bytes of memory (`host`) and tokens where they can be read; None where the job is not finished."""
    path = job.benchmark(results)
    if not path.exists():
        return None
    *_, last = csv.DictReader(path.read_text().splitlines(), delimiter="\t")
    taken = {"seconds": float(last["s"])}
    if last["max_rss"] not in ("NA", "-"):
        taken["host"] = float(last["max_rss"]) * 2**20
    place = Layout(results).path
    if job.rule == "train_method":
        log = Path(place("train_log", job.names))
        if log.exists():
            taken["tokens"] = _trained(log)
    elif job.kind in _ANSWERED:
        table = Path(place(_POOLS.get(job.rule, RULES[job.rule].place), job.names))
        if table.exists():
            shards = int(job.names.get("shard", "1-of-1").rpartition("-")[2])
            taken["answered"] = sum(records.read_any(table, ["tokens"])["tokens"].to_pylist()) / shards
    return taken


def _trained(log: Path) -> float:
    """Tokens of all steps of a training, from its log."""
    steps = map(json.loads, log.read_text().splitlines())
    return sum(step["seconds"] * step["tokens_per_second"] for step in steps)


def folder(path: Path) -> float:
    """Bytes of the files in a folder, without symbolic links."""
    return float(sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()))
