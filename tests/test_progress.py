"""`d2o watch`: what it reports of trainings under way."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from d2o import locks, progress
from d2o.errors import D2OError


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of a training after 4 of 10 steps, with a half-written log line of the fifth."""
    folder = tmp_path / "results" / "demo" / "tiny" / "d2o" / "seed0" / "checkpoints"
    folder.mkdir(parents=True)
    rows = [
        {"step": n + 1, "loss": 0.7 - n / 10, "margin": None, "seconds": 30, "tokens_per_second": 1234.5}
        for n in range(4)
    ]
    (folder / progress.LOG).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    (folder / progress.STATE).write_text(json.dumps({"steps": 10, "alarms": {"displacement": "has [lost] much"}}))
    return folder


def test_a_training_tells_its_rate_and_the_time_left(folder):
    [training] = progress.trainings(folder.parents[4])
    assert (training.name, training.steps) == ("demo/tiny/d2o/seed0", 10)
    assert len(training.records) == 4 and training.left == 6 * 30


def test_a_training_of_another_machine_is_at_work_while_its_log_is_written(folder):
    """Only its own machine sees its lock."""
    for steps, active in ((1, True), (4, True), (6, False)):
        written = time.time() - steps * 30
        os.utime(folder / progress.LOG, (written, written))
        [training] = progress.trainings(folder.parents[4])
        assert training.active == active
    assert "not at work" in told(folder.parents[4])
    lock = locks.hold(folder)
    [training] = progress.trainings(folder.parents[4])
    assert training.active
    locks.release(lock)


def told(results) -> str:
    """The output of the command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow"), "COLUMNS": "140"}
    done = subprocess.run(
        [sys.executable, "-m", "d2o", "watch", results], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_shown_fits_a_terminal_and_markup_in_it_is_text(folder):
    lock = locks.hold(folder)
    shown = told(folder.parents[4])
    locks.release(lock)
    for part in ("demo/tiny/d2o/seed0", "4/10 (40%)", "0:03:00", "1,234", "█▆▃▁ 0.400", "–", "has [lost] much"):
        assert part in shown
    with pytest.raises(D2OError, match="no such folder; name the folder of results"):
        progress.trainings(folder / "elsewhere")


def test_a_loss_that_is_not_finite_is_told(folder):
    with (folder / progress.LOG).open("w") as log:
        for loss in (0.7, math.inf, math.nan):
            log.write(json.dumps({"loss": loss, "seconds": 30}) + "\n")
    assert "▁ nan" in told(folder.parents[4])


def test_a_folder_of_results_in_another_is_looked_into(folder):
    """As `d2o init` writes it: results/mine."""
    results = folder.parents[4]
    inner = results / "mine"
    (results / "demo").rename(results.parent / "demo")
    assert f"{results}: no training is under way" in told(results).replace("\n", "")
    inner.mkdir()
    (results.parent / "demo").rename(inner / "demo")
    [training] = progress.trainings(results)
    assert training.name == "mine/demo/tiny/d2o/seed0"
    [training] = progress.trainings(inner)
    assert training.name == "demo/tiny/d2o/seed0"


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""), ([None], ""), ([1.0], "▁"), ([2, 2, 2], "▁▁▁"), ([0, 7], "▁█"), ([0, None, 7, 3.5], "▁█▅"),
        ([0, math.inf, 7, math.nan], "▁█"), ([math.nan], ""),
    ],
)  # fmt: skip
def test_a_curve_in_characters(values, drawn):
    assert progress.sparkline(values) == drawn
    assert len(progress.sparkline(range(1000))) <= 24
