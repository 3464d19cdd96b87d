"""The prompts from files that are evaluated besides the test prompts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2o import identities, memory, records, refusals, texts
from d2o.errors import D2OError

# GB that the prompts of all files may take: enough for millions.
_MEMORY = 4.0
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")


def prompts(files: list[str]) -> list[dict[str, Any]]:
    """The `prompt` fields of the files, as rows of `schemas.PROMPTS`; `origin` is a file's name.

    A row whose `label` is `safe` or `unsafe`, as in XSTest, has the origin `<file>, safe` or `<file>, unsafe`.

    Raises:
        D2OError: where a file or a row cannot be read, two files have one name, or all take more than `_MEMORY`.
    """
    try:
        with memory.bounded(_MEMORY):
            return _prompts(files)
    except (MemoryError, SystemError):  # as in `questions.fetch`
        raise D2OError(
            f"{', '.join(files)}: reading this takes more than about {_MEMORY:g} GB; keep fewer prompts"
        ) from None


def _prompts(files: list[str]) -> list[dict[str, Any]]:
    rows = []
    origins = {"test": "the test split", "validation": "the validation split"}
    for path in map(Path, files):
        suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix is None:
            raise D2OError(f"{path}: unknown suffix; prompts are read from {', '.join(SUFFIXES)}")
        origin = path.name[: -len(suffix)]
        if origin in origins:
            raise D2OError(f"{path}: {origins[origin]} is called {origin!r} as well; rename the file")
        origins[origin] = str(path)
        number = 0
        for number, row in _evaluation_rows(path, suffix):
            text = row.get("prompt") if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise D2OError(f"{path}: row {number}: no text in `prompt`; mend the row or take it out")
            if not texts.is_unicode(text):
                raise D2OError(f"{path}: row {number}: half a character in `prompt`; mend the row")
            messages = [{"role": "user", "content": text}]
            label = f", {row['label']}" if row.get("label") in refusals.LABELS else ""
            rows.append({"prompt_id": identities.prompt_id(messages), "messages": messages, "origin": origin + label})
        if not number:
            raise D2OError(f"{path}: no prompt in it; leave the file out or fetch it again")
    return rows


def _evaluation_rows(path: Path, suffix: str) -> Iterator[tuple[int, Any]]:
    """The rows of a file, counted from 1; in JSON lines by the number of the line."""
    number = 0
    try:
        with gzip.open(path) if suffix.endswith(".gz") else path.open("rb") as file:
            text = records.read_packed(file, str(path)).decode("utf-8-sig")
        if suffix.startswith(".csv"):
            yield from enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1)
        elif text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
        else:
            # Not splitlines: a JSON text may hold other line separators, such as U+2028.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        where = f"row {number}: " if number else ""
        raise D2OError(f"{path}: {where}cannot be read ({error}); mend the file or fetch it again") from None
