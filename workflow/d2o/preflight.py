"""Checks before the first job, so that no job fails after hours because a key, a licence or a device is missing."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from d2o import devices, hub, runs, weights
from d2o.bill import hardware
from d2o.bill.jobs import OTHERS, RULES, Job
from d2o.bill.work import Bill, Work
from d2o.plan import Plan
from d2o.settings import Hub, Settings

# Seconds by which the clock of a file server may be ahead.
_SKEW = 60


def problems(jobs: Sequence[Any], plan: Plan, executor: str) -> list[str]:
    """The problems of the jobs of a run, one line each, in alphabetical order.

    Args:
        jobs: Snakemake's jobs that will run: the name of their `rule`, `wildcards` and `resources`.
        executor: the name of Snakemake's executor; with `local` the jobs run on this machine and use its devices.
    """
    here, submitted = executor == "local", [job for job in jobs if not job.is_local]
    lines = {line for job in jobs for line in _of_job(job, plan.settings, here)}
    planned = [Job(job.rule.name, tuple(job.wildcards.items())) for job in jobs if job.rule.name in RULES]
    estimate = Bill(plan, hardware.named(hardware.of(plan.settings.compute)))
    where = _kubernetes if executor == "kubernetes-volume" else _slurm
    around = _memory(planned, estimate) if here else where(submitted)
    budgets = _budgets(planned, estimate, plan.settings)
    dates = _dates(jobs, Path(plan.settings.results))
    return sorted({*lines, *_disk(planned, estimate, plan), *budgets, *_released(jobs), *dates, *around})


def _of_job(job: Any, s: Settings, here: bool) -> Iterator[str]:
    looked = _LOOKED_AT.get(job.rule.name)
    yield from filter(None, looked(s, job.wildcards) if looked else ())
    if here:
        yield from _machine(job.resources)


def _disk(jobs: Sequence[Job], estimate: Bill, plan: Plan) -> Iterator[str]:
    """A line if the disk of the results has too little room, as `d2o plan` counts it.

    Room is needed for the models that the jobs leave, for what one training takes while it runs, and for the
    checkpoints of all others that wait for a round.
    """
    folder = Path(plan.settings.results).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    left = sum(
        size
        for job in jobs
        if (size := estimate.models(job)) and not Path(plan.layout.path(RULES[job.rule].place, job.names)).exists()
    )
    passing = max(map(estimate.passing, jobs), default=0.0)
    between = sorted(map(estimate.waiting, jobs))[:-1]  # one of them runs
    if left + passing + sum(between) > free:
        rounds = f", others keep {sum(between) / 1e9:,.3g} between their rounds" if any(between) else ""
        yield (
            f"the run leaves {left / 1e9:,.3g} GB of models in {plan.settings.results}, a training takes "
            f"{passing / 1e9:,.3g} while it runs{rounds}, and {free / 1e9:,.3g} are free: make room, put `results` "
            f"elsewhere, or run one experiment at a time"
        )


def _memory(jobs: Sequence[Job], estimate: Bill) -> Iterator[str]:
    """A line if the largest training's `Bill.states` alone exceed this machine's memory.

    `compute` is not compared: it is an upper limit, which nothing enforces locally.
    """
    taken, capacity = max(map(estimate.states, jobs), default=0.0), _machine_memory()
    if taken > capacity:
        yield (
            f"a training takes {taken / 1e9:,.3g} GB of this machine's memory for its states alone (weights, "
            f"gradients, optimizer; with GPUs what train.offload moves), and there are {capacity / 1e9:,.3g}: take a "
            f"smaller model, train.lora, or a larger machine"
        )


def _machine_memory() -> float:
    """Bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _budgets(jobs: Sequence[Job], estimate: Bill, s: Settings) -> Iterator[str]:
    """A line for each limit of a judge that its jobs together exceed."""
    asked: dict[str, list[Work]] = {}
    limited = {name for name, judge in s.judges.items() if {judge.max_requests, judge.max_usd} != {None}}
    for job in jobs:
        if job.kind == "judge" and job.names["judge"] in limited:
            asked.setdefault(job.names["judge"], []).append(estimate.of(job))
    for name, works in asked.items():
        requests, usd = sum(work.requests for work in works), sum(work.usd for work in works)
        for key, cost, form in (("max_requests", requests, ",.0f"), ("max_usd", usd, ",.2f")):
            limit = getattr(s.judges[name], key)
            if limit is not None and cost > limit:
                yield (
                    f"judges.{name}.{key}: {len(works)} jobs ask for at most {cost:{form}} in all, "
                    f"more than {limit:,g}: raise it, or take fewer prompts"
                )


def _released(jobs: Sequence[Any]) -> Iterator[str]:
    """A line for each model that a job loads and whose weights are missing, unless this run makes the model again."""
    made = {str(path) for job in jobs for path in job.output}
    for job in jobs:
        models = [str(path) for path in job.input if str(path).endswith("/manifest.json") and str(path) not in made]
        if models and (snapshot := job.params.get("model")):  # loaded instead of the run's final model
            models = [str(snapshot)]
        # Other jobs, such as reports, cards and merged pools, read only its manifest or its digest.
        if job.rule.name in RULES and RULES[job.rule.name].kind != OTHERS:
            yield from filter(None, (weights.lacking(Path(path).parent) for path in models))


def _dates(jobs: Sequence[Any], results: Path) -> Iterator[str]:
    """A line for each input dated in the future: Snakemake fails every job whose output is older than an input.

    That is what a clock leaves that was set back. Artifacts are dated again here, since only their content counts.
    """
    now = time.time()
    for path in {Path(str(path)) for job in jobs for path in job.input}:
        if not path.is_file() or (date := max(path.stat().st_mtime, path.lstat().st_mtime)) <= now:
            continue
        if path.is_relative_to(results) and not path.is_symlink():
            os.utime(path)
        elif date > now + _SKEW:
            yield f"{path}: dated {datetime.fromtimestamp(date):%Y-%m-%d %H:%M}, in the future; run: touch {path}"


def _minutes(value: str) -> float:
    """The minutes of a time as `sinfo` prints it, such as `1-00:30:00`; infinite where it is no time."""
    if not re.fullmatch(r"[\d:-]+", value):
        return math.inf
    days, _, clock = value.rpartition("-")
    hours, minutes, seconds = ([0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60


def _least(value: str) -> float:
    """A number as `sinfo` prints it, `16000+` included; infinite where it is no number."""
    return float(number) if (number := value.rstrip("+")).isdigit() else math.inf


def _gpus(value: str) -> float:
    """The GPUs among the generic resources of a node, such as `gpu:a100:4(S:0-1),nvme:1`."""
    return float(sum(map(int, re.findall(r"\bgpu:(?:[^:,(]+:)?(\d+)", value))))


# Seconds that Slurm has to list its nodes.
_PATIENCE = 60
# The resources of a node of a partition: the letter of `sinfo` for each, and the function that reads its value.
_NODE = {"minutes": ("%l", _minutes), "MB of memory": ("%m", _least), "cores": ("%c", _least), "GPUs": ("%G", _gpus)}


def _slurm(jobs: Sequence[Any]) -> Iterator[str]:
    """A line for each kind of job whose request, at the last attempt, no node of its Slurm partition can meet."""
    if not shutil.which("sinfo"):
        return
    command = ["sinfo", "-a", "-h", "-e", "-o", "|".join(["%P", *(letter for letter, _ in _NODE.values())])]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE).stdout
    except subprocess.TimeoutExpired:
        return  # the first job reports that Slurm does not answer
    nodes: dict[str, list[list[float]]] = {}
    for line in listed.splitlines():
        name, *values = line.split("|")
        node = [read(value) for (_, read), value in zip(_NODE.values(), values, strict=True)]
        for partition in (name.rstrip("*"), "") if name.endswith("*") else (name,):  # "": the default partition
            nodes.setdefault(partition, []).append(node)
    # The nodes of another cluster are not listed.
    here = [job for job in jobs if nodes and not {"cluster", "clusters", "slurm_cluster"} & {*job.resources.keys()}]
    asked = {_asked(job): job.rule.name for job in here}
    for (partitions, needs), rule in asked.items():
        for name in {*partitions.split(",")} - {*nodes, ""}:
            yield f"{rule}: Slurm has no partition {name!r}: name one in the profile"
        members = [node for name in partitions.split(",") for node in nodes.get(name, [])]
        fitting = (all(need <= has for need, has in zip(needs, node, strict=True)) for node in members)
        if members and not any(fitting):
            yield f"{rule}: {_too_much(needs, members, partitions)}: lower `compute`, or name another in the profile"


def _asked(job: Any) -> tuple[str, tuple[float, ...]]:
    """The partitions of a job, and what it asks of one node at its last attempt, in the order of `_NODE`."""
    first, job.attempt = job.attempt, job.restart_times + 1
    asked, cores = job.resources, job.threads
    job.attempt = first
    gpus = asked.get("leased", asked.get("gpu", 0))
    needs = (asked.get("runtime", 0), asked.get("mem_mb", 0), cores, gpus)
    return str(asked.get("slurm_partition", "")), tuple(map(float, needs))


def _too_much(needs: Sequence[float], nodes: Sequence[Sequence[float]], partitions: str) -> str:
    """States what no node has: one resource, or all of them at once."""
    where = f"the partition {partitions or 'of Slurm'}"
    for name, need, most in zip(_NODE, needs, map(max, zip(*nodes, strict=True)), strict=True):
        if need > most:
            return f"a job asks for {need:,.0f} {name}, and {where} has {most:,.0f}"
    all_of_it = ", ".join(f"{need:,.0f} {name}" for name, need in zip(_NODE, needs, strict=True) if need)
    return f"a job asks for {all_of_it}, and no node of {where} has all of it"


def _kubernetes(jobs: Sequence[Any]) -> Iterator[str]:
    for nodes in {job.resources.get("nodes", 1) for job in jobs} - {1}:
        yield f"a training asks for {nodes} nodes, and a pod has one: set train.nodes: 1, or run on Slurm"


def _machine(resources: Any) -> Iterator[str]:
    nodes = resources.get("nodes", 1)
    if nodes > 1 and "SLURM_JOB_ID" not in os.environ:
        yield f"a training asks for {nodes} nodes: run with --profile profiles/slurm, or set train.nodes: 1"
    gpus, present = resources.get("leased", resources.get("gpu", 0)), len(devices.visible())
    if present and gpus > present:  # where none is known, as on WSL, the first job reports whether torch sees one
        yield f"a job asks for {gpus} GPUs, and there are {present}: lower compute.gpus or train.ranks"


def _fetched(source: Hub, kind: Literal["model", "dataset"]) -> list[str | None]:
    return [hub.lacking(source.hub, source.revision, kind)] if source.hub else []


def _judge(s: Settings, wildcards: Any) -> list[str | None]:
    # A user's own server, without TLS, seldom needs a key.
    if os.environ.get("OPENAI_API_KEY") or urlsplit(s.judges[wildcards.judge].base_url).scheme != "https":
        return []
    return [f"judges.{wildcards.judge}: put its key into OPENAI_API_KEY (any text where the server wants none)"]


def _trackers(s: Settings, wildcards: Any) -> list[str | None]:
    trackers = runs.train_of(s, s.methods[wildcards.method]).trackers
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    return [f"train.trackers: {name} is not installed; install it, or take it out of the list" for name in missing]


# The checks of a job, by its rule.
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
