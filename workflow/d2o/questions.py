"""Stage `questions`: a benchmark's multiple-choice questions, as local Parquet files.

One `<subject>-dev.parquet` (the few-shot examples) and one `<subject>-test.parquet` a subject, with the columns
and the order of `cais/mmlu`, so that no later stage needs a network.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from d2o import records
from d2o.errors import D2OError
from d2o.settings import QuestionSource

SPLITS = ("dev", "test")
# `answer` is the index of the right one of the four choices.
QUESTION = pa.schema([("question", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64())])

Questions = list[dict[str, Any]]
Readers = dict[str, dict[str, Callable[[], Questions]]]  # subject → split → what reads its questions

# Names of subjects become names of files, of tasks and a part of the prompt.
_SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_CSV = re.compile(r"(?:.*/)?(dev|test)/([^./][^/]*)_\1\.csv")


def fetch(source: QuestionSource, folder: Path) -> None:
    """Make the folder of questions; its manifest counts them per subject and split.

    Raises:
        D2OError: where the source is missing or holds no subject, a subject is unknown, oddly named or lacks a
            split, or a question does not have four choices and an answer among them.
    """
    origin = source.hub or source.path
    readers = _hub(source) if source.hub else _local(Path(source.path))
    counts: dict[str, dict[str, int]] = {}
    with records.artifact(folder, source) as draft:
        draft.path.mkdir()
        for subject in _select(readers, source.subjects, origin):
            counts[subject] = {}
            for split in SPLITS:
                found = readers[subject][split]() if split in readers[subject] else []
                if not found:
                    raise D2OError(f"{origin}: {subject} has no {split} questions; name the others in `subjects`")
                limit = source.limit if split == "test" else None
                path = draft.path / f"{subject}-{split}.parquet"
                counts[subject][split] = records.write_table(path, QUESTION, found[:limit])
        draft.facts["rows"] = sum(count["test"] for count in counts.values())
        draft.facts["subjects"] = counts


def _select(found: Iterable[str], wanted: list[str], origin: str) -> list[str]:
    """The wanted subjects, all where none is named."""
    found = sorted(found)
    if not found:
        raise D2OError(f"{origin}: no subjects; expected dev/<subject>_dev.csv and test/<subject>_test.csv in it")
    chosen = list(dict.fromkeys(wanted)) or found
    for subject in chosen:
        if subject not in found:
            close = difflib.get_close_matches(subject, found, n=3, cutoff=0.4)
            raise D2OError(f"{origin}: no subject {subject!r}; there are: {', '.join(close or found)}")
        if not _SUBJECT.fullmatch(subject):
            raise D2OError(
                f"{origin}: {subject!r} cannot name a subject: letters, digits, _ and - can; rename its files, "
                f"or name the others in `subjects`"
            )
    return chosen


# MMLU's CSV files ------------------------------------------------------------------------------------


def _local(source: Path) -> Readers:
    readers: Readers = {}
    for name, content in _files(source):
        split, subject = _CSV.fullmatch(name).groups()
        splits = readers.setdefault(subject, {})
        if split in splits:
            raise D2OError(f"{source}: two files {split}/{subject}_{split}.csv in different folders; keep one")
        splits[split] = partial(_parse, content, f"{source}/{name}")
    return readers


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the CSV files of questions anywhere in a folder or a .zip."""
    if source.is_dir():
        for path in sorted(source.rglob("*.csv")):
            if _CSV.fullmatch(name := path.relative_to(source).as_posix()):
                yield name, path.read_bytes()
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for name in filter(_CSV.fullmatch, archive.namelist()):
                yield name, archive.read(name)
    else:
        raise D2OError(f"{source}: {'neither a folder nor a .zip' if source.exists() else 'no such file'}")


def _parse(content: bytes, origin: str) -> Questions:
    """The questions of a CSV file without header: question, four choices, letter of the right one."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise D2OError(f"{origin}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    questions = []
    for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), start=1):
        if not row:
            continue  # a blank line
        if len(row) != 6:
            raise D2OError(f"{origin}: row {number}: {len(row)} columns; expected question, A, B, C, D, letter")
        question, *choices, letter = row
        if letter not in {"A", "B", "C", "D"}:
            raise D2OError(f"{origin}: row {number}: the answer is {letter!r}; expected A, B, C or D (no header)")
        questions.append({"question": question, "choices": choices, "answer": "ABCD".index(letter)})
    return questions


# The Hub ---------------------------------------------------------------------------------------------


def _hub(source: QuestionSource) -> Readers:
    import datasets

    def call(function: Callable, *args: str, **options: str):
        try:
            return function(source.hub, *args, revision=source.revision, **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise D2OError(
                f"{source.hub}@{source.revision}: not fetched ({reason}); check the id, the revision, the "
                "network and HF_TOKEN, or give a local `path`"
            ) from None

    def read(subject: str, split: str) -> Questions:
        rows = call(datasets.load_dataset, subject, split=split)
        return [_checked(row, f"{source.hub}: {subject}, {split}, row {n}") for n, row in enumerate(rows, 1)]

    # `all` holds the subjects once more, `auxiliary_train` none.
    subjects = set(call(datasets.get_dataset_config_names)) - {"all", "auxiliary_train"}
    return {subject: {split: partial(read, subject, split) for split in SPLITS} for subject in subjects}


def _checked(row: dict[str, Any], origin: str) -> dict[str, Any]:
    """A question of the Hub, without the columns that are not needed."""
    if not set(QUESTION.names) <= row.keys():
        raise D2OError(f"{origin}: columns {', '.join(row)}; expected {', '.join(QUESTION.names)}, as in cais/mmlu")
    if len(row["choices"]) != 4 or row["answer"] not in range(4):
        raise D2OError(f"{origin}: expected four choices and an answer from 0 to 3")
    return {name: row[name] for name in QUESTION.names}
