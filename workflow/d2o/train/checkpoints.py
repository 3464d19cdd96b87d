"""Checkpoints of a training: written whole, bound to one run, the newest whole one taken up again."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from d2o import records
from d2o.errors import D2OError
from d2o.settings import TrainStage, result_keys
from d2o.train.data import Inputs
from d2o.train.engine import Engine

# Last file of a checkpoint: the sizes of all others. Without it, or with other sizes, the checkpoint is not whole.
_WHOLE = "whole.json"


class Checkpoints:
    """The checkpoints of one run in one folder.

    Attributes:
        folder: holds `step<n>/` and what else the run keeps until its end.
    """

    def __init__(self, folder: Path, stage: TrainStage, inputs: Inputs):
        """Bind the folder to a run; what lies there of another run is removed with a line that says so.

        Args:
            inputs: files that the run reads; how many of its online rounds are sampled may differ.
        Raises:
            D2OError: where the folder is of this very run on another number of ranks, or not ours.
        """
        self.folder, self._train, self._saved = folder, stage.train, time.monotonic()
        settings = result_keys(stage)
        del settings["train"]["ranks"]
        run = {
            "stage": settings,
            "inputs": {str(path): records.file_digest(path) for path in inputs.lasting},
        }
        sampled = [records.file_digest(path) for path in inputs.rounds]
        mark, ranks = folder / "run.json", dist.get_world_size()
        earlier = json.loads(mark.read_text()) if mark.exists() else {}
        there, known = earlier.pop("ranks", ranks), earlier.pop("rounds", [])
        if known[: len(sampled)] != sampled[: len(known)]:
            earlier = {}
        if earlier == run and there != ranks and self._newest_first():
            raise D2OError(
                f"{folder}: these checkpoints were written by {there} ranks and cannot go on with {ranks}; "
                f"set train.ranks: {there}, or delete the folder to start again from step 0"
            )
        dist.barrier()
        if dist.get_rank() == 0 and (earlier != run or there != ranks):
            if folder.exists() and earlier != run:
                print(f"train: {folder} is of other settings or inputs; starting again from step 0", file=sys.stderr)
            records.empty_folder(folder)
            known = []
        if dist.get_rank() == 0:
            records.write_json(mark, run | {"ranks": ranks, "rounds": max(known, sampled, key=len)})
        dist.barrier()

    def due(self, device: torch.device) -> bool:
        """Whether it is time for a checkpoint; called on all ranks.

        Rank 0 decides: clocks differ, and a checkpoint is written by all ranks or none.
        """
        late = time.monotonic() - self._saved >= 60 * self._train.checkpoint_minutes
        decision = torch.tensor(int(late), device=device)
        dist.broadcast(decision, src=0)
        return bool(decision)

    def save(self, engine: Engine, step: int, state: dict[str, list[Tensor]]) -> None:
        """Keep everything that the steps after `step` depend on; called on all ranks.

        Args:
            step: steps done.
            state: this rank's tensors beside the engine's.
        """
        folder = self.folder / f"step{step}"
        engine.deepspeed.save_checkpoint(
            self.folder, tag=folder.name, save_latest=False, exclude_frozen_parameters=True
        )
        torch.save(state, folder / f"rank{dist.get_rank()}.pt")
        dist.barrier()
        if dist.get_rank() == 0:
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
            records.write_json(folder / _WHOLE, sizes)
            for old in self._newest_first()[self._train.keep_checkpoints :]:
                shutil.rmtree(old)
        dist.barrier()
        self._saved = time.monotonic()

    def load(self, engine: Engine, until: int) -> tuple[int, dict[str, list[Tensor]]]:
        """Take up the newest whole checkpoint: steps done, and the state given to `save`; (0, {}) without one.

        Args:
            until: steps that may be done. Later checkpoints know rounds that this run does not; they are removed.
        """
        if dist.get_rank() == 0:
            for folder in self._newest_first():
                if _step(folder) > until:
                    shutil.rmtree(folder)
        dist.barrier()
        for folder in self._newest_first():
            if problem := _problem(folder):
                if dist.get_rank() == 0:
                    print(f"train: {folder} is broken ({problem}); it is skipped", file=sys.stderr, flush=True)
                continue
            engine.deepspeed.load_checkpoint(self.folder, tag=folder.name)
            state = torch.load(folder / f"rank{dist.get_rank()}.pt", map_location=engine.device)
            if dist.get_rank() == 0:
                print(f"train: going on after step {_step(folder)}", file=sys.stderr, flush=True)
            return _step(folder), state
        return 0, {}

    def remove(self) -> None:
        """Delete all checkpoints: the run is over. Called on all ranks."""
        dist.barrier()
        if dist.get_rank() == 0:
            records.remove_folder(self.folder)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step*"), key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step"))


def _problem(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        sizes = json.loads((folder / _WHOLE).read_text())
    except (OSError, ValueError):
        return "it was not written to its end"
    for name, size in sizes.items():
        if not (folder / name).exists() or (folder / name).stat().st_size != size:
            return f"{name} is not whole"
    return None
