"""Why a job was killed. The kernel gives it no time to say so, and its log would end without a word."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_KERNEL = Path("/dev/kmsg")
_MEMORY = "by the kernel, for want of memory; give the job more (compute.memory_gb, compute.jobs)"
_UNKNOWN = "from outside: a signal such as kill -9, or the kernel for want of memory"
# The end of the pipe to the watcher that this process holds.
_alive: int | None = None


def watch() -> None:
    """Start a process that writes a line to stderr once this one is killed. Call this before threads start."""
    global _alive
    reader, _alive = os.pipe()
    job, kills = os.getpid(), _kills(Path("/proc/self/cgroup"))
    sys.stderr.flush()
    if os.fork():
        os.close(reader)
        atexit.register(ends)
        return
    try:
        os.close(_alive)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not os.read(reader, 1):  # the pipe is closed, and nothing was said
            short = _kills(Path("/proc/self/cgroup")) > kills or _named(job)
            print(f"error: killed {_MEMORY if short else _UNKNOWN}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def ends() -> None:
    """Say that this process ends by itself, or becomes another program."""
    global _alive
    if _alive is not None:
        os.write(_alive, b".")
        os.close(_alive)
        _alive = None


def _kills(own: Path) -> int:
    """How many processes the kernel has killed in the control groups of this process, for want of memory."""
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
    """Whether the kernel's messages, where they may be read, name a process as killed for want of memory."""
    try:
        messages = os.open(_KERNEL, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        while True:
            if re.search(rb"(?i)killed process %d \(" % job, os.read(messages, 8192)):  # one message a call
                return True
    except OSError:  # BlockingIOError at their end
        return False
    finally:
        os.close(messages)
