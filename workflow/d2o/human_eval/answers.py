"""The verdicts that come back from annotators: read as untrusted input, joined with the key, and their agreement."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2o import records, schemas, statistics, texts
from d2o.errors import D2OError
from d2o.human_eval.design import KEYS
from d2o.settings import HumanVerdicts

COLUMNS = ["version", "annotator", "item", "question", "verdict"]
# The columns that identify a pair of answers, which several annotators may see.
_PAIR = ("dataset", "model", "method", "seed", "prompt_id")
_AS_GIVEN = "put in the file as the page gave it"
# Maximum size of a file in bytes: a row has about sixty.
_LONGEST = 10_000_000

# A question to an annotator: the annotator's number, the item, and the name of the question.
Asked = tuple[int, int, str]


def read(stage: HumanVerdicts, key: Path, folder: Path, output: Path) -> None:
    """Read the files that came back and write a table of `schemas.HUMAN_VERDICTS`, of the annotators who count.

    A page may be exported before it is finished: the answers so far count. An annotator whose share of right answers
    to attention checks is below `passed` is left out. The manifest states for each annotator how many questions were
    answered and how many checks were passed, and the agreement on each question.

    Args:
        key: table of `schemas.HUMAN_KEY`.
        folder: its CSV files are read; it need not exist.
    Raises:
        D2OError: where the folder contains anything but CSV files, hidden files aside; naming file and line, where a
            row cannot come from the pages, or occurs twice.
    """
    items = {(row["annotator"], row["item"]): row for row in records.read_table(key, schemas.HUMAN_KEY)}
    files = sorted(folder.glob("[!.]*"))
    given = gathered(files, items)
    annotators = [_annotator(stage, number, items, given) for number in sorted({number for number, _ in items})]
    kept = {entry["annotator"] for entry in annotators if entry["kept"]}
    rows = [
        {name: row[name] for name in (*_PAIR, "annotator", "order")}
        | {"question": question, "verdict": verdict(pressed, row["order"])}
        for (annotator, item, question), pressed in sorted(given.items())
        for row in [items[annotator, item]]
        if annotator in kept and not row["check"]
    ]
    with records.artifact(output, stage, [key, *files]) as draft:
        draft.facts["annotators"] = annotators
        draft.facts["agreement"] = {question: _agreement(rows, question) for question in schemas.HUMAN_QUESTIONS}
        draft.facts["rows"] = records.write_table(draft.path, schemas.HUMAN_VERDICTS, rows)


def gathered(files: Sequence[Path], items: Mapping[tuple[int, int], Mapping[str, Any]]) -> dict[Asked, str]:
    """The key that was pressed for each answered question; errors as `read`."""
    versions = {row["version"] for row in items.values()}
    given: dict[Asked, str] = {}
    places: dict[Asked, str] = {}
    for file in files:
        for line, row in _rows(file):
            place = f"{texts.visible(str(file))}:{line}"
            if row["version"] not in versions:
                raise D2OError(
                    f"{place}: of another page ({_short(row['version'])}, here {', '.join(versions)}): of another "
                    f"experiment, or from before the pages were made again; take the file out of the folder"
                )
            who, item = _number(row["annotator"]), _number(row["item"])
            if (who, item) not in items or row["question"] not in schemas.HUMAN_QUESTIONS:
                raise D2OError(
                    f"{place}: annotator {_short(row['annotator'])} has no item {_short(row['item'])} with the "
                    f"question {_short(row['question'])}; {_AS_GIVEN}"
                )
            if row["verdict"] not in [*KEYS]:
                raise D2OError(f"{place}: the verdict is {_short(row['verdict'])}, not 1, 2 or 0")
            asked = (who, item, row["question"])
            if asked in places:
                raise D2OError(
                    f"{place}: annotator {who}, item {item}, {row['question']} stands a second time, after "
                    f"{places[asked]}; keep one file of each annotator, the last"
                )
            places[asked], given[asked] = place, row["verdict"]
    return given


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a file with their line numbers, empty rows left out."""
    name = texts.visible(str(file))
    if file.suffix.lower() != ".csv" or not file.is_file():
        raise D2OError(f"{name}: not a CSV file; put those that came back straight into the folder, and nothing else")
    if file.stat().st_size > _LONGEST:
        raise D2OError(f"{name}: larger than {_LONGEST // 1_000_000} MB; is it the right file?")
    try:
        # Spreadsheets put a byte order mark in front.
        lines = csv.reader(file.read_text("utf-8-sig").splitlines(), strict=True)
        for number, cells in enumerate(lines):
            if number == 0 and cells != COLUMNS:
                raise D2OError(f"{name}:1: its columns are not {','.join(COLUMNS)}; {_AS_GIVEN}")
            if number and cells:
                if len(cells) != len(COLUMNS):
                    raise D2OError(f"{name}:{lines.line_num}: {len(cells)} cells, not {len(COLUMNS)}")
                yield lines.line_num, dict(zip(COLUMNS, cells, strict=True))
    except UnicodeDecodeError:
        raise D2OError(f"{name}: not UTF-8; {_AS_GIVEN}") from None
    except csv.Error as error:
        raise D2OError(f"{name}:{lines.line_num}: no CSV ({error}); {_AS_GIVEN}") from None


def _number(cell: str) -> int:
    """The number in a cell; −1, which no annotator or item has, where the cell is no number."""
    return int(cell) if cell.isascii() and cell.isdigit() and len(cell) < 10 else -1


def _short(cell: str) -> str:
    """A cell of a file, shortened and quoted for a message."""
    return repr(texts.visible(cell if len(cell) <= 40 else cell[:40] + "…"))


def _annotator(
    stage: HumanVerdicts, number: int, items: Mapping[tuple[int, int], Mapping[str, Any]], given: Mapping[Asked, str]
) -> dict[str, Any]:
    """How much of a page was answered, how many answers to checks were right, and whether its verdicts count."""
    own = {(item, question): pressed for (who, item, question), pressed in given.items() if who == number}
    checks = [pressed == check for (item, _), pressed in own.items() if (check := items[number, item]["check"])]
    return {
        "annotator": number,
        "questions": sum(who == number for who, _ in items) * len(schemas.HUMAN_QUESTIONS),
        "answered": len(own),
        "checks": len(checks),
        "passed": sum(checks),
        "kept": not checks or sum(checks) / len(checks) >= stage.passed,
    }


def verdict(pressed: str, order: str) -> str:
    """The verdict of a key that was pressed for a pair in an order: `initial`, `method` or `tie`."""
    return {"1": schemas.ORDERS[order][0], "2": schemas.ORDERS[order][1], "0": "tie"}[pressed]


def _agreement(rows: Sequence[Mapping[str, Any]], question: str) -> dict[str, Any]:
    """Krippendorff's α over the pairs that several annotators judged, with its interval; None where undefined."""
    pairs: dict[tuple, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["question"] == question:
            pairs[tuple(row[name] for name in _PAIR)][row["verdict"]] += 1
    outcomes = ("method", "tie", "initial")
    counts = [[votes[outcome] for outcome in outcomes] for votes in pairs.values() if votes.total() > 1]
    alpha = statistics.alpha(np.array(counts, int).reshape(-1, len(outcomes)))
    ends = {"alpha": alpha.mean, "low": alpha.low, "high": alpha.high}
    return {name: None if np.isnan(value) else value for name, value in ends.items()} | {"pairs": alpha.n}
