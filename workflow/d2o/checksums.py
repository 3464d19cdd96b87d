"""JSON with a checksum as its last key: a changed digit is detected, and not read as another number."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any


def seal(row: Mapping[str, Any]) -> dict[str, Any]:
    """The data after a round trip through JSON, with a checksum as the last key."""
    row = json.loads(json.dumps(row, default=str))
    return {**row, "crc": zlib.crc32(json.dumps(row).encode())}


def sealed(row: Mapping[str, Any]) -> str:
    """A line with a checksum, for a file to which lines are appended."""
    return json.dumps(seal(row)) + "\n"


def unsealed(text: str) -> dict[str, Any] | None:
    """The row of an intact line of `sealed`, or of an intact file with the result of `seal`; None for other text."""
    try:
        row = json.loads(text)
        crc = row.pop("crc")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None
    return row if text.endswith("\n") and crc == zlib.crc32(json.dumps(row).encode()) else None


def manifest(text: str) -> dict[str, Any] | None:
    """The content of a manifest; None where it is damaged. Manifests of older versions have no checksum."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    return unsealed(text) if "crc" in content else content
