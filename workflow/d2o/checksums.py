"""JSON with a checksum as its last key: a changed digit is told, and not taken for another number."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any


def seal(row: Mapping[str, Any]) -> dict[str, Any]:
    """Data as JSON has them, with a checksum as the last key."""
    row = json.loads(json.dumps(row, default=str))
    return {**row, "crc": zlib.crc32(json.dumps(row).encode())}


def sealed(row: Mapping[str, Any]) -> str:
    """A line of a file that grows, with a checksum."""
    return json.dumps(seal(row)) + "\n"


def unsealed(text: str) -> dict[str, Any] | None:
    """The row of a line that is as `sealed` wrote it, or of a file with what `seal` gives; None of any other."""
    try:
        row = json.loads(text)
        crc = row.pop("crc")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None
    return row if text.endswith("\n") and crc == zlib.crc32(json.dumps(row).encode()) else None


def manifest(text: str) -> dict[str, Any] | None:
    """What a manifest says; None where it is damaged. Those of older versions have no checksum."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    return unsealed(text) if "crc" in content else content
