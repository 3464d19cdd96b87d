"""A killed job's log states why it ended; a job that ends normally adds nothing to it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import ROOT
from d2o import killed

CGROUP = Path("/sys/fs/cgroup")
UNKNOWN = "error: ended by a signal: killed from outside, for want of memory, or by a crash"


def run(code: str, **options) -> subprocess.CompletedProcess:
    """Run Python code after `killed.watch()`; ends when the watcher has closed stderr, too."""
    code = f"import os, sys, time; from d2o import killed; killed.watch(); {code}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('done')", 0, ""),
        ("sys.exit('error: a file is missing')", 1, "error: a file is missing\n"),
        ("killed.ends(); os._exit(0)", 0, ""),
        ("killed.ends(); os.execvp('true', ['true'])", 0, ""),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, UNKNOWN),
        ("os.abort()", -signal.SIGABRT, UNKNOWN),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, UNKNOWN),
        # A forked child ends normally, and its parent does not.
        ("os.fork() and (os.wait(), os.kill(os.getpid(), 9))", -signal.SIGKILL, UNKNOWN),
        ("os.fork() and os.wait()", 0, ""),
    ],
)
def test_only_a_killed_job_is_told_of(code, status, said):
    done = run(code)
    assert done.returncode == status
    assert said in done.stderr and bool(said) == bool(done.stderr)
    crashed = status in (-signal.SIGABRT, -signal.SIGSEGV)
    assert ('File "<string>", line 1 in <module>' in done.stderr) == crashed, "where it was"


def test_a_child_that_stays_does_not_keep_the_line_back():
    began = time.monotonic()
    done = run("os.fork() or (os.close(1), os.close(2), time.sleep(20), os._exit(0)); os.kill(os.getpid(), 9)")
    assert UNKNOWN in done.stderr and time.monotonic() - began < 15


@pytest.fixture
def small_memory():
    """A control group of 64 MB; yields a function that puts the calling process into it."""
    version1 = CGROUP / "memory"
    group = (version1 if version1.is_dir() else CGROUP) / f"d2o-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if version1.is_dir() else "memory.max")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("control groups cannot be made here")
    try:
        if not limit.exists():
            pytest.skip("control groups have no limit of memory here")
        limit.write_text(str(64 << 20))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        for _ in range(100):  # the last of its processes may still be ending
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def test_a_job_without_memory_is_told_what_it_lacked(small_memory):
    done = run("bytearray(256 << 20)", preexec_fn=small_memory)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.startswith("error: killed") and "for want of memory" in done.stderr


def test_the_kernels_count_is_read_of_both_versions_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(killed, "_CGROUPS", tmp_path)
    own = tmp_path / "own"
    assert killed._kills(own) == 0  # no Linux, or no /proc
    for folder, name, text in (
        ("job", "memory.events", "low 0\noom 5\noom_kill 2\n"),
        ("memory/job", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text(text)
    own.write_text("0::/job\n")
    assert killed._kills(own) == 2
    own.write_text("5:cpu:/job\n4:memory:/job\n")
    assert killed._kills(own) == 3


@pytest.mark.parametrize(("job", "named"), [(71, True), (7, False)])
def test_the_kernels_messages_name_a_process(tmp_path, monkeypatch, job, named):
    messages = tmp_path / "kmsg"
    os.mkfifo(messages)
    monkeypatch.setattr(killed, "_KERNEL", messages)
    held = os.open(messages, os.O_RDWR)
    os.write(held, b"3,1,1,-;Out of memory: Killed process 71 (python) total-vm:1kB\n")
    assert killed._named(job) == named
    os.close(held)


NOT_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_locale_that_is_not_utf8_changes_nothing(tmp_path):
    (tmp_path / "t.parquet.manifest.json").write_text(json.dumps({"of": "Käthe"}, ensure_ascii=False))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | NOT_UTF8
    command = [sys.executable, "-m", "d2o", "show", str(tmp_path / "t.parquet")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert json.loads(done.stdout) == {"of": "Käthe"}, done.stderr


def test_snakemake_in_a_locale_that_is_not_utf8_is_told_the_way_out():
    command = [sys.executable, "-m", "snakemake", "-n", "--nolock"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=os.environ | NOT_UTF8)
    assert done.returncode == 1 and "all files here are UTF-8: set PYTHONUTF8=1" in done.stdout
