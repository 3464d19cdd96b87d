"""Stage `datasets`: read preference rows of any source and format into one table, without holding them in memory.

A source is a local file or a split of a Hub data set; it yields one row at a time; `formats` makes records of it.
Rows that cannot be read are listed in a file beside the table.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from d2o import formats, hub, layout, memory, records, schemas, texts
from d2o.errors import D2OError
from d2o.formats import BadRow, LeftOut
from d2o.settings import Reading

# Maximum bytes of a line: a small packed file may unpack to a line that does not fit in memory.
_LONGEST = 64 << 20
# Bytes in which a JSON array begins.
_BEGINNING = 1 << 16
_TEXTS = (".jsonl", ".json", ".csv", ".tsv")
_SUFFIXES = (*(kind + packed for kind in _TEXTS for packed in ("", ".gz", ".xz")), ".parquet")
# Maximum number of reasons that are counted separately: labels may be anything.
_REASONS = 50


def read(reading: Reading, output: Path) -> None:
    """Read preference rows into a `schemas.ROWS` table.

    `<output>.rejected.jsonl` lists each row that cannot be read: file (or Hub split), row and reason. `row` counts
    from 1; in JSON lines it is the number of the line. If too many rows cannot be read, only this list is written.
    Answers that are left out, because they have no label or one that does not decide, are counted by reason in the
    manifest. If `reading.test` is empty, every row gets the split `train`, and the stage `negatives` holds out a
    share.

    Raises:
        D2OError: if a file cannot be read, if it was made here and changed since, if one of `reading.columns` is in
            no row, if more than `reading.max_bad_share` of the rows cannot be read, or if no label decides; the
            message names the file and, if known, the row or byte.
    """
    sources = [] if reading.hub else [*reading.train, *reading.test]
    inputs = [file for source in sources for file in files(source)]
    for file in inputs:
        _check_digest(file)
    rejected = output.with_name(f"{output.name}.rejected.jsonl")
    counts, first, left_out = Counter(train=0, test=0, rejected=0, left_out=0), "", Counter[str]()
    with records.artifact(output, reading, inputs) as draft, memory.bounded(reading.memory_gb):
        with (
            records.artifact(rejected, reading) as leavings,
            leavings.path.open("w", encoding="utf-8") as bad,
            records.TableWriter(draft.path, schemas.ROWS) as table,
        ):
            for split, source, number, row in _with_columns(reading, rows(reading)):
                for outcome in formats.outcomes(row, reading):
                    if isinstance(outcome, BadRow):
                        first = first or f"{source}: row {number}: {outcome}"
                        counts["rejected"] += 1
                        line = {"file": source, "row": number, "reason": str(outcome)}
                        bad.write(json.dumps(line, ensure_ascii=False) + "\n")
                    elif isinstance(outcome, LeftOut):
                        counts["left_out"] += 1
                        left_out[reason_of(outcome, left_out)] += 1
                    else:
                        table.add({"row": table.count, "split": split, **outcome})
                        counts[split] += 1
            leavings.facts["rows"] = counts["rejected"]
        total = counts.total()
        if counts["rejected"] > reading.max_bad_share * total or counts["rejected"] == total:
            raise D2OError(
                f"{first}; {counts['rejected']} of {total} rows cannot be read as {reading.format} "
                f"(all listed in {rejected}): mend them, or raise max_bad_share ({reading.max_bad_share:g})"
            )
        if not table.count:
            raise D2OError(
                f"{', '.join(map(str, inputs)) or reading.hub}: no answer has a label that says anything: "
                f"{_counted(left_out)}; name its column in `columns`, or its values in `label`"
            )
        draft.facts |= {"rows": table.count, "counts": dict(counts), "left_out": dict(left_out)}
    summary = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    print(f"rows: {summary}" + f" ({_counted(left_out)})" * bool(left_out), file=sys.stderr)


def _check_digest(file: Path) -> None:
    """Check a file that was made here, such as the rows of an organism, against the manifest beside it.

    Raises:
        D2OError: if the file was changed or damaged since, or the manifest is damaged.
    """
    manifest = layout.manifest_path(file)
    if manifest == file or not manifest.is_file() or b'"artifact": ' not in manifest.read_bytes():
        return
    try:
        records.check_file(file)
    except D2OError as error:
        raise D2OError(f"{error}; if the change is yours, delete {manifest} alone") from None


def reason_of(outcome: LeftOut, known: Counter[str]) -> str:
    """The reason under which a left-out answer is counted: its own, or `other labels` once there are too many."""
    reason = str(outcome)
    return reason if reason in known or len(known) < _REASONS else "other labels"


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in left_out.most_common(5))


Rows = Iterator[tuple[str, str, int, Any]]


def _with_columns(reading: Reading, given: Rows) -> Rows:
    """Yield the same rows, and check that each of `reading.columns` occurs.

    Raises:
        D2OError: after the last row, if one of `reading.columns` was in no row.
    """
    absent, names = dict(reading.columns), []
    for split, source, number, row in given:
        if absent:
            try:
                flat = formats.flat(row, reading.format)
            except BadRow:
                flat = {}
            names = names or list(flat)
            absent = {key: name for key, name in absent.items() if not formats.has(flat, name)}
        yield split, source, number, row
    for key, name in absent.items():
        raise D2OError(f"columns.{key}: no row of {source} has {name!r}; the first has {listed(names)}")


def listed(names: Collection[str]) -> str:
    """Names of columns on one line, escaped and shortened."""
    shown = ", ".join(texts.visible(name)[:40] for name in islice(names, 30))
    return shown + ", …" * (len(names) > 30) or "none"


# From a source to rows ---------------------------------------------------------------------------


def rows(reading: Reading) -> Rows:
    """Split, source, number and content of every row. The content of a line that is not JSON is a `BadRow`."""
    for split, sources in (("train", reading.train), ("test", reading.test)):
        parts = sources if reading.hub else [str(file) for source in sources for file in files(source)]
        for part in parts:
            if reading.hub:
                name, given = f"{reading.hub}, split {part}", _hub_rows(reading, part)
            else:
                name, given = part, file_rows(Path(part), reading)
            number = 0
            for number, row in given:
                yield split, name, number, row
            if not number:
                raise D2OError(f"{name}: there is no row in it; leave it out or fetch it again")


def _hub_rows(reading: Reading, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    hub.bound_waiting()
    number = 0
    try:
        options = {"name": reading.name, "revision": reading.revision, "split": split, "streaming": True}
        stream = hub.patiently(reading.hub, partial(datasets.load_dataset, reading.hub, **options))
        stream = stream.decode(False)  # else images would be fetched from any address that a row contains
        progress = tqdm(stream, desc=f"reading {reading.hub}, {split}", unit=" rows", mininterval=2)
        for number, row in enumerate(progress, 1):
            yield number, row
    except (MemoryError, SystemError) as error:
        raise _too_large(f"{reading.hub}, split {split}", number) from error
    except Exception as error:  # any error that a repository's files cause (a script, odd YAML), or the network
        raise D2OError(
            f"{reading.hub}, split {split}, revision {reading.revision}: {hub.reason(error)}; "
            f"check hub, name, revision and splits, and that the Hub can be reached"
        ) from None


def files(source: str) -> list[Path]:
    """The files of rows of a source: the file itself, or all of a folder but manifests, sorted by name.

    Raises:
        D2OError: where there is none, or its suffix or name cannot be used.
    """
    path, known = Path(source), f"rows are read from {', '.join(_SUFFIXES)}"
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.name.lower().endswith(_SUFFIXES) and file.is_file())
        manifests = {file.with_name(f"{file.name}.manifest.json") for file in inside}
        inside = [file for file in inside if file not in manifests]
        if not inside:
            raise D2OError(f"{path}: a folder without any file of rows; {known}")
        for file in inside:
            _check_name(file)
        return inside
    if not path.name.lower().endswith(_SUFFIXES):
        raise D2OError(f"{path}: unknown suffix; {known}")
    if not path.is_file():
        raise D2OError(f"{path}: no such file; give a file or a folder of rows")
    _check_name(path)
    return [path]


def _check_name(file: Path) -> None:
    """Check that Snakemake can take a file: braces are its wildcards, and it writes names to the terminal.

    Raises:
        D2OError: where it cannot.
    """
    reason = ""
    if not texts.is_unicode(str(file)):
        reason = "its name is not UTF-8"
    elif texts.visible(file.name) != file.name:
        reason = "a name with characters that are not seen"
    elif {*"{}"} & {*file.name}:
        reason = "a name with braces"
    if reason:
        raise D2OError(f"{texts.visible(str(file))}: {reason}; give the file another one")


def file_rows(path: Path, reading: Reading | None = None) -> Iterator[tuple[int, Any]]:
    """The rows of a local file with their numbers, from 1. With `reading`, unneeded columns may be left out.

    Raises:
        D2OError: if the rest of the file cannot be read: it is damaged, cut off, not UTF-8, or too large to unpack.
    """
    name, number = path.name.lower(), 0
    kind = name.removesuffix(".gz").removesuffix(".xz").rpartition(".")[2]
    try:
        if kind == "parquet":
            given = _parquet(path, reading)
        elif kind in ("csv", "tsv"):
            given = _cells(path, reading, "\t" if kind == "tsv" else None)
        elif kind == "jsonl":
            given = _lines(path)
        else:
            given = _json(path)
        for number, row in given:
            yield number, row
    except (MemoryError, SystemError) as error:  # the latter from libraries that do not check allocations
        raise _too_large(str(path), number) from error
    except EOFError:
        reason = "the compressed data is cut off"
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except (
        gzip.BadGzipFile, zlib.error, lzma.LZMAError, ijson.JSONError, csv.Error, OSError, pa.ArrowException,
    ) as error:  # fmt: skip
        reason = str(error).strip().partition("\n")[0]
    else:
        return
    raise D2OError(f"{path}: after row {number}: {reason}; fetch or write the file again")


def _too_large(source: str, number: int) -> D2OError:
    return D2OError(
        f"{source}: after row {number}: it unpacks to more memory than `memory_gb` of its data set allows; raise "
        f"that if it is the right file"
    )


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _unpacked(path) as file:
        yield from _parsed_lines(path, file)


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a file that is a JSON array, or else its JSON lines."""
    with _unpacked(path) as file:
        start = file.tell()
        beginning = file.read(_BEGINNING).lstrip()
        file.seek(start)
        if beginning.startswith(b"["):
            yield from _items(path, file)
        else:
            yield from _parsed_lines(path, file)


def _items(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, of limited size each: without the limit, the parser crashes when memory runs out."""
    number = read = 0

    class Bounded:
        def read(self, size: int) -> bytes:
            nonlocal read
            read += size
            if read > _LONGEST:
                raise _too_long(path, number + 1)
            return file.read(size)

    for number, item in enumerate(ijson.items(Bounded(), "item", use_float=True), 1):
        read = 0
        yield number, item


def _too_long(path: Path, number: int) -> D2OError:
    return D2OError(f"{path}: row {number} is longer than {_LONGEST >> 20} MiB; is it one row a line, or an item?")


def _parsed_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    for number, text in enumerate(_decoded(path, file), 1):
        if text.isspace():
            continue
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            yield number, BadRow(f"invalid JSON: {error}")


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """The lines of a file as text, with their line ends."""
    offset = file.tell()
    for number, line in enumerate(iter(partial(file.readline, _LONGEST + 1), b""), 1):
        if len(line) > _LONGEST:
            raise _too_long(path, number)
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            where = f"row {number}, byte {offset + error.start}"
            raise D2OError(f"{path}: {where}: not UTF-8; convert the file to UTF-8") from None
        offset += len(line)


def _cells(path: Path, reading: Reading | None, separator: str | None) -> Iterator[tuple[int, Any]]:
    """The rows of a text table below its header. Without `separator`, it is the one that the header contains most:
    a comma, a semicolon or a tab."""
    with _unpacked(path) as file:
        lines = _decoded(path, file)
        header = next(lines, "")
        separator = separator or max(",;\t", key=header.count)
        csv.field_size_limit(_LONGEST)
        table = csv.reader(chain([header], lines), delimiter=separator, strict=True)
        names = next(table, [])
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise D2OError(f"{path}: several columns are called {twice[0]!r}; rename them")
        if names:
            _columns(path, reading, names)
        for number, cells in enumerate(table, 1):
            if len(cells) > len(names):
                yield number, BadRow(f"{len(cells)} cells, and the header has {len(names)}")
            elif cells:
                yield number, dict(zip(names, cells, strict=False))


def _columns(path: Path, reading: Reading | None, present: list[str]) -> list[str]:
    """The columns of a table that are read; all where the format is nested, or `reading` is None.

    Raises:
        D2OError: where the table lacks a column that the format needs.
    """
    if reading is None or (form := formats.FORMATS[reading.format]).flat:
        return present
    names = {key: reading.columns.get(key, key) for key in form.keys}
    read = {key: name if name in present else name.partition(".")[0] for key, name in names.items()}
    missing = [keys for keys in form.needed if not any(read[key] in present for key in keys)]
    if missing:
        wanted = ", ".join(" or ".join(names[key] for key in keys) for keys in missing)
        raise D2OError(
            f"{path}: lacks the column {wanted}, which {reading.format} needs, and has {listed(present)}; say in "
            f"`columns` what it is called"
        )
    return [name for name in dict.fromkeys(read.values()) if name in present]


def _parquet(path: Path, reading: Reading | None) -> Iterator[tuple[int, Any]]:
    # By default Arrow buffers the wanted columns of all row groups at once, which is nearly the whole file.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
        columns = _columns(path, reading, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=1024, columns=columns)
        given = (row for batch in batches for row in _as_python(batch))
        yield from enumerate(
            tqdm(given, f"reading {path.name}", table.metadata.num_rows, unit=" rows", mininterval=2), 1
        )


# Errors of a value that Arrow holds and Python cannot: a day after the year 9999, an unknown time zone, two fields of
# one name in an object.
_NO_VALUE = (OverflowError, ValueError, LookupError, NotImplementedError)


def _as_python(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch. A value that Python cannot hold is a `BadRow`: only a row whose format reads it is bad."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        raise
    except _NO_VALUE:
        columns = [[_value(cell) for cell in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        raise
    except _NO_VALUE as error:
        return BadRow(f"a value that cannot be read ({texts.line(error)})")


class _CountedFile(io.FileIO):
    """A file that reports to a progress bar how many of its bytes were read; of a packed file, the packed bytes."""

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
