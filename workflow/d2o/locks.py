"""A file lock (flock), so that one process at a time works on a path; the end of the process frees it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from d2o import growing
from d2o.errors import D2OError


def hold(path: Path) -> IO | None:
    """Lock a file or folder for writing, by a file beside it. `release`, or the end of the process, frees it.

    Returns:
        The lock; None where the file system has no locks.
    Raises:
        D2OError: where another process holds the lock.
    """
    beside = _beside(path)
    beside.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = growing.appended(beside)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise D2OError(
                f"{path}: another process is at work here ({file.read().strip()}); wait for its end, or end it"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            release(file)
            return None
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # its holder has released and removed it since it was opened
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def held(path: Path) -> bool:
    """Whether a process of this machine holds the lock of a file or folder.

    This reads the kernel's list. Trying the lock would hold it for a moment, in which its owner might need it.
    """
    try:
        status = _beside(path).stat()
        locks = Path("/proc/locks").read_text()
    except FileNotFoundError:
        return False
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(f" {device} " in line and "FLOCK" in line for line in locks.splitlines())


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def release(lock: IO | None) -> None:
    """Release the lock that `hold` returned."""
    if lock is not None:
        Path(lock.name).unlink(missing_ok=True)
        lock.close()
