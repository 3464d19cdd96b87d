"""The paths of all artifacts, defined here and nowhere else.

Rules name an artifact as a path variable of Snakemake (`<responses>`); Python code uses `Layout`. Artifacts that
several methods share are in folders above the method's.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# Folders, and the artifacts in them. `<name>` refers to another place of this table, `{name}` is a wildcard.
PLACES = {
    "data": "<results>/{dataset}",
    "base": "<data>/{model}",
    "run": "<base>/{method}/seed{seed}",
    "point": "<run>{snapshot}",  # the end of a run (snapshot is empty), or its weights after a step (/step<n>)
    "round": "<run>/rounds/{round}",
    # By name.
    "organism": "<results>/organisms/{organism}/{split}.jsonl",
    "model": "<results>/models/{model}/manifest.json",
    "questions": "<results>/tasks/{task}/manifest.json",
    "fetched_reward": "<results>/rewards/{reward}/manifest.json",
    # By data set.
    "rows": "<data>/rows.parquet",
    "negatives": "<data>/negatives.parquet",
    "pairs": "<data>/pairs.parquet",
    "prompts": "<data>/prompts.parquet",
    "leaks": "<data>/leaks/{task}.parquet",
    "trained_reward": "<data>/rewards/{reward}/manifest.json",
    "pair_prompts": "<data>/pair_quality/prompts.parquet",
    "pair_responses": "<data>/pair_quality/{preference}.parquet",
    "pair_scores": "<data>/pair_quality/scores/{reward}/{preference}.parquet",
    "pair_verdicts": "<data>/pair_quality/judge/{judge}.parquet",
    # By data set and initial model. A pool is `corrected-k11` or, by seed, `plain-seed1-k11`.
    "sampled": "<base>/positives/{kind}.sampled",
    "pool": "<base>/positives/{pool}.parquet",
    "pool_shard": "<base>/positives/{pool}.shards/{shard}.parquet",
    "pool_sheet": "<base>/positives/{pool}.sheet.json",
    "pool_scores": "<base>/positives/{pool}.scores/{reward}.parquet",
    "reference_logprobs": "<base>/reference_logprobs/{table}.parquet",
    "tuned": "<base>/{method}/tuned.json",
    # By run.
    "checkpoints": "<run>/checkpoints",
    "trained": "<run>/model/manifest.json",
    "train_log": "<run>/train.jsonl",
    "weights": "<point>/model/manifest.json",
    "responses": "<point>/responses.parquet",
    "heldout_logprobs": "<point>/heldout_logprobs.parquet",
    "scores": "<point>/scores/{reward}.parquet",
    "verdicts": "<run>/judge/{judge}.parquet",
    "task_values": "<point>/tasks/{task}.parquet",
    "released": "<run>/released.json",
    "again": "<run>/again",
    "again_checkpoints": "<again>/checkpoints",
    "trained_again": "<again>/model/manifest.json",
    "again_log": "<again>/train.jsonl",
    "restored": "<run>/restored.json",
    "card": "<run>/card.md",
    # By online round of a run.
    "round_policy": "<round>/policy/manifest.json",
    "round_negatives": "<round>/negatives.parquet",
    "round_sampled": "<round>/sampled",
    "round_shard": "<round>/shards/1-of-1.parquet",
    "round_pool": "<round>/positives.parquet",
    "round_sheet": "<round>/positives.sheet.json",
    "round_logprobs": "<round>/reference_logprobs.parquet",
    # By experiment.
    "reports": "<results>/reports",
    "report_folder": "<reports>/{experiment}",
    "page": "<report_folder>/report.html",
    "report_table": "<report_folder>/table.csv",
    "pair_quality_figure": "<report_folder>/figures/pair_quality.svg",
    "human_eval": "<report_folder>/human_eval",
    "human_key": "<human_eval>/key.parquet",
    "human_pages": "<human_eval>/pages/manifest.json",
    "human_verdicts": "<human_eval>/verdicts.parquet",
}

# Patterns of wildcards that stand for more than a name.
_VALUES = {"snapshot": r"(?:/step\d+)?"}


class Layout:
    """The paths of artifacts in one folder."""

    def __init__(self, results: str):
        """
        Args:
            results: the folder that contains all artifacts.
        """
        self.results = results

    def path(self, place: str, names: Mapping[str, Any] | None = None, **more: Any) -> str:
        """The path of an artifact or a folder.

        Args:
            place: key of `PLACES`.
            names: values of the place's wildcards; others are ignored.
            more: further values.
        """
        return f"{self.results}/{below(place, names, **more)}"


def below(place: str, names: Mapping[str, Any] | None = None, **more: Any) -> str:
    """As `Layout.path`, relative to the folder of results."""
    return pattern(place).format_map({**(names or {}), **more})


def wildcards(place: str) -> set[str]:
    """The wildcards of a place's path."""
    return {name for _, name, _, _ in string.Formatter().parse(pattern(place)) if name}


@cache
def pattern(place: str) -> str:
    """The path of a place, relative to the results, with its wildcards."""
    return expanded(PLACES[place])


def expanded(path: str) -> str:
    """Expand a path that begins with a place, such as `<run>/logs/train`; relative to the results, with wildcards."""
    while inner := re.match(r"<(?!results>)(\w+)>", path):
        path = PLACES[inner[1]] + path[inner.end() :]
    return path.removeprefix("<results>/")


def names_in(place: str, path: str) -> dict[str, str]:
    """The values of the wildcards in a path, relative to the results; empty where it is not a path of the place."""
    parts = re.split(r"\{(\w+)\}", pattern(place))
    seen: set[str] = set()
    expression = ""
    for number, part in enumerate(parts):
        if number % 2 == 0:
            expression += re.escape(part)
        elif part in seen:
            expression += f"(?P={part})"
        else:
            expression += f"(?P<{part}>{_VALUES.get(part, '[^/]+')})"
            seen.add(part)
    match = re.fullmatch(expression, path)
    return match.groupdict() if match else {}


def manifest_path(artifact: str | os.PathLike) -> Path:
    """The path of an artifact's manifest: in a folder, or beside a file."""
    artifact = Path(artifact)
    if artifact.is_dir():
        return artifact / "manifest.json"
    if artifact.name == "manifest.json" or artifact.name.endswith(".manifest.json"):
        return artifact
    return artifact.with_name(f"{artifact.name}.manifest.json")


def made_again(manifest: Path) -> Path:
    """The path to delete so that Snakemake makes an artifact again: the manifest of a folder, or the file itself.

    A snapshot and TensorBoard's files come with the model of their run, so its manifest is the one to delete.
    """
    if manifest.name != "manifest.json":
        return described(manifest)
    come_with = re.fullmatch(r"(.*/)?(?:step\d+/model|tensorboard)/manifest\.json", manifest.as_posix())
    return Path(f"{come_with[1] or ''}model/manifest.json") if come_with else manifest


def described(manifest: Path) -> Path:
    """The artifact of a manifest: the reverse of `manifest_path`."""
    if manifest.name == "manifest.json":
        return manifest.parent
    return manifest.with_name(manifest.name.removesuffix(".manifest.json"))
