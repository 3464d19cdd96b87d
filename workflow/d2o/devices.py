"""GPUs of this machine, each leased to one job at a time. Snakemake counts GPUs but assigns none.

A lease is a file lock (flock), one file per device. The process holds it as long as it lives, so a killed job leaves
no lease behind.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from d2o.errors import D2OError

# Seconds between two attempts to lease devices that other jobs hold.
_PATIENCE = 1.0
# How many GPUs this process asked for, and on which machine, as `8@HOST`. Its child processes there, such as the
# ranks of a training, use its devices; one that srun starts on another node has to lease its own there.
_ASKED = "D2O_ASKED_GPUS"


def lease(gpus: int, share: bool = False) -> None:
    """Lease GPUs for this process and its children, and set CUDA_VISIBLE_DEVICES to them. Waits until they are free.

    Call this before any library looks for devices. If a scheduler or the user has set CUDA_VISIBLE_DEVICES, only
    those devices are leased. A process that leases no GPU sees none. Without an NVIDIA device, and in a child of a
    process that has leased on this machine, this does nothing.

    Args:
        gpus: how many.
        share: lease none; several jobs may use the same devices.
    Raises:
        D2OError: if the machine has fewer than `gpus`.
    """
    if _asked() is not None:
        return
    os.environ[_ASKED] = f"{gpus}@{socket.gethostname()}"
    usable = visible()
    if not usable or (share and gpus):
        return
    if gpus > len(usable):
        raise D2OError(
            f"devices: the job asks for {gpus} GPUs, and there are {len(usable)}; lower compute.gpus or train.ranks"
        )
    if gpus == 0:
        print(f"devices: compute.gpus is 0, so the {len(usable)} GPUs here are not used", file=sys.stderr, flush=True)
    waiting = False
    while len(taken := _take(usable, gpus)) < gpus:
        if not waiting:
            print(
                f"devices: waiting for {gpus} of {len(usable)} GPUs, which other jobs have leased "
                f"(compute.share_gpus: true would share them)",
                file=sys.stderr,
                flush=True,
            )
        waiting = True
        time.sleep(_PATIENCE)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def visible() -> list[str]:
    """The NVIDIA devices that this process may use: those of CUDA_VISIBLE_DEVICES, or all of the machine."""
    assigned = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _present() if assigned is None else [device for device in assigned.split(",") if device]


def device() -> str:
    """The device on which models run in this process: `cuda` if torch sees a GPU, else `cpu`.

    Raises:
        D2OError: if torch sees fewer GPUs than the job asked for. On a CPU the job would run for days.
    """
    import torch

    asked, seen = _asked() or 0, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < asked:
        wanted, supported = torch.version.cuda, _cuda_of_driver()
        if not seen and wanted and supported and _version(wanted) > _version(supported):
            way_out = (
                f"it is built for CUDA {wanted}, and the driver has {supported} (nvidia-smi): install a newer driver"
            )
        else:
            way_out = "look at nvidia-smi, install with `make env LOCK=gpu`"
        raise D2OError(
            f"devices: the job asks for {asked} GPUs, and torch {torch.__version__} sees {seen}; {way_out}, "
            f"or set compute.gpus: 0"
        )
    return "cuda" if seen else "cpu"


def _cuda_of_driver() -> str | None:
    """The newest CUDA version that this machine's driver supports, by nvidia-smi; None where it gives none."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        output = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout
    except subprocess.TimeoutExpired:
        return None
    version = re.search(r"CUDA (?:UMD )?Version *: *(\d+\.\d+)", output)
    return version[1] if version else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _asked() -> int | None:
    """How many GPUs this process, or an ancestor of it on this machine, asked for; None if neither has asked."""
    gpus, _, host = os.environ.get(_ASKED, "").partition("@")
    return int(gpus) if host == socket.gethostname() else None


def _present(folder: Path = Path("/dev")) -> list[str]:
    """The numbers of the NVIDIA devices of this machine or container, as CUDA counts them: from 0."""
    nodes = [path for path in folder.iterdir() if re.fullmatch(r"nvidia\d+", path.name)]
    return [str(number) for number in range(len(nodes))]


def _take(devices: list[str], wanted: int) -> list[str]:
    """Lock `wanted` of the devices and return them. If fewer are free, lock none and return an empty list."""
    taken: dict[str, int] = {}
    for device in devices:
        if len(taken) < wanted:
            lock = os.open(_lock(device), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
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
        os.set_inheritable(lock, True)  # the lock stays when this process becomes torchrun (exec)
    return list(taken)


def _lock(device: str) -> Path:
    """The lock file of a device. Its name holds the Slurm job, because each job may count its devices from 0."""
    folder = Path(tempfile.gettempdir()) / f"d2o-gpus-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        raise D2OError(f"devices: {folder}: made by somebody else; remove it, or set TMPDIR to a folder of your own")
    folder.chmod(0o700)  # another umask, or somebody's mistake, may have opened it to all
    place = "-".join(filter(None, (socket.gethostname(), os.environ.get("SLURM_JOB_ID"))))
    return folder / f"{place}-{device}.lock"
