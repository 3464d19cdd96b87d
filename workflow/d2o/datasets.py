"""Stage `datasets`: read preference rows of any source and format into one table, without holding them in memory.

A source is a local file or a split of a Hub data set; it yields one row at a time. Each format has one small function
that turns a row into a record. Rows that cannot be read are listed in a file beside the table.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from d2o import identities, records, schemas
from d2o.errors import D2OError
from d2o.settings import Reading

# Bytes of a line: a small packed file may unpack to one that no memory holds.
_LONGEST = 64 << 20
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".json.gz", ".json.xz", ".parquet")


class BadRow(ValueError):
    """A row that does not follow its format. The message says why and does not quote the row."""


def read(reading: Reading, output: Path) -> None:
    """Read preference rows into a `schemas.ROWS` table.

    `<output>.rejected.jsonl` lists each row that cannot be read: file (or Hub split), row and reason. `row` counts
    from 1; in JSON lines it is the number of the line. If too many rows cannot be read, only this list is written.
    If `reading.test` is empty, every row gets the split `train`, and the stage `negatives` holds out a share.

    Raises:
        D2OError: if a file cannot be read or more than `reading.max_bad_share` of the rows cannot; the message names
            the file and, if known, the row or byte.
    """
    sources = [] if reading.hub else [*reading.train, *reading.test]
    inputs = [file for source in sources for file in files(source)]
    rejected = output.with_name(f"{output.name}.rejected.jsonl")
    counts, first = Counter(train=0, test=0, rejected=0), ""
    with records.artifact(output, reading, inputs) as draft:
        with (
            records.artifact(rejected, reading) as leavings,
            leavings.path.open("w", encoding="utf-8") as bad,
            records.TableWriter(draft.path, schemas.ROWS) as table,
        ):
            for split, source, number, row in _rows(reading):
                try:
                    record = _record(reading.format, row)
                except BadRow as error:
                    first = first or f"{source}: row {number}: {error}"
                    counts["rejected"] += 1
                    line = {"file": source, "row": number, "reason": str(error)}
                    bad.write(json.dumps(line, ensure_ascii=False) + "\n")
                else:
                    table.add({"row": table.count, "split": split, **record})
                    counts[split] += 1
            leavings.facts["rows"] = counts["rejected"]
        total = counts.total()
        if counts["rejected"] > reading.max_bad_share * total or not table.count:
            raise D2OError(
                f"{first}; {counts['rejected']} of {total} rows cannot be read as {reading.format} "
                f"(all listed in {rejected}): mend them, or raise max_bad_share ({reading.max_bad_share:g})"
            )
        draft.facts |= {"rows": table.count, "counts": dict(counts)}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"rows: {summary}", file=sys.stderr)


# From a row to a record --------------------------------------------------------------------------


def _record(format: str, row: Any) -> dict[str, Any]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"{_kind(row)}, not an object")
    record = _FORMATS[format][0](row)
    return {"prompt_id": identities.prompt_id(record["messages"]), **record}


def pku_saferlhf(row: dict[str, Any]) -> dict[str, Any]:
    """A row of PKU-SafeRLHF. The current release has harm categories and severities, which the beta does not have."""
    return {
        "messages": [{"role": "user", "content": _text(row, "prompt")}],
        "responses": [
            {
                "text": _text(row, f"response_{i}"),
                "unsafe": _unsafe(row, f"is_response_{i}_safe"),
                "categories": _categories(row, f"response_{i}_harm_category"),
                "severity": _severity(row, f"response_{i}_severity_level"),
            }
            for i in (0, 1)
        ],
        "better": _choice(row, "better_response_id"),
        "safer": _choice(row, "safer_response_id"),
    }


def hh_rlhf(row: dict[str, Any]) -> dict[str, Any]:
    """A row of HH-RLHF: two dialogues that differ in the last turn of the assistant. `chosen` is the better one."""
    chosen, rejected = _dialogue(row, "chosen"), _dialogue(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the prompts of `chosen` and `rejected` differ")
    return {
        "messages": chosen[:-1],
        "responses": [{"text": end["content"], "unsafe": None} for end in (chosen[-1], rejected[-1])],
        "better": 0,
        "safer": None,
    }


def negatives(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a rejected answer and no other: {prompt, response} or {messages, response}."""
    if (row.get("prompt") is None) == (row.get("messages") is None):
        raise BadRow("give one of `prompt` and `messages`")
    if row.get("prompt") is None:
        messages = _messages(row["messages"])
    else:
        messages = [{"role": "user", "content": _text(row, "prompt")}]
    return {
        "messages": messages,
        "responses": [{"text": _text(row, "response"), "unsafe": True}],
        "better": None,
        "safer": None,
    }


_PKU_KEYS = (
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "better_response_id",
    "safer_response_id",
)
_PKU_LABELS = (
    "response_0_harm_category",
    "response_1_harm_category",
    "response_0_severity_level",
    "response_1_severity_level",
)
# Per format: its reader, the keys that a row needs (a tuple: one of them), the keys that are read if present.
_FORMATS = {
    "pku-saferlhf-beta": (pku_saferlhf, _PKU_KEYS, _PKU_LABELS),
    "pku-saferlhf": (pku_saferlhf, _PKU_KEYS, _PKU_LABELS),
    "hh-rlhf": (hh_rlhf, ("chosen", "rejected"), ()),
    "negatives": (negatives, (("prompt", "messages"), "response"), ()),
}


def _value(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise BadRow(f"no `{key}`")
    return row[key]


def _text(row: dict[str, Any], key: str) -> str:
    text = _value(row, key)
    if not isinstance(text, str):
        raise BadRow(f"`{key}` is {_kind(text)}, not a text")
    if not text.strip():
        raise BadRow(f"`{key}` is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise BadRow(f"`{key}` holds half a character (a lone surrogate)") from None
    return text


def _unsafe(row: dict[str, Any], key: str) -> bool | None:
    safe = _value(row, key)
    if safe is not None and not isinstance(safe, bool):
        raise BadRow(f"`{key}` is {_kind(safe)}, not true, false or null")
    return None if safe is None else not safe


def _categories(row: dict[str, Any], key: str) -> list[str] | None:
    """The names whose value is true, from {name: true or false}."""
    flags = row.get(key)
    if flags is None:
        return None
    if not isinstance(flags, dict) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise BadRow(f"`{key}` is not an object of true and false")
    if any(re.search("[\ud800-\udfff]", name) for name in flags):
        raise BadRow(f"`{key}` is an object with a name that is half a character (a lone surrogate)")
    return [name for name, flag in flags.items() if flag]


def _severity(row: dict[str, Any], key: str) -> int | None:
    level = row.get(key)
    if level is not None and (isinstance(level, bool) or level not in (0, 1, 2, 3)):
        raise BadRow(f"`{key}` is neither 0, 1, 2, 3 nor null")
    return None if level is None else int(level)


def _choice(row: dict[str, Any], key: str) -> int | None:
    index = _value(row, key)
    # 1.0 is accepted: pandas turns integers beside a null into floats. True is not, though True == 1.
    if index is not None and (isinstance(index, bool) or index not in (0, 1)):
        raise BadRow(f"`{key}` is neither 0, 1 nor null")
    return None if index is None else int(index)


def _dialogue(row: dict[str, Any], key: str) -> list[dict[str, str]]:
    """The turns of a text "\\n\\nHuman: …\\n\\nAssistant: …", which must end with a turn of the assistant."""
    text = "\n\n" + _text(row, key).lstrip()
    head, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if head:
        raise BadRow(f"`{key}` does not begin with a Human turn")
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    turns = [{"role": role, "content": turn.strip()} for role, turn in zip(roles, parts[1::2], strict=True)]
    if roles[-1] != "assistant":
        raise BadRow(f"`{key}` does not end with an Assistant turn")
    if not turns[-1]["content"]:
        raise BadRow(f"the answer of `{key}` is empty")
    _check_turns(turns[:-1], key)
    return turns


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRow("`messages` is not a list of objects")
    messages = [{key: _text(message, key) for key in ("role", "content")} for message in value]
    _check_turns(messages[1:] if messages and messages[0]["role"] == "system" else messages, "messages")
    return messages


def _check_turns(turns: list[dict[str, str]], key: str) -> None:
    """Check that the turns of a prompt alternate, begin and end with the user's, and are not empty."""
    wanted = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [turn["role"] for turn in turns] != wanted:
        raise BadRow(f"the prompt in `{key}` does not alternate from a user turn to a user turn")
    if not all(turn["content"] for turn in turns):
        raise BadRow(f"`{key}` has an empty turn")


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


# From a source to rows ---------------------------------------------------------------------------


def _rows(reading: Reading) -> Iterator[tuple[str, str, int, Any]]:
    """Split, source, number and content of every row. The content of a line that is not JSON is a `BadRow`."""
    for split, sources in (("train", reading.train), ("test", reading.test)):
        parts = sources if reading.hub else [str(file) for source in sources for file in files(source)]
        for part in parts:
            if reading.hub:
                name, rows = f"{reading.hub}, split {part}", _hub_rows(reading, part)
            else:
                name, rows = part, _file_rows(Path(part), reading.format)
            number = 0
            for number, row in rows:
                yield split, name, number, row
            if not number:
                raise D2OError(f"{name}: there is no row in it; leave it out or fetch it again")


def _hub_rows(reading: Reading, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        stream = datasets.load_dataset(
            reading.hub, name=reading.name, revision=reading.revision, split=split, streaming=True
        )
        progress = tqdm(stream, desc=f"reading {reading.hub}, {split}", unit=" rows", mininterval=2)
        yield from enumerate(progress, 1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise D2OError(
            f"{reading.hub}, split {split}, revision {reading.revision}: {reason}; "
            f"check hub, name, revision and splits, and that the Hub can be reached"
        ) from None


def files(source: str) -> list[Path]:
    """The files of rows that a source is: one, or all of a folder, sorted by name.

    Raises:
        D2OError: where there is none.
    """
    path, known = Path(source), f"rows are read from {', '.join(_SUFFIXES)}"
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.name.lower().endswith(_SUFFIXES) and file.is_file())
        if not inside:
            raise D2OError(f"{path}: a folder without any file of rows; {known}")
        return inside
    if not path.name.lower().endswith(_SUFFIXES):
        raise D2OError(f"{path}: unknown suffix; {known}")
    if not path.is_file():
        raise D2OError(f"{path}: no such file; give a file or a folder of rows")
    return [path]


def _file_rows(path: Path, format: str) -> Iterator[tuple[int, Any]]:
    """The rows of a local file with their numbers, from 1.

    Raises:
        D2OError: if the rest of the file cannot be read: it is damaged, cut off or not UTF-8.
    """
    name, number = path.name.lower(), 0
    try:
        if name.endswith(".parquet"):
            rows = _parquet(path, format)
        elif ".jsonl" in Path(name).suffixes:
            rows = _lines(path)
        else:
            rows = _json(path)
        for number, row in rows:
            yield number, row
    except EOFError:
        reason = "the compressed data is cut off"
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, ijson.JSONError, OSError, pa.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0]
    else:
        return
    raise D2OError(f"{path}: after row {number}: {reason}; fetch or write the file again")


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _unpacked(path) as file:
        yield from _parsed_lines(path, file)


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a file that is a JSON array, or else its JSON lines."""
    with _unpacked(path) as file:
        start = file.tell()
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(start)
        if first == b"[":
            yield from enumerate(ijson.items(file, "item", use_float=True), 1)
        else:
            yield from _parsed_lines(path, file)


def _parsed_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    offset = file.tell()
    for number, line in enumerate(iter(partial(file.readline, _LONGEST + 1), b""), 1):
        if len(line) > _LONGEST:
            raise D2OError(f"{path}: row {number} is longer than {_LONGEST >> 20} MiB; is it one row a line?")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            where = f"row {number}, byte {offset + error.start}"
            raise D2OError(f"{path}: {where}: not UTF-8; convert the file to UTF-8") from None
        offset += len(line)
        if text.isspace():
            continue
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            yield number, BadRow(f"invalid JSON: {error}")


def _parquet(path: Path, format: str) -> Iterator[tuple[int, Any]]:
    # By default Arrow buffers the wanted columns of all row groups at once, which is nearly the whole file.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
        present = set(table.schema_arrow.names)
        wanted = [(key,) if isinstance(key, str) else key for key in _FORMATS[format][1]]
        missing = [" or ".join(keys) for keys in wanted if not present.intersection(keys)]
        if missing:
            raise D2OError(f"{path}: lacks the column {', '.join(missing)}, which {format} needs")
        columns = [key for keys in (*wanted, _FORMATS[format][2]) for key in keys if key in present]
        batches = table.iter_batches(batch_size=1024, columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(
            tqdm(rows, f"reading {path.name}", table.metadata.num_rows, unit=" rows", mininterval=2), 1
        )


class _CountedFile(io.FileIO):
    """A file that tells a progress bar how many of its bytes were read; of a packed file, the packed bytes."""

    def __init__(self, path: Path, bar: tqdm):
        super().__init__(path)
        self._bar = bar

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._bar.update(count)
        return count


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading: unpacked, and without its byte order mark if it has one."""
    unpack = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), lambda packed: packed)
    size = path.stat().st_size
    with (
        tqdm(desc=f"reading {path.name}", total=size, unit="B", unit_scale=True, mininterval=2) as bar,
        io.BufferedReader(_CountedFile(path, bar), 1 << 20) as packed,
        unpack(packed) as file,
    ):
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        yield file
