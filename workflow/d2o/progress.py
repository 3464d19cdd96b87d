"""`d2o watch`: the trainings under way in a folder of results, from the logs that they write."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2o import layout, locks
from d2o.errors import D2OError

if TYPE_CHECKING:
    from rich.table import Table

# Files beside a training's checkpoints: one line per step; and the number of steps, with the alarms that are raised.
LOG, STATE = "train.jsonl", "watch.json"
# Most recent steps, from which rate and time left are computed.
_RECENT = 10
# A log is being written if its last line is at most this many steps, or seconds, old.
_STEPS, _SECONDS = 5, 60
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class UnfinishedTraining:
    """A training that is not over.

    Attributes:
        name: data set, model, method and seed.
        active: whether a process works on it: one of this machine, by its lock; one of another, by the log's age.
        steps: number of steps of the whole training.
        alarms: current problems, by the alarm's name.
        records: the lines of its log, one per step.
    """

    name: str
    active: bool
    steps: int
    alarms: dict[str, str]
    records: list[dict[str, Any]]

    @property
    def left(self) -> float:
        """Seconds until the last step, at the rate of the last few."""
        return (self.steps - len(self.records)) * _step(self.records)


def _step(records: Sequence[dict[str, Any]]) -> float:
    """Seconds per step: the mean of the last few steps."""
    recent = [record["seconds"] for record in records[-_RECENT:]]
    return sum(recent) / max(len(recent), 1)


def trainings(results: Path) -> list[UnfinishedTraining]:
    """The trainings of a folder of results, and of such folders in it, that have begun and are not over.

    Raises:
        D2OError: where there is no such folder.
    """
    if not results.is_dir():
        raise D2OError(f"{results}: no such folder; name the folder of results")
    patterns = [re.sub(r"\{\w+\}", "*", layout.pattern(place)) for place in ("checkpoints", "again_checkpoints")]
    patterns += [f"*/{pattern}" for pattern in patterns]
    folders = sorted(state.parent for pattern in patterns for state in results.glob(f"{pattern}/{STATE}"))
    entries = (read(folder, "/".join(folder.relative_to(results).parts[:-1])) for folder in folders)
    return [training for training in entries if training]


def read(folder: Path, name: str) -> UnfinishedTraining | None:
    """The training whose checkpoints lie in a folder; None where it has just ended, and they are gone.

    A line that is being written is left out.
    """
    try:
        state, log = json.loads((folder / STATE).read_text()), (folder / LOG).read_text(errors="replace")
        age = time.time() - (folder / LOG).stat().st_mtime
    except FileNotFoundError:
        return None
    records = []
    for line in log.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    active = locks.held(folder) or age < max(_STEPS * _step(records), _SECONDS)
    return UnfinishedTraining(name, active, state["steps"], state["alarms"], records)


def sparkline(values: Iterable[float | None], width: int = 24) -> str:
    """The finite values as a curve of at most `width` characters, each a mean of neighbouring values."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    size = max(1, -(-len(finite) // width))
    means = [sum(part) / len(part) for part in (finite[at : at + size] for at in range(0, len(finite), size))]
    if not means:
        return ""
    low, reach = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[round((value - low) / reach * (len(_BLOCKS) - 1))] for value in means)


def table(trainings: Sequence[UnfinishedTraining]) -> Table:
    """One row per training: progress, time left, speed, curves of loss and margin, and alarms."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("training", "step", "left", "tokens/s", "loss", "margin, nats", "alarms", expand=True)
    for one in trainings:
        last = one.records[-1] if one.records else {}
        done = len(one.records)
        shown.add_row(
            Text(one.name),
            f"{done}/{one.steps} ({done / one.steps:.0%})",
            _duration(one.left) if one.active else "not at work",
            f"{last.get('tokens_per_second', 0):,.0f}",
            *(_curve(one.records, key) for key in ("loss", "margin")),
            Text("; ".join(one.alarms.values())),
        )
    return shown


def _curve(records: Sequence[dict[str, Any]], key: str) -> str:
    values = [record.get(key) for record in records]
    present = [value for value in values if value is not None]
    return f"{sparkline(values)} {present[-1]:.3f}" if present else "–"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def watch(results: Path, every: float = 2.0) -> None:
    """Show the table until Ctrl-C, or once where the output is no terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def shown() -> Table | Text:
        unfinished = trainings(results)
        return table(unfinished) if unfinished else Text(f"{results}: no training is under way")

    console = Console()
    if not console.is_terminal:
        console.print(shown())
        return
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(shown(), refresh=True)
                time.sleep(every)
        except KeyboardInterrupt:
            return
