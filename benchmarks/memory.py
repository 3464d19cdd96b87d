"""Peak memory of one training step above its floor, the weights and gradients. Each way runs in its own process.

In this process glibc returns every freed tensor to the system (MALLOC_MMAP_THRESHOLD_), so that the resident set is
the memory in use; the kernel's high-water mark of it (VmHWM) is reset before the step.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from workload import Lengths, Shape


def over_floor(peer: str, shape: Shape, lengths: Lengths, k: int, seed: Sequence = ()) -> float:
    """Memory that a step in bf16 on one group takes on top of weights and gradients.

    Args:
        peer: name in `peers.PEERS`.
        k: positives of the group.
        seed: of the group, as in `Lengths.sample`.
    Returns:
        Megabytes (10⁶ bytes).
    """
    job = json.dumps({"peer": peer, "shape": asdict(shape), "lengths": asdict(lengths), "k": k, "seed": list(seed)})
    command = [sys.executable, __file__, job]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {peer}, K = {k}:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def _measure(peer: str, shape: dict, lengths: dict, k: int, seed: list) -> float:
    from peers import PEERS

    torch.set_num_threads(1)
    shape, lengths = Shape(**shape), Lengths(**lengths)
    way = PEERS[peer](shape.model("bf16"))
    way.step(way.groups([lengths.over(8).sample(1, shape.vocabulary)]))  # allocates the gradients
    way.model.zero_grad(set_to_none=False)
    groups = way.groups([lengths.sample(k, shape.vocabulary, *seed)])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    floor = _resident("VmRSS")
    way.step(groups)
    return (_resident("VmHWM") - floor) / 1e6


def _resident(key: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
