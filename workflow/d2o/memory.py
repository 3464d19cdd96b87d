"""How much memory reading may take: a small file may unpack to any size."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bounded(memory_gb: float) -> Iterator[None]:
    """Inside, this process takes about so many GB more memory at most; then Python and Arrow raise a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    match = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    # What is mapped counts, used or not: Arrow's allocator maps about 1 GB at once.
    limit = int(match[1]) * 1024 + int((memory_gb + 1) * 1e9)
    known = [one for one in (limit, soft, hard) if one != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
