"""A limit on the memory that reading takes: a small file may unpack to any size."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bounded(memory_gb: float) -> Iterator[None]:
    """Limit the additional memory of this process to about `memory_gb` GB.

    Beyond the limit, Python and Arrow raise a MemoryError.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    match = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    # Mapped memory counts, used or not: Arrow's allocator maps about 1 GB at once.
    limit = int(match[1]) * 1024 + int((memory_gb + 1) * 1e9)
    known = [one for one in (limit, soft, hard) if one != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
