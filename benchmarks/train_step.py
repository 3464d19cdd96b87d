"""Time and memory of one training step, ours compared with others', on random weights of SmolLM2-135M's shape.

How it measures. A step is zero_grad, forward, loss and backward on one response group, from token ids on, with no
optimizer. All ways run in one process on one thread and are timed in CPU seconds of the process, so that other load
on the machine matters little; freed memory goes back to the system, though our trainings keep it. In each round all
ways get the same new random group, in random order; a figure is the median over the rounds of the ratio within a
round, and its spread is the lowest and the highest of these ratios. Two small rounds before them are a warm-up. Every
step's log-probs are compared with ours of the same round, and a difference ends the run.

Each ratio is reported with the ratio of the floating-point operations of the two ways. Only matrix products count,
recomputation included. Where the measured ratio is larger, the peer is slow for other reasons than the work that it
chose to do. Utilisation is our useful operations, nothing counted twice, over our time and over the fastest matrix
product of the same round. The ways are in peers.py, the rounds of each in plan.py. Memory is measured in separate
processes (memory.py). So are, in wall time, a whole optimizer step by number of ranks, and the share of a step on
short pairs that is not forward and backward (ranks.py).

Writes train_step.json and train_step.md once all is measured, and prints the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import table
from exactness import exactness
from memory import over_floor
from plan import FULL, QUICK, Plan
from ranks import scaling
from timing import time_grid
from workload import Shape


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the two files go")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = measure(QUICK if options.quick else FULL)
    text = table.markdown(result)
    options.folder.mkdir(parents=True, exist_ok=True)
    _write(options.folder / "train_step.json", json.dumps(result, indent=2) + "\n")
    _write(options.folder / "train_step.md", text)
    print(text)


def measure(plan: Plan) -> dict:
    """All that the table shows; the figures first."""
    # The grid last: its process keeps some of the memory of all ways.
    result = {
        "machine": _machine(plan.shape),
        "exactness": exactness(plan.shape, plan.lengths["brief"]),
        "memory": _memory(plan),
        "ranks": scaling(plan.shape, plan.lengths["brief"], plan.scaling),
        "short_step": _short_step(plan),
        "grid": time_grid(plan),
    }
    return table.figures(result) | result


def _memory(plan: Plan) -> dict[str, dict]:
    """MB over the floor: with K = 11 by way, and ours by K; all on the first group of the grid's brief lengths."""

    def peak(way: str, k: int) -> float:
        print(f"memory: {way}, K = {k}", file=sys.stderr)
        return round(over_floor(way, plan.shape, plan.lengths["brief"], k, ("brief", 0)), 1)

    return {
        "peers": {way: peak(way, 11) for way in ("ours", *plan.memory_peers)},
        "by_k": {k: peak("ours", k) for k in plan.memory_ks},
    }


def _short_step(plan: Plan) -> dict:
    """One rank's step on as many groups, each a pair of a quarter of the length: shows the cost beside the passes."""
    return scaling(plan.shape, plan.lengths["brief"].over(4), replace(plan.scaling, ranks=(1,), k=1))[0]


def _machine(shape: Shape) -> dict:
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "model": f"Llama with random weights, {shape.layers} layers of {shape.hidden}, vocabulary {shape.vocabulary}",
        "cpu": f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "date": date.today().isoformat(),
    }


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text)
    draft.replace(path)


if __name__ == "__main__":
    main()
