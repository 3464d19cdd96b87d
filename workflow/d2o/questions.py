"""Stage `questions`: a task's questions, as local Parquet files.

`data/` holds the files that lm-evaluation-harness reads, one per subject and split, so that no later stage needs a
network: in MMLU's form `dev` (the few-shot examples) and `test`, with the columns and the order of `cais/mmlu`, or
the splits of a task of the harness, which then counts as a subject. `questions.parquet` contains the questions, with
the numbers that the answers have.
"""

from __future__ import annotations

import csv
import difflib
import io
import lzma
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from d2o import harness, hub, memory, records, schemas
from d2o.errors import D2OError
from d2o.settings import Questions
from d2o.texts import line, visible

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

SPLITS = ("dev", "test")
# `answer` is the index of the right one of the four choices.
QUESTION = pa.schema([("question", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64())])

Multiple = list[dict[str, Any]]
Readers = dict[str, dict[str, Callable[[], Multiple]]]  # subject → split → a function that reads its questions

# Maximum characters of a cell.
_LONGEST = 1 << 17
# Maximum GB that reading the questions of a task may take. The largest tasks of the harness have some hundred MB.
_MEMORY = 4.0
# Names of subjects become names of files, of tasks and a part of the prompt.
_SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_CSV = re.compile(r"(?:.*/)?(dev|test)/([^./][^/]*)_\1\.csv")
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def fetch(source: Questions, folder: Path, metric: str | None = None) -> None:
    """Make the folder of questions; its manifest counts them per subject and split.

    Args:
        metric: the metric of a task of the harness; checked here, before any model is trained.
    Raises:
        D2OError: where the source is missing, holds no subject or takes more than `_MEMORY`, a subject is unknown,
            oddly named or lacks a split, a question does not have four choices and an answer among them, or as
            `harness.load` and `harness.choose_metric`.
    """
    if source.task or source.hub:  # before the limit: their imports take memory, too
        import datasets  # noqa: F401
        import lm_eval.tasks  # noqa: F401
    try:
        with records.artifact(folder, source) as draft, memory.bounded(_MEMORY):
            (draft.path / "data").mkdir(parents=True)
            if source.task:
                counts, asked = _write_task(source, metric, draft.path)
            else:
                counts, asked = _write_subjects(source, draft.path)
            draft.facts["rows"] = records.write_table(draft.path / "questions.parquet", schemas.QUESTIONS, asked)
            draft.facts["subjects"] = counts
    except (MemoryError, SystemError):  # the latter from libraries that do not check allocations
        origin = source.path or source.hub or ", ".join(dict.fromkeys(map(str, source.data.values()))) or source.task
        raise D2OError(f"{origin}: reading it takes more than about {_MEMORY:g} GB; is it the right one?") from None


def _pass_on_memory_error(error: Exception) -> None:
    """Raise the MemoryError that `datasets` wraps in an error of its own, if it is one."""
    if isinstance(error.__cause__, MemoryError):
        raise error.__cause__


def _asked(subject: str, number: int, text: str) -> dict[str, Any]:
    """A row of `schemas.QUESTIONS`."""
    return {"subject": subject, "question": number, "text": text}


# A task of the harness -------------------------------------------------------------------------------


def _write_task(source: Questions, metric: str | None, folder: Path) -> tuple[dict[str, dict[str, int]], Multiple]:
    counts: dict[str, dict[str, int]] = {}
    asked = []
    with tempfile.TemporaryDirectory() as cache:
        read = partial(_local_splits, source, cache) if source.data else partial(_hub_splits, source)
        tasks = harness.load([source.task], read, source.include)
        if source.data and len(tasks) > 1:
            raise D2OError(f"{source.task} is a group of {len(tasks)} tasks; `data` goes with one of them")
        harness.choose_metric(tasks, metric)
        for name, task in tasks.items():
            counts[name] = {}
            for split in dict.fromkeys(filter(None, (getattr(task.config, key) for key in harness.SPLITS))):
                task.dataset[split].to_parquet(harness.data_file(folder, name, split))
                counts[name][split] = len(task.dataset[split])
            asked += [_asked(name, *prompt) for prompt in harness.prompts(task, source.limit)]
    return counts, asked


def _local_splits(source: Questions, cache: str, task: ConfigurableTask, _: dict[str, Any]) -> Mapping[str, Dataset]:
    import datasets

    files = {split: Path(path) for split, path in source.data.items()}
    forms = {_FORMATS.get(path.suffix) for path in files.values()}
    if len(forms) > 1 or None in forms:
        raise D2OError(f"{', '.join(map(str, files.values()))}: expected files of one kind of {', '.join(_FORMATS)}")
    try:
        return harness.load_files(forms.pop(), files, cache)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        _pass_on_memory_error(error)
        reason = line(error.__cause__ or error)
        names = ", ".join(dict.fromkeys(map(str, files.values())))
        raise D2OError(f"{names}: cannot be read ({reason}); mend the file") from None


def _hub_splits(source: Questions, task: ConfigurableTask, options: dict[str, Any]) -> Mapping[str, Dataset]:
    import datasets

    if task.config.custom_dataset is not None:
        raise D2OError(f"{task.config.task}: its data are made by code of its own; name files of it in `data`")
    path, name = task.config.dataset_path, task.config.dataset_name
    hub.bound_waiting()
    try:
        options = {key: value for key, value in options.items() if key != "trust_remote_code"}  # code is never run
        load = partial(datasets.load_dataset, path, name, revision=source.revision, **options)
        return hub.patiently(path, load)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        _pass_on_memory_error(error)
        raise D2OError(
            f"{path} of {task.config.task}: not fetched ({hub.reason(error)}); check the revision, the network and "
            "HF_TOKEN, or name local files in `data`"
        ) from None


# Questions in MMLU's form ----------------------------------------------------------------------------


def _write_subjects(source: Questions, folder: Path) -> tuple[dict[str, dict[str, int]], Multiple]:
    origin = source.hub or source.path
    readers = _hub(source) if source.hub else local(Path(source.path))
    counts: dict[str, dict[str, int]] = {}
    asked = []
    for subject in _select(readers, source.subjects, origin):
        counts[subject] = {}
        for split in SPLITS:
            rows = readers[subject][split]() if split in readers[subject] else []
            if not rows:
                raise D2OError(f"{origin}: {subject} has no {split} questions; name the others in `subjects`")
            rows = rows[: source.limit if split == "test" else None]
            counts[subject][split] = records.write_table(harness.data_file(folder, subject, split), QUESTION, rows)
        asked += [_asked(subject, number, row["question"]) for number, row in enumerate(rows)]  # of the last split
    return counts, asked


def _select(subjects: Iterable[str], wanted: list[str], origin: str) -> list[str]:
    """The wanted subjects; all if none is named."""
    subjects = sorted(subjects)
    if not subjects:
        raise D2OError(f"{origin}: no subjects; expected dev/<subject>_dev.csv and test/<subject>_test.csv in it")
    chosen = list(dict.fromkeys(wanted)) or subjects
    for subject in chosen:
        if subject not in subjects:
            close = difflib.get_close_matches(subject, subjects, n=3, cutoff=0.4)
            raise D2OError(
                f"{origin}: no subject {subject!r}; there are: {', '.join(map(visible, close or subjects))}"
            )
        if not _SUBJECT.fullmatch(subject):
            raise D2OError(
                f"{origin}: '{visible(subject)[:120]}' cannot name a subject: up to 100 letters, digits, _ and - "
                f"can; rename its files, or name the others in `subjects`"
            )
    for first, second in pairwise(sorted(chosen, key=str.lower)):
        if first.lower() == second.lower():
            raise D2OError(
                f"{origin}: the subjects {first} and {second} are one name where a file system ignores case; rename "
                f"the files of one, or name one of them in `subjects`"
            )
    return chosen


# Their CSV files -------------------------------------------------------------------------------------


def local(source: Path) -> Readers:
    """Functions that read the questions of each subject of a folder or .zip in MMLU's form, by split.

    Raises:
        D2OError: where the source is neither; each function, where its file cannot be read.
    """
    readers: Readers = {}
    for name, content in _files(source):
        split, subject = _CSV.fullmatch(name).groups()
        splits = readers.setdefault(subject, {})
        if split in splits:
            raise D2OError(
                f"{source}: two files {split}/{visible(subject)}_{split}.csv in different folders; keep one"
            )
        splits[split] = partial(_parse, content, f"{source}/{visible(name)}")
    return readers


def _files(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name of each CSV file of questions anywhere in a folder or a .zip, and a function that reads it."""
    if source.is_dir():
        for path in sorted(source.rglob("*.csv")):
            if _CSV.fullmatch(name := path.relative_to(source).as_posix()):
                yield name, path.read_bytes
    elif zipfile.is_zipfile(source):
        try:
            with zipfile.ZipFile(source) as archive:
                members = [member for member in archive.infolist() if _CSV.fullmatch(member.filename)]
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise D2OError(f"{source}: {line(error)}; fetch or pack it again") from None
        if sum(member.file_size for member in members) > records.LARGEST:
            raise D2OError(f"{source}: unpacks to more than {records.LARGEST >> 20} MiB; is it the right file?")
        yield from ((member.filename, partial(_unpacked, source, member.filename)) for member in members)
    else:
        raise D2OError(f"{source}: {'neither a folder nor a .zip' if source.exists() else 'no such file'}")


def _unpacked(source: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(source) as archive, archive.open(name) as file:
            return records.read_packed(file, f"{source}: {visible(name)}")
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        # The last two: encrypted, or packed in a way that Python does not know.
        raise D2OError(
            f"{source}: {visible(name)} cannot be unpacked ({line(error)}); fetch or pack the file again"
        ) from None


def _parse(content: Callable[[], bytes], origin: str) -> Multiple:
    """The questions of a CSV file without header: question, four choices, letter of the right one."""
    try:
        text = content().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise D2OError(f"{origin}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    questions, number = [], 0
    csv.field_size_limit(_LONGEST)
    try:
        for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), start=1):
            if not row:
                continue  # a blank line
            if len(row) != 6:
                raise D2OError(f"{origin}: row {number}: {len(row)} columns; expected question, A, B, C, D, letter")
            question, *choices, letter = row
            if letter not in {"A", "B", "C", "D"}:
                raise D2OError(f"{origin}: row {number}: the answer is {letter!r}; expected A, B, C or D (no header)")
            questions.append({"question": question, "choices": choices, "answer": "ABCD".index(letter)})
    except csv.Error as error:
        raise D2OError(f"{origin}: row {number + 1}: {error}") from None
    return questions


# Their data set on the Hub ----------------------------------------------------------------------------


def _hub(source: Questions) -> Readers:
    import datasets

    hub.bound_waiting()

    def call(function: Callable, *args: str, **options: str):
        ask = partial(function, source.hub, *args, revision=source.revision, **options)
        try:
            return hub.patiently(source.hub, ask)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            _pass_on_memory_error(error)
            raise D2OError(
                f"{source.hub}@{source.revision}: not fetched ({hub.reason(error)}); check the id, the revision, the "
                "network and HF_TOKEN, or give a local `path`"
            ) from None

    def read(subject: str, split: str) -> Multiple:
        rows = harness.without_media(call(datasets.load_dataset, subject, split=split))
        return [_checked(row, f"{source.hub}: {subject}, {split}, row {n}") for n, row in enumerate(rows, 1)]

    # `all` repeats the subjects, `auxiliary_train` holds none.
    subjects = set(call(datasets.get_dataset_config_names)) - {"all", "auxiliary_train"}
    return {subject: {split: partial(read, subject, split) for split in SPLITS} for subject in subjects}


def _checked(row: dict[str, Any], origin: str) -> dict[str, Any]:
    """A question of the Hub, without the columns that are not needed."""
    if not set(QUESTION.names) <= row.keys():
        raise D2OError(
            f"{origin}: columns {', '.join(map(visible, row))}; expected {', '.join(QUESTION.names)}, as in cais/mmlu"
        )
    question, choices, answer = (row[name] for name in QUESTION.names)
    if not isinstance(question, str) or not isinstance(choices, list) or not isinstance(answer, int):
        raise D2OError(
            f"{origin}: expected a question that is a text, a list of choices and the number of the answer"
        )
    if len(choices) != 4 or not all(isinstance(choice, str) for choice in choices) or answer not in range(4):
        raise D2OError(f"{origin}: expected four choices that are texts, and an answer from 0 to 3")
    return {"question": question, "choices": choices, "answer": answer}
