"""Checkpoints of a training: written completely, bound to one run; a restart loads the newest whole one."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.serialization import config as torch_files

from d2o import checksums, locks, records
from d2o.errors import D2OError
from d2o.settings import TrainStage, result_keys
from d2o.train import sizes
from d2o.train.data import Inputs
from d2o.train.engine import TrainingEngine
from d2o.train.watch import LOG

# Last file of a checkpoint: the digests of all others. A checkpoint without it, or with other files, is broken.
_WHOLE = "whole.json"


class Checkpoints:
    """The checkpoints of one run in one folder, which one training at a time may use.

    Attributes:
        folder: holds `step<n>/` and other files that the run keeps until its end.
        ending: whether a SIGTERM asks the run to end; set by `due`.
    """

    def __init__(self, folder: Path, stage: TrainStage, inputs: Inputs):
        """Bind the folder to a run; files of another run in it are removed, which a line reports.

        Args:
            inputs: files that the run reads; the number of its online rounds that are sampled may differ.
        Raises:
            D2OError: where another training uses the folder, or the folder is of the same run on another number of
                ranks, is not ours, or is damaged.
        """
        self.folder, self._train, self._saved = folder, stage.train, time.monotonic()
        self._moving = stage.method.ema is not None
        self.ending = self._asked = False
        if dist.get_rank() == 0:
            self._lock = locks.hold(folder)
        settings = result_keys(stage)
        del settings["train"]["ranks"]
        run = {
            "stage": settings,
            "inputs": {str(path): records.file_digest(path) for path in inputs.lasting},
        }
        sampled = [records.file_digest(path) for path in inputs.rounds]
        mark, ranks = folder / "run.json", dist.get_world_size()
        earlier = _read(mark) if mark.exists() else {}
        if not earlier and any((step / _WHOLE).exists() for step in self._newest_first()):
            raise D2OError(f"{mark}: gone, and checkpoints are there; delete {folder} to start again from step 0")
        saved_ranks, known = earlier.pop("ranks", ranks), earlier.pop("rounds", [])
        if known[: len(sampled)] != sampled[: len(known)]:
            earlier = {}
        if earlier == run and saved_ranks != ranks and self._newest_first():
            raise D2OError(
                f"{folder}: these checkpoints were written by {saved_ranks} ranks and cannot go on with {ranks}; "
                f"set train.ranks: {saved_ranks}, or delete the folder to start again from step 0"
            )
        dist.barrier()
        if dist.get_rank() == 0 and (earlier != run or saved_ranks != ranks):
            if folder.exists() and earlier != run:
                print(f"train: {folder} is of other settings or inputs; starting again from step 0", file=sys.stderr)
            records.empty_folder(folder)
            known = []
        if dist.get_rank() == 0:
            records.write_json(mark, checksums.seal(run | {"ranks": ranks, "rounds": max(known, sampled, key=len)}))
            records.sync(mark)
        dist.barrier()

    def check_room(self, policy: nn.Module) -> None:
        """Check that the disk has room for all that the run writes; to be called before ZeRO partitions the weights.

        Raises:
            D2OError: where it has not; the message states what is needed and what is free.
        """
        train, weights = self._train, list(policy.parameters())
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        checkpoint = sizes.checkpoint(trained, weights[0].itemsize, self._moving)
        model = sum(weight.nbytes for weight in weights)
        snapshots = [self.folder.with_name(f"step{step}") / "model" / "manifest.json" for step in train.snapshots]
        models = 1 + sum(not snapshot.exists() for snapshot in snapshots)
        written = (train.keep_checkpoints + 1) * checkpoint + models * model
        used = sum(file.stat().st_size for file in self.folder.glob("step*/*"))
        free = shutil.disk_usage(self.folder).free
        if written - used > free:
            raise D2OError(
                f"{self.folder}: {free / 1e9:.1f} GB are free, and the training writes up to {written / 1e9:.1f}: "
                f"{train.keep_checkpoints + 1} checkpoints of {checkpoint / 1e9:.1f} and {models} models "
                f"of {model / 1e9:.1f}; make room, or set train.lora, a lower train.keep_checkpoints or "
                f"fewer train.snapshots"
            )

    def due(self, device: torch.device) -> bool:
        """Whether it is time for a checkpoint: minutes have passed, or a SIGTERM came. Called on all ranks.

        The clock of rank 0 decides, since clocks differ; a SIGTERM may reach any rank. A checkpoint is written by all
        ranks or none.
        """
        late = dist.get_rank() == 0 and time.monotonic() - self._saved >= 60 * self._train.checkpoint_minutes
        decision = torch.tensor([late, self._asked], dtype=torch.uint8, device=device)
        dist.all_reduce(decision, dist.ReduceOp.MAX)
        self.ending = bool(decision[1])
        return bool(decision.any())

    def save(self, engine: TrainingEngine, step: int, state: dict[str, list[Tensor]]) -> None:
        """Save everything that the steps after `step` depend on; called on all ranks.

        Args:
            step: steps done.
            state: this rank's tensors beside the engine's.
        Raises:
            D2OError: where it cannot be written; the checkpoints before it stay.
        """
        folder = self.folder / f"step{step}"
        try:
            try:
                engine.deepspeed.save_checkpoint(
                    self.folder, tag=folder.name, save_latest=False, exclude_frozen_parameters=True
                )
                torch.save(state, folder / f"rank{dist.get_rank()}.pt")
            except RuntimeError as error:  # torch's writer reports a full disk in this way
                if "write" not in str(error):
                    raise
                raise OSError(str(error)) from None
            dist.barrier()
            digests = _digests(folder)
            if dist.get_rank() == 0:
                records.sync(self.folder / LOG)
                records.write_json(folder / _WHOLE, digests)
                records.sync(folder / _WHOLE)
                records.sync_names(folder)
                records.sync_names(self.folder)  # before an older one goes
        except OSError as error:
            raise D2OError(
                f"{folder}: the checkpoint could not be written ({error}); make room or mend the disk, and the same "
                f"command goes on after the step of the checkpoint before"
            ) from None
        if dist.get_rank() == 0:
            for old in self._newest_first()[self._train.keep_checkpoints :]:
                records.remove_folder(old)
        dist.barrier()
        self._saved = time.monotonic()

    def load(self, engine: TrainingEngine, until: int) -> tuple[int, dict[str, list[Tensor]]]:
        """Load the newest whole checkpoint; return the steps done and the state given to `save`, or (0, {}).

        From here on a SIGTERM does not end the process; it makes a checkpoint due. Broken checkpoints are removed.

        Args:
            until: steps that may be done. Later checkpoints depend on rounds that this run does not have; they are
                removed.
        """
        signal.signal(signal.SIGTERM, self._ask)
        folders = self._newest_first()
        dist.barrier()
        for folder in folders:
            problem = "" if _step(folder) > until else _problem(folder)
            if problem is None:
                # Every rank reads the file with all weights: mapped, a node holds it once, and can free it again.
                with torch_files.patch("load.mmap", True):
                    engine.deepspeed.load_checkpoint(self.folder, tag=folder.name)
                    state = torch.load(folder / f"rank{dist.get_rank()}.pt", map_location=engine.device)
                self._say(f"going on after step {_step(folder)}")
                return _step(folder), state
            dist.barrier()
            if dist.get_rank() == 0:
                records.remove_folder(folder)
            if problem:
                self._say(f"{folder} is broken ({problem}); it is removed")
        return 0, {}

    def leave(self, step: int) -> NoReturn:
        """End this process as SIGTERM would have, after its work is saved."""
        self._say(f"ended by SIGTERM after step {step}, which is kept; the same command goes on from there")
        dist.destroy_process_group()
        sys.exit(128 + signal.SIGTERM)

    def close(self, device: torch.device, over: bool) -> None:
        """Release the folder, and delete it where the run is over. Called on all ranks.

        It is kept where a SIGTERM came since the last step: torchrun then fails whatever its ranks do.
        """
        self.due(device)
        over = over and not self.ending
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.get_rank() == 0:
            if over:
                records.remove_folder(self.folder)
            locks.release(self._lock)

    def _ask(self, *_) -> None:
        self._asked = True

    def _say(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(f"train: {line}", file=sys.stderr, flush=True)

    def _newest_first(self) -> list[Path]:
        steps = [folder for folder in self.folder.glob("step*") if folder.name.removeprefix("step").isdecimal()]
        return sorted(steps, key=_step, reverse=True)


def _read(mark: Path) -> dict:
    run = checksums.unsealed(mark.read_text(errors="replace"))
    if run is None:
        raise D2OError(f"{mark}: damaged; delete {mark.parent} to start again from step 0")
    return run


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step"))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, synced to the disk; the ranks share the work. Called on all ranks."""
    files = sorted(file for file in folder.iterdir() if file.name != _WHOLE and file.is_file())
    mine = {}
    for file in files[dist.get_rank() :: dist.get_world_size()]:
        records.sync(file)
        mine[file.name] = records.file_digest(file)
    shares = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return {name: digest for share in shares for name, digest in share.items()}


def _problem(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None. Called on all ranks."""
    digests = _digests(folder)
    try:
        written = json.loads((folder / _WHOLE).read_text())
    except (OSError, ValueError, RecursionError):
        return "it was not written to its end"
    if not isinstance(written, dict) or not written:
        return f"{_WHOLE} is damaged"
    damaged = sorted(name for name in written | digests if written.get(name) != digests.get(name))
    return f"{damaged[0]} is not as it was written" if damaged else None
