"""The answers sampled so far: a folder of append-only files that outlives any job, one file per shard.

Each line is one answer with the identity of its request. So after a killed job, or with a larger K, more prompts,
other shards or another limit of resamples, only missing answers are sampled.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Container, Iterator
from pathlib import Path

from d2o import checksums, growing, locks
from d2o.generation import Completion

# Seconds between two fsyncs: a killed process loses nothing, a power failure at most the answers of this time.
_SYNC = 1.0


class Sampled:
    """Known answers by identity. A context manager: one process writes, and on exit all answers are on disk."""

    def __init__(self, folder: Path, name: str, prompts: Container[str]):
        """
        Args:
            folder: shared by all pools of one kind.
            name: of the file that answers are appended to, the one of this shard of this pool.
            prompts: ids of the prompts whose answers are wanted.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._own = folder / f"{name}.jsonl"
        self._known: dict[str, Completion] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for row in _rows(path):
                if row["prompt_id"] in prompts:
                    completion = Completion(row["text"], row["tokens"], row["finish"])
                    self._known.setdefault(row["identity"], completion)

    def __enter__(self) -> Sampled:
        self._lock = locks.hold(self._own)
        self._file, self._synced = growing.appended(self._own), time.monotonic()
        _drop_broken_end(self._own)
        return self

    def __exit__(self, *_) -> None:
        self._sync()
        self._file.close()
        locks.release(self._lock)

    def get(self, identity: str) -> Completion | None:
        """The answer to a request, if there is one."""
        return self._known.get(identity)

    def add(self, identity: str, prompt_id: str, completion: Completion) -> None:
        """Keep an answer."""
        self._known[identity] = completion
        self._file.write(checksums.sealed({"identity": identity, "prompt_id": prompt_id, **vars(completion)}))
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _rows(path: Path) -> Iterator[dict]:
    """The complete lines of a file; another shard may still be writing its last line."""
    broken = 0
    with path.open(errors="replace") as lines:
        for line in lines:
            if row := checksums.unsealed(line):
                yield row
            else:
                broken += line.endswith("\n")
    if broken:
        print(f"{path}: {broken:,} lines are broken; their answers are sampled again", file=sys.stderr)


def _drop_broken_end(path: Path) -> None:
    """Cut off the line that a killed job left half-written."""
    data = path.read_bytes()
    if (whole := data.rfind(b"\n") + 1) < len(data):
        print(f"{path}: the last line is broken; its answer is sampled again", file=sys.stderr)
        os.truncate(path, whole)
