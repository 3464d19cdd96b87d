"""GPUs on this machine, leased to one job at a time: Snakemake counts them, and assigns none.

A lease is a lock (flock) on one file a device, held as long as the process lives: a killed job's is free by itself.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import tempfile
import time
from pathlib import Path

from d2o.errors import D2OError

# Seconds between two looks at devices that other jobs have.
_PATIENCE = 1.0
# How many GPUs this process asked for. Those that it starts, such as the ranks of a training, have its devices.
_ASKED = "D2O_ASKED_GPUS"


def lease(gpus: int, share: bool = False) -> None:
    """Take so many GPUs for this process and those that it starts: sets CUDA_VISIBLE_DEVICES; waits where it must.

    To be called before anything looks for devices. The lease is of those that CUDA_VISIBLE_DEVICES names, where a
    scheduler or the user has set it; a process that leases none sees none. It does nothing where there is no NVIDIA
    device, and in a process that a leasing one has started.

    Args:
        share: take none for oneself; other jobs may use the same.
    Raises:
        D2OError: where there are fewer.
    """
    if _ASKED in os.environ:
        return
    os.environ[_ASKED] = str(gpus)
    assigned = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = _present() if assigned is None else [device for device in assigned.split(",") if device]
    if not there or (share and gpus):
        return
    if gpus > len(there):
        raise D2OError(
            f"devices: the job asks for {gpus} GPUs, and there are {len(there)}; lower compute.gpus or train.ranks"
        )
    if gpus == 0:
        print(f"devices: compute.gpus is 0, so the {len(there)} GPUs here are not used", file=sys.stderr, flush=True)
    waiting = False
    while len(taken := _take(there, gpus)) < gpus:
        if not waiting:
            print(
                f"devices: waiting for {gpus} of {len(there)} GPUs, which other jobs have leased "
                f"(compute.share_gpus: true would share them)",
                file=sys.stderr,
                flush=True,
            )
        waiting = True
        time.sleep(_PATIENCE)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def device() -> str:
    """Where models run in this process: `cuda` where torch sees a GPU, else `cpu`.

    Raises:
        D2OError: where torch sees fewer GPUs than the job asks for: it would run for days on the CPU.
    """
    import torch

    asked, seen = int(os.environ.get(_ASKED, 0)), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < asked:
        raise D2OError(
            f"devices: the job asks for {asked} GPUs, and torch {torch.__version__} sees {seen}; look at nvidia-smi, "
            f"install with `make env LOCK=gpu`, or set compute.gpus: 0"
        )
    return "cuda" if seen else "cpu"


def _present(folder: Path = Path("/dev")) -> list[str]:
    """The NVIDIA devices of this machine or container, by the numbers that CUDA gives them: from 0 on."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"nvidia\d+", path.name)]
    return [str(number) for number in range(len(found))]


def _take(devices: list[str], wanted: int) -> list[str]:
    """Lock so many of these devices, or, where not as many are free, none."""
    taken: dict[str, int] = {}
    for device in devices:
        if len(taken) < wanted:
            lock = os.open(_lock(device), os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken[device] = lock
            except BlockingIOError:
                os.close(lock)
    if len(taken) < wanted:
        for lock in taken.values():
            os.close(lock)
        return []
    for lock in taken.values():
        os.set_inheritable(lock, True)  # so that it outlives becoming torchrun
    return list(taken)


def _lock(device: str) -> Path:
    """The file that stands for a device; within a Slurm allocation devices are counted from 0 again."""
    folder = Path(tempfile.gettempdir()) / f"d2o-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    place = "-".join(filter(None, (socket.gethostname(), os.environ.get("SLURM_JOB_ID"))))
    return folder / f"{place}-{device}.lock"
