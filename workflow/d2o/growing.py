"""Files of ours that grow: opened without following a link."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

from d2o.errors import D2OError


def appended(path: Path) -> IO:
    """A file, open for reading and appending.

    Raises:
        D2OError: where it is a link: in results of somebody else it might lead to any file of this user.
    """
    try:
        return open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise D2OError(f"{path}: a link, where a file of our own should be; delete it") from None
