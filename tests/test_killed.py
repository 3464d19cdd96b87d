"""A killed job's log says why it ended; a job that ends by itself, and well, adds no word."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2o import killed

CGROUP = Path("/sys/fs/cgroup")


def run(code: str, **options) -> subprocess.CompletedProcess:
    """Python code after `killed.watch()`; ends when the watcher has closed stderr too."""
    code = f"import os, sys; from d2o import killed; killed.watch(); {code}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('done')", 0, ""),
        ("sys.exit('error: a file is missing')", 1, "error: a file is missing\n"),
        ("killed.ends(); os._exit(0)", 0, ""),
        ("killed.ends(); os.execvp('true', ['true'])", 0, ""),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "error: killed from outside: a signal such as kill -9, or the "),
    ],
)
def test_only_a_killed_job_is_told_of(code, status, said):
    done = run(code)
    assert done.returncode == status
    assert done.stderr.startswith(said) and bool(said) == bool(done.stderr)


@pytest.fixture
def small_memory():
    """A control group of 64 MB, and what puts a process into it."""
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
        group.rmdir()


def test_a_job_without_memory_is_told_what_it_lacked(small_memory):
    done = run("bytearray(256 << 20)", preexec_fn=small_memory)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.startswith("error: killed by the kernel, for want of memory; give the job more (compute.mem")


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


def test_a_locale_that_is_not_utf8_changes_nothing(tmp_path):
    (tmp_path / "t.parquet.manifest.json").write_text(json.dumps({"of": "Käthe"}, ensure_ascii=False))
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    command = [sys.executable, "-m", "d2o", "show", str(tmp_path / "t.parquet")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert json.loads(done.stdout) == {"of": "Käthe"}, done.stderr
