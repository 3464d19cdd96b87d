"""The bill of a config before its first job: jobs, tokens, operations, hours, memory, disk and a judge's requests.

The jobs are those that Snakemake plans; the cost of each is computed from the models' shapes, the finished tables and
a few assumptions (`rows`, `hardware`, `work`). It works offline and runs no job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from d2o.bill import hardware, jobs, measured
from d2o.bill.jobs import OTHERS, Job
from d2o.bill.work import Bill, Work
from d2o.errors import D2OError
from d2o.plan import Plan
from d2o.settings import JOBS, Need

# Kinds of jobs as the stages follow each other.
_ORDER = ["models", *JOBS, "judge", OTHERS]


def lines(config: Path, experiments: Sequence[str], device: str | None) -> list[str]:
    """The bill of a config, line by line.

    Args:
        experiments: names of those whose reports are wanted; empty: all.
        device: key of `hardware.DEVICES`; None: `hardware.of` the config.
    """
    plan, planned, estimate, device = _planned(config, experiments, device)
    works = [(job, estimate.of(job)) for job in planned]
    on_cpu = not hardware.named(device).memory
    rows = [_row(kind, [work for job, work in works if job.kind == kind]) for kind in _ORDER]
    rows = [row for row in rows if row[1] != "0"]
    total = _row("all", [work for _, work in works])
    total[2:4] = ["", ""]
    unit = "core" if on_cpu else device
    head = ["", "jobs", "rows", "tokens", "FLOP", f"{unit}-hours", "GB device", "GB host", "GB written", "GB left"]
    page = _table([head, *rows, total])
    trainings = [job for job in planned if job.kind == "train"]
    page += _passing(estimate, trainings)
    page += [
        f"Of all hours, {_hours(works, lambda work: work.starting):,.1f} pass before the first unit of work of jobs, "
        f"{_hours(works, lambda work: work.writing):,.1f} while checkpoints and models are written."
    ]
    page += _judges(works)
    return [*page, *_exceeded(plan, works, device), *estimate.notes, *_known(estimate, trainings or planned)]


def check(config: Path, experiments: Sequence[str], device: str | None) -> list[str]:
    """Estimates compared with what the finished jobs of a config have taken: lines of text, one per kind of job.

    Times are first scaled by one factor, by which the device is slower than assumed. The factor is measured on the
    trainings, or on all jobs where no training is finished.

    Raises:
        D2OError: where no job is finished.
    """
    plan, planned, estimate, device = _planned(config, experiments, device)
    results = plan.settings.results
    pairs = [(job, estimate.of(job), taken) for job in planned if (taken := measured.of(job, results))]
    if not pairs:
        raise D2OError(f"{config}: no job is finished in {results}; run it first, or leave out --check")
    by_kind = {kind: [(w, m) for job, w, m in pairs if job.kind == kind] for kind in _ORDER}
    slower = _ratio(by_kind["train"] or [(w, m) for _, w, m in pairs], "seconds")
    page = [f"{device}: {slower:.2f} times as slow as assumed, by its {'trainings' if by_kind['train'] else 'jobs'}"]
    table = [
        ["", "jobs", *(head for unit in ("seconds", "tokens", "GB host") for head in (unit, "measured", "ratio"))]
    ]
    for kind, both in by_kind.items():
        if both and kind != OTHERS:
            table.append([kind, str(len(both)), *_compared(both, slower)])
    left = sum(work.left for _, work, _ in pairs), measured.folder(Path(results))
    page += _table(table)
    page.append(
        f"GB left: estimate {left[0] / 1e9:,.2f}, measured {left[1] / 1e9:,.2f}, ratio {left[1] / left[0]:.2f}"
    )
    return page


def _planned(config: Path, experiments: Sequence[str], device: str | None) -> tuple[Plan, list[Job], Bill, str]:
    plan = Plan(yaml.safe_load(config.read_text()), str(config))
    device = device or hardware.of(plan.settings.compute)
    if unknown := set(experiments) - plan.settings.experiments.keys():
        known = ", ".join(plan.settings.experiments)
        raise D2OError(f"{config}: no experiment {min(unknown)!r}; there are: {known}")
    estimate = Bill(plan, hardware.named(device))
    # Weights that experiments share are deleted when all these experiments have ended; no report requests this.
    targets = plan.targets("page", *experiments) + ([] if experiments else plan.targets("released"))
    return plan, jobs.planned(config, plan.settings.results, targets), estimate, device


# Lines of the bill ------------------------------------------------------------------------------


def _passing(estimate: Bill, trainings: Sequence[Job]) -> list[str]:
    """Disk that trainings take temporarily: while they run, while their models are used, while a round is awaited."""
    if not trainings:
        return []
    most, released, rounds = (
        [size(job) / 1e9 for job in trainings] for size in (estimate.passing, estimate.released, estimate.waiting)
    )
    line = f"Beside what is left, {max(most):,.1f} GB for each training that runs: its checkpoints"
    if any(released):
        line += f", and its models until they are released ({sum(released):,.1f} GB if all wait for that)"
    if any(rounds):
        line += f"; {sum(rounds):,.1f} GB of checkpoints if all that are online wait for a round"
    return [f"{line}."]


def _row(kind: str, works: Sequence[Work]) -> list[str]:
    def total(value: Callable[[Work], float]) -> float:
        return sum(map(value, works))

    hours = total(lambda work: work.seconds * work.devices / 3600)
    peaks = (max((getattr(work, key) for work in works), default=0) / 1e9 for key in ("device", "host"))
    return [
        kind,
        f"{len(works):,}",
        _short(total(lambda work: work.rows)),
        _short(total(lambda work: work.tokens)),
        _power(total(lambda work: work.flops)),
        f"{hours:,.{1 if hours >= 10 else 2}f}" if hours else "",
        *(f"{peak:,.1f}" if peak else "" for peak in peaks),
        f"{total(lambda work: work.written) / 1e9:,.1f}",
        f"{total(lambda work: work.left) / 1e9:,.1f}",
    ]


def _hours(works: Iterable[tuple[Job, Work]], seconds: Callable[[Work], float]) -> float:
    return sum(seconds(work) * work.devices for _, work in works) / 3600


def _short(number: float) -> str:
    """A count with three digits: 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}" if number else ""


def _power(number: float) -> str:
    return f"{number:.1e}".replace("e+", "e") if number else ""


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if place == 0 else cell.rjust(w)
            for place, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _judges(works: Iterable[tuple[Job, Work]]) -> list[str]:
    by_judge: dict[str, list[Work]] = {}
    for job, work in works:
        if work.requests:
            by_judge.setdefault(job.names["judge"], []).append(work)
    return [
        f"judges.{name}: {sum(w.requests for w in asked):,.0f} requests, at most {sum(w.usd for w in asked):,.0f} USD"
        for name, asked in by_judge.items()
    ]


def _exceeded(plan: Plan, works: Sequence[tuple[Job, Work]], device: str) -> list[str]:
    """One line per limit that a kind of jobs exceeds: a device's memory, or what its first attempt requests."""
    compute, room = plan.settings.compute, hardware.named(device).memory
    page = []
    for kind in JOBS:
        need = compute.jobs.get(kind, Need())
        most = {
            key: max((getattr(work, key) for job, work in works if job.kind == kind and work.devices), default=0.0)
            for key in ("device", "host", "seconds")
        }
        if room and most["device"] > room:
            page.append(f"{kind}: a job takes {most['device'] / 1e9:,.0f} GB on each {device}, of {room / 1e9:,.0f}")
        for key, taken in (("memory_gb", most["host"] / 1e9), ("minutes", most["seconds"] / 60)):
            own = getattr(need, key)
            if taken > (own or getattr(compute, key)):
                where = f"compute.jobs.{kind}.{key}" if own else f"compute.{key}"
                page.append(
                    f"{kind}: a job takes {taken:,.0f} of {key}, and {where} is {own or getattr(compute, key)}"
                )
    return page


def _known(estimate: Bill, planned: Sequence[Job]) -> list[str]:
    """One line per data set: its numbers of rows, their lengths, and where these are from."""
    crossed = {(n["dataset"], n["model"]): None for job in planned if {"dataset", "model"} <= (n := job.names).keys()}
    statements: dict[str, None] = {}
    for dataset, model in crossed:
        data = estimate.data(dataset, model)
        human = f"{_short(data.train.rows)} negatives to {_short(data.train.prompts)} prompts"
        lengths = f"{data.prompt:.0f} tokens a prompt, {data.answer:.0f} an answer"
        statements[f"datasets.{dataset}: {human}, {_short(data.pairs.rows)} pairs ({data.known}); {lengths}"] = None
    return list(statements)


# What was measured ------------------------------------------------------------------------------


def _compared(both: Sequence[tuple[Work, Mapping[str, float]]], slower: float) -> list[str]:
    """Cells of time, tokens and memory: estimate, measured value and their ratio; blank where nothing is measured."""
    cells = []
    for keys, factor, form in (
        (["seconds"], slower, ",.0f"),
        (["tokens", "answered"], 1.0, ",.0f"),
        (["host"], 1.0, ""),
    ):
        pairs = [(getattr(w, key) * factor, taken[key]) for key in keys for w, taken in both if taken.get(key)]
        expected, taken = (sum(values) for values in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
        if not expected:
            cells += ["", "", ""]
        elif form:
            cells += [format(expected, form), format(taken, form), f"{taken / expected:.2f}"]
        else:  # a mean over the jobs: their memory does not add up
            cells += [*(f"{total / len(pairs) / 1e9:,.2f}" for total in (expected, taken)), f"{taken / expected:.2f}"]
    return cells


def _ratio(both: Sequence[tuple[Any, Mapping[str, float]]], key: str) -> float:
    return sum(taken[key] for _, taken in both) / sum(getattr(work, key) for work, _ in both)
