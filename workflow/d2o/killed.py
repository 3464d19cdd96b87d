"""Reports why a job was killed; otherwise its log would end without a message."""

from __future__ import annotations

import atexit
import faulthandler
import os
import re
import signal
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_KERNEL = Path("/dev/kmsg")
_MEMORY = "killed by the kernel, for want of memory; give the job more (compute.memory_gb, compute.jobs)"
_PERHAPS = "killed, perhaps by the kernel, which has killed something here for want of memory (compute.memory_gb)"
_UNKNOWN = "ended by a signal: killed from outside, for want of memory, or by a crash of compiled code"
# The end of the pipe to the watcher that this process holds.
_alive: int | None = None


def watch() -> None:
    """Start a process that writes a line to stderr once this one is killed. Call this before threads start.

    On a crash, Python itself writes where it happened.
    """
    global _alive
    faulthandler.enable()
    reader, _alive = os.pipe()
    job, kills = os.getpid(), _kills(Path("/proc/self/cgroup"))
    sys.stderr.flush()
    if os.fork():
        os.close(reader)
        atexit.register(ends)
        os.register_at_fork(after_in_child=_let_go)
        return
    try:
        os.close(_alive)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not os.read(reader, 1):  # the pipe is closed, without a message
            more = _kills(Path("/proc/self/cgroup")) > kills
            why = _MEMORY if _named(job) else _PERHAPS if more else _UNKNOWN
            print(f"error: {why}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def ends() -> None:
    """Notify the watcher that this process ends by itself, or becomes another program."""
    global _alive
    if _alive is not None:
        os.write(_alive, b".")
        os.close(_alive)
        _alive = None


def _let_go() -> None:
    """Close the pipe in a forked child, which must not notify the watcher or keep the pipe open for its parent."""
    global _alive
    if _alive is not None:
        os.close(_alive)
        _alive = None


def _kills(own: Path) -> int:
    """How many processes the kernel has killed in this process's control groups because memory ran out."""
    total = 0
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):  # of version 2, of version 1
            for name in ("memory.events", "memory.oom_control"):
                file = _CGROUPS / controllers / group.lstrip("/") / name
                if file.exists():
                    total += sum(map(int, re.findall(r"^oom_kill (\d+)$", file.read_text(), re.M)))
    return total


def _named(job: int) -> bool:
    """Whether the kernel's messages, if readable, report a process as killed because memory ran out."""
    try:
        messages = os.open(_KERNEL, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        while True:
            if re.search(rb"(?i)killed process %d \(" % job, os.read(messages, 8192)):  # one message per call
                return True
    except OSError:  # BlockingIOError at their end
        return False
    finally:
        os.close(messages)
