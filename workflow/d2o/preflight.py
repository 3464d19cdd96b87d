"""What is looked at before the first job, so that none fails after hours for want of a key, a licence or a device."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from d2o import devices, hub, weights
from d2o.bill import hardware
from d2o.bill.jobs import RULES, Job
from d2o.bill.work import Estimate
from d2o.plan import Plan
from d2o.settings import Hub, Settings


def problems(jobs: Sequence[Any], plan: Plan, executor: str) -> list[str]:
    """All that the jobs of a run lack, a line each, in alphabetical order.

    Args:
        jobs: Snakemake's, those that will run: the name of their `rule`, `wildcards` and `resources`.
        executor: the name of Snakemake's; with `local` they run on this machine, and its devices are theirs.
    """
    here, submitted = executor == "local", [job for job in jobs if not job.is_local]
    lines = {line for job in jobs for line in _of_job(job, plan.settings, here)}
    scheduled = () if here else (_kubernetes if executor == "kubernetes-volume" else _slurm)(submitted)
    return sorted({*lines, *_disk(jobs, plan), *_released(jobs), *scheduled})


def _of_job(job: Any, s: Settings, here: bool) -> Iterator[str]:
    looked = _LOOKED_AT.get(job.rule.name)
    yield from filter(None, looked(s, job.wildcards) if looked else ())
    if here:
        yield from _machine(job.resources)


def _disk(jobs: Sequence[Any], plan: Plan) -> Iterator[str]:
    """Whether the results have room, as `d2o plan` counts it: for what the jobs leave and one training takes, with the
    checkpoints of all others that wait for a round."""
    folder = Path(plan.settings.results).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    estimate, free = Estimate(plan, hardware.named("cpu")), shutil.disk_usage(there).free
    planned = [Job(job.rule.name, tuple(job.wildcards.items())) for job in jobs if job.rule.name in RULES]
    left = sum(
        size
        for job in planned
        if (size := estimate.models(job)) and not Path(plan.layout.path(RULES[job.rule].place, job.names)).exists()
    )
    passing = max(map(estimate.passing, planned), default=0.0)
    between = sorted(map(estimate.waiting, planned))[:-1]
    if left + passing + sum(between) > free:
        rounds = f", others keep {sum(between) / 1e9:,.3g} between their rounds" if any(between) else ""
        yield (
            f"the run leaves {left / 1e9:,.3g} GB of models in {plan.settings.results}, a training takes "
            f"{passing / 1e9:,.3g} while it runs{rounds}, and {free / 1e9:,.3g} are free: make room, put `results` "
            f"elsewhere, or run one experiment at a time"
        )


# They take a model for its digest alone.
_NOT_LOADED = ("merge_positives", "merge_round")


def _released(jobs: Sequence[Any]) -> Iterator[str]:
    """A line for each model that is to be loaded and whose weights are not there; not where it is made again."""
    made = {str(path) for job in jobs for path in job.output}
    for job in jobs:
        models = [str(path) for path in job.input if str(path).endswith("/manifest.json") and str(path) not in made]
        if models and (snapshot := job.params.get("model")):  # in the place of the model that it led to
            models = [str(snapshot)]
        if job.rule.name not in _NOT_LOADED:
            yield from filter(None, (weights.lacking(Path(path).parent) for path in models))


# What a job asks of a node, and the letter of `sinfo` for what a node of a partition has at most.
_LIMITS = {"runtime": ("%l", "minutes"), "mem_mb": ("%m", "MB of memory"), "cores": ("%c", "cores")}


def _slurm(jobs: Sequence[Any]) -> Iterator[str]:
    """A line for each partition of Slurm and each resource of which it has less than a job asks for."""
    if not shutil.which("sinfo"):
        return
    columns = "|".join(["%P", *(letter for letter, _ in _LIMITS.values())])
    listed = subprocess.run(["sinfo", "-h", "-e", "-o", columns], capture_output=True, text=True).stdout
    limits: dict[tuple[str, str], float] = {}
    for line in listed.splitlines():
        name, *values = line.split("|")
        for need, value in zip(_LIMITS, values, strict=True):
            for partition in (name.rstrip("*"), "") if name.endswith("*") else (name,):  # "": what no job has to name
                limits[partition, need] = max(limits.get((partition, need), 0.0), _limit(value))
    asked: dict[tuple[str, str], tuple[float, str]] = {}
    for job in jobs:
        partition = str(job.resources.get("slurm_partition", ""))
        for need in _LIMITS:
            value = float(job.threads if need == "cores" else job.resources.get(need, 0))
            asked[partition, need] = max(asked.get((partition, need), (0.0, "")), (value, job.rule.name))
    for (partition, need), (value, rule) in asked.items():
        if value > (limit := limits.get((partition, need), math.inf)):
            yield (
                f"{rule}: a job asks for {value:,.0f} {_LIMITS[need][1]}, and the partition "
                f"{partition or 'of Slurm'} has {limit:,.0f}: lower `compute`, or name another one in the profile"
            )


def _limit(value: str) -> float:
    """A number as `sinfo` prints it, `16000+` included; of a time such as `1-00:30:00` its minutes."""
    if value == "infinite":
        return math.inf
    if ":" not in value:
        return float(value.rstrip("+"))
    days, _, clock = value.rpartition("-")
    hours, minutes, seconds = ([0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60


def _kubernetes(jobs: Sequence[Any]) -> Iterator[str]:
    for nodes in {job.resources.get("nodes", 1) for job in jobs} - {1}:
        yield f"a training asks for {nodes} nodes, and a pod has one: set train.nodes: 1, or run on Slurm"


def _machine(resources: Any) -> Iterator[str]:
    nodes = resources.get("nodes", 1)
    if nodes > 1 and "SLURM_JOB_ID" not in os.environ:
        yield f"a training asks for {nodes} nodes: run with --profile profiles/slurm, or set train.nodes: 1"
    gpus, there = resources.get("leased", resources.get("gpu", 0)), len(devices.visible())
    if there and gpus > there:  # where none is known, as on WSL, the first job says whether torch sees one
        yield f"a job asks for {gpus} GPUs, and there are {there}: lower compute.gpus or train.ranks"


def _fetched(source: Hub, kind: Literal["model", "dataset"]) -> list[str | None]:
    return [hub.lacking(source.hub, source.revision, kind)] if source.hub else []


def _judge(s: Settings, wildcards: Any) -> list[str | None]:
    # A server of one's own, without TLS, seldom wants a key.
    if os.environ.get("OPENAI_API_KEY") or urlsplit(s.judges[wildcards.judge].base_url).scheme != "https":
        return []
    return [f"judges.{wildcards.judge}: put its key into OPENAI_API_KEY (any text where the server wants none)"]


def _trackers(s: Settings, wildcards: Any) -> list[str | None]:
    trackers = s.train_of(s.methods[wildcards.method]).trackers
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    return [f"train.trackers: {name} is not installed; install it, or take it out of the list" for name in missing]


# By the rule of a job.
_LOOKED_AT: dict[str, Callable[[Settings, Any], list[str | None]]] = {
    "fetch_model": lambda s, wildcards: _fetched(s.models[wildcards.model], "model"),
    "fetch_reward": lambda s, wildcards: _fetched(s.rewards[wildcards.reward].source, "model"),
    "read_dataset": lambda s, wildcards: _fetched(s.datasets[wildcards.dataset], "dataset"),
    "fetch_questions": lambda s, wildcards: _fetched(s.tasks[wildcards.task], "dataset"),
    "judge_responses": _judge,
    "judge_pairs": _judge,
    "train_method": _trackers,
    "train_to_round": _trackers,
}
