"""Stage `negatives`: human negatives and human pairs out of preference rows, split by prompt.

The table of rows may be larger than memory. A first pass keeps digests, and the text of each distinct prompt, and
decides what stays: which prompts are train and test, and which of several equal comparisons is taken. A second pass
writes, a batch of columns at a time. Nothing depends on the order of the rows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from d2o import records
from d2o.errors import D2OError
from d2o.leaks import Leaks, find_leaks
from d2o.settings import Extraction

# Which answer of a row is the negative, and which is preferred to it, if any.
Comparison = tuple[int, int | None]

# The label that tells which answer each rule prefers, and the one that stands in for it in human pairs.
RULES = {
    "safer-unsafe": ("safer", "better"),
    "every-unsafe": ("safer", "better"),
    "less-helpful": ("better", "safer"),
}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")


def extract(extraction: Extraction, rows: Path, folder: Path, questions: list[Path]) -> None:
    """Write `pairs.parquet`, `prompts.parquet` and, last, `negatives.parquet` into `folder`.

    Args:
        extraction: the rule, the size of the splits, and files with further prompts to answer.
        rows: a `records.ROWS` table.
        folder: where the tables go.
        questions: folders of benchmark questions (Parquet with a column `question`) to keep out of training.
    Raises:
        D2OError: where an input cannot be read, the rule finds no negative, or none is left to train on.
    """
    rule = extraction.rule
    evaluation = _evaluation_prompts(extraction.evaluation_prompts)
    asked = {
        "evaluation": [prompt["messages"][0]["content"] for prompt in evaluation],
        "benchmark": [text for path in questions for text in _questions(path)],
    }

    survey = Survey()
    for number, row in enumerate(_read(rows, "surveying rows")):
        survey.add(number, row, rule)
    if not survey.negatives.seen:
        raise D2OError(f"{rows}: {_no_negative(rows, rule)}")
    split, leaks, capped = split_prompts(survey, extraction, asked)
    if split.kept["train"].isdisjoint(survey.with_negative["train"]):
        raise D2OError(
            f"{rows}: no negative is left to train on: {len(split.kept['test'])} prompts are test prompts, and "
            f"{len(leaks.prompts)} train prompts are evaluated as well; "
            f"change test_share, the test part, evaluation_prompts or near_duplicates"
        )
    taken = survey.negatives.taken()
    kept = _capped_negatives(taken, rows, split, extraction)

    files = [path for questions_of in questions for path in _parquet_files(questions_of)]
    inputs = [rows, *extraction.evaluation_prompts, *files]
    with (
        records.artifact(folder / "negatives.parquet", extraction, inputs) as negatives,
        records.artifact(folder / "prompts.parquet", extraction, inputs) as prompts,
        records.artifact(folder / "pairs.parquet", extraction, inputs) as pairs,
    ):
        counts = {"rows": survey.rows, "equal_answers": survey.equal_answers}
        counts |= _write_comparisons(rows, survey.rows, split, (negatives, kept), (pairs, survey.pairs.taken()))
        counts |= _write_prompts(prompts, negatives, evaluation)
        counts |= leaks.counts()
        counts["capped"] = capped | {"negatives": len(taken) - len(kept)}
        counts["duplicates"] = survey.negatives.duplicates()
        counts["pair_duplicates"] = survey.pairs.duplicates()
        negatives.facts |= {"counts": counts, "leaks": leaks.examples(survey.texts)}
    for group, count in counts.items():
        parts = count.items() if isinstance(count, dict) else [("in all", count)]
        shown = ", ".join(f"{n} {name}" for name, n in parts) or "none"
        print(f"{group.replace('_', ' ')}: {shown}", file=sys.stderr)


# From a row to comparisons -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """A preference row.

    Attributes:
        turns: role and content of each message of the prompt.
        texts: the answers.
        keys: digests of the answers, equal for texts that differ in case or white space only.
        unsafe, categories, severity: the answers' labels, as in `records.ROWS`.
        better, safer: indices of answers, or None.
    """

    prompt_id: str
    split: str
    turns: list[tuple[str, str]]
    texts: list[str]
    keys: list[bytes]
    unsafe: list[bool | None]
    categories: list[list[str] | None]
    severity: list[int | None]
    better: int | None
    safer: int | None

    @property
    def equal_answers(self) -> bool:
        """Whether two answers are the same but for case and white space: they make no comparison."""
        return len(set(self.keys)) < len(self.keys)

    def preferred(self, label: str) -> int | None:
        """The answer that the label `better` or `safer` prefers, if any."""
        return None if self.equal_answers else getattr(self, label)


def rows_of(batch: pa.RecordBatch) -> Iterator[Row]:
    """The rows of a batch of `records.ROWS`. Column by column: five times as fast as dictionaries."""
    messages, responses = batch["messages"], batch["responses"]
    texts = list(_lists(responses, "text"))
    yield from map(
        Row,
        batch["prompt_id"].to_pylist(),
        batch["split"].to_pylist(),
        map(list, map(zip, _lists(messages, "role"), _lists(messages, "content"))),
        texts,
        ([_question(text) for text in answers] for answers in texts),
        *(_lists(responses, label) for label in ("unsafe", "categories", "severity")),
        batch["better"].to_pylist(),
        batch["safer"].to_pylist(),
    )


def _lists(column: pa.ListArray, field: str) -> Iterator[list[Any]]:
    """Per row, one field of the structs in its list."""
    values = iter(column.flatten().field(field).to_pylist())
    return (list(islice(values, length)) for length in column.value_lengths().to_pylist())


def negatives_of(row: Row, rule: str) -> list[Comparison]:
    """The negatives of a row, each with the answer preferred to it, if there is one."""
    preferred = row.preferred(RULES[rule][0])
    unsafe = [label is True for label in row.unsafe]
    match rule:
        case "safer-unsafe":
            # Without a comparison, only a lone answer is known not to be the safer one.
            known = preferred is not None or len(unsafe) == 1
            found = [i for i, bad in enumerate(unsafe) if bad and known and i != preferred]
        case "every-unsafe":
            found = [i for i, bad in enumerate(unsafe) if bad]
        case "less-helpful":
            found = [] if preferred is None else [i for i in range(len(unsafe)) if i != preferred]
    return [(i, None if i == preferred else preferred) for i in found]


def pairs_of(row: Row, rule: str) -> list[Comparison]:
    """The preferred answer of a row and the other one; nothing where no label prefers one."""
    for label in RULES[rule]:
        preferred = row.preferred(label)
        if preferred is not None:
            return [(1 - preferred, preferred)]
    return []


# The first pass ----------------------------------------------------------------------------------


# What is kept of a comparison, as bytes that sort: what ranks it, a digest of all that is written of it, and its
# place: the number of its row times 2¹⁶, its negative times 2⁸, and its positive counted from 1 (0: none).
_CLAIM = np.dtype([("not_safe", "u1"), ("no_positive", "u1"), ("digest", ">u8"), ("place", ">u8")])


class Distinct:
    """Which of several equal comparisons is taken.

    Two are equal when their prompts and texts are, but for case and white space. One with a positive labelled
    safe comes first, then one with any positive; a digest settles the rest, so that order does not matter.
    """

    def __init__(self, *, by_positive: bool):
        """
        Args:
            by_positive: whether comparisons of one negative with two positives differ.
        """
        self._by_positive = by_positive
        self._best: dict[bytes, bytes] = {}
        self._exact: set[bytes] = set()
        self.seen = 0

    def add(self, number: int, row: Row, exact: list[bytes], comparison: Comparison) -> None:
        """Count a comparison of the row of this number in the table; `exact` are digests of its answers."""
        negative, positive = comparison
        asked = row.split.encode(), row.prompt_id.encode()
        sides = [negative, positive] if self._by_positive else [negative]
        identity = _digest(*asked, *(row.keys[side] for side in sides))
        self._exact.add(_digest(*asked, *(exact[side] for side in sides)))

        safe, none = positive is not None and row.unsafe[positive] is False, positive is None
        labels = row.turns, row.categories[negative], row.severity[negative], none or row.unsafe[positive]
        content = _digest(exact[negative], b"" if none else exact[positive], repr(labels).encode())
        place = (number << 16) + (negative << 8) + (0 if none else positive + 1)
        claim = bytes([not safe, none]) + content + place.to_bytes(8)
        self._best[identity] = min(claim, self._best.get(identity, claim))
        self.seen += 1

    def taken(self) -> np.ndarray:
        """[N] of `_CLAIM`: the comparisons taken, in the order of their places."""
        claims = np.frombuffer(b"".join(self._best.values()), _CLAIM)
        return claims[np.argsort(claims["place"])]

    def duplicates(self) -> dict[str, int]:
        """How many were equal to another letter for letter, and how many but for case and white space."""
        exact = self.seen - len(self._exact)
        return {"exact": exact, "normalised": self.seen - len(self._best) - exact}


@dataclass
class Survey:
    """What the first pass keeps of the rows; splits are those that the rows came with."""

    rows: int = 0
    equal_answers: int = 0
    prompts: dict[str, set[str]] = field(default_factory=lambda: {"train": set(), "test": set()})
    texts: dict[str, str] = field(default_factory=dict)  # what the user says in all turns
    user_turns: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    with_negative: dict[str, set[str]] = field(default_factory=lambda: {"train": set(), "test": set()})
    negatives: Distinct = field(default_factory=lambda: Distinct(by_positive=False))
    pairs: Distinct = field(default_factory=lambda: Distinct(by_positive=True))

    def add(self, number: int, row: Row, rule: str) -> None:
        prompt = row.prompt_id
        self.rows += 1
        self.equal_answers += row.equal_answers
        self.prompts[row.split].add(prompt)
        if prompt not in self.texts:
            turns = [text for role, text in row.turns if role == "user"]
            # Of prompts that differ in case or white space only, the order of the rows must not pick one.
            self.texts[prompt] = records.normalised("\n".join(turns))
            self.user_turns[prompt] = tuple(_question(text) for text in turns)
        exact = [_digest(text.encode()) for text in row.texts]
        for comparison in negatives_of(row, rule):
            self.negatives.add(number, row, exact, comparison)
            self.with_negative[row.split].add(prompt)
        for comparison in pairs_of(row, rule):
            self.pairs.add(number, row, exact, comparison)


def _no_negative(rows: Path, rule: str) -> str:
    """Why a rule finds no negative, and which rules would find some."""
    labels: Counter[str] = Counter()
    negatives: Counter[str] = Counter()
    for row in _read(rows, "counting labels"):
        labels["unsafe"] += any(label is not None for label in row.unsafe)
        labels.update(label for label in ("safer", "better") if getattr(row, label) is not None)
        negatives.update({other: len(negatives_of(row, other)) for other in RULES})
    there = [f"`{label}` in {n} rows" for label, n in labels.items() if n]
    others = [f"{other} ({n} negatives)" for other, n in negatives.items() if n]
    return (
        f"the rule {rule} finds no negative; labels: {', '.join(there) or 'none'}; "
        f"rules that find some: {', '.join(others) or 'none'}"
    )


# The split ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The prompts `kept` in train and test. `given` tells whether the rows came with a test part."""

    kept: dict[str, set[str]]
    given: bool

    def of(self, prompt: str, split: str) -> str | None:
        """The split that a prompt of a row's `split` goes to; None where it is dropped."""
        splits = [split] if self.given else ["train", "test"]
        return next((split for split in splits if prompt in self.kept[split]), None)


def split_prompts(
    survey: Survey, extraction: Extraction, asked: Mapping[str, list[str]]
) -> tuple[Split, Leaks, dict[str, int]]:
    """Train and test prompts, disjoint, none of train equal or near to anything that is evaluated.

    A prompt id is a digest, so its order is a fixed shuffle of the prompts: the share that is held out and
    the prompts that a cap keeps come first in it. A train prompt leaks when it is a test prompt, or when one
    of its user turns is all that a test prompt, an evaluation prompt or a benchmark question says. It leaks nearly
    when all that its user says is a near-duplicate of one of these.

    Args:
        survey: what the first pass kept.
        extraction: `test_share`, `near_duplicates` and the caps. With a cap, only prompts with negatives stay.
        asked: by origin, what is evaluated besides test prompts.
    Returns:
        the split, the leaks, and how many prompts of each split exceed a cap.
    """
    train, test = survey.prompts["train"], survey.prompts["test"]
    train_negatives, test_negatives = survey.with_negative["train"], survey.with_negative["test"]
    given = bool(test)
    if not given:
        test = _held_out(train, train_negatives, extraction.test_share)
        train, test_negatives = train - test, train_negatives
    turns, texts = survey.user_turns, survey.texts
    questions = {"test": {turns[prompt][0] for prompt in test if len(turns[prompt]) == 1}}
    questions |= {origin: set(map(_question, found)) for origin, found in asked.items()}
    exact = {origin: {p for p in train if not found.isdisjoint(turns[p])} for origin, found in questions.items()}
    exact["test"] |= train & test
    everything = {"test": [texts[prompt] for prompt in sorted(test)]} | asked
    leaks = find_leaks(exact, {p: texts[p] for p in train}, everything, extraction.near_duplicates)
    kept_train, capped_train = _capped(train - leaks.prompts, train_negatives, extraction.train_prompts)
    kept_test, capped_test = _capped(test, test_negatives, extraction.test_prompts)
    split = Split({"train": kept_train, "test": kept_test}, given)
    return split, leaks, {"train": capped_train, "test": capped_test}


def _held_out(prompts: set[str], with_negative: set[str], share: float) -> set[str]:
    """The first prompts in the order of their ids, such that `share` of those with negatives is among them."""
    if share == 0:
        return set()
    order = sorted(with_negative)
    last = order[max(1, round(share * len(order))) - 1]
    return {prompt for prompt in prompts if prompt <= last}


def _capped(prompts: set[str], with_negative: set[str], cap: int | None) -> tuple[set[str], int]:
    """The prompts that a cap keeps, and how many it drops."""
    if cap is None:
        return prompts, 0
    kept = set(sorted(prompts & with_negative)[:cap])
    return kept, len(prompts) - len(kept)


# The second pass ---------------------------------------------------------------------------------


def _comparisons(batch: pa.RecordBatch, start: int, claims: np.ndarray, split: Split) -> tuple[np.ndarray, pa.Table]:
    """The claimed comparisons of a batch that the split keeps: their indices in `claims`, and their columns.

    Args:
        batch: rows of `records.ROWS`.
        start: number of the first of them in the table.
        claims: [N] of `_CLAIM`, in the order of their places.
    """
    places = claims["place"].astype(np.int64)
    first, last = np.searchsorted(places, [start << 16, (start + batch.num_rows) << 16])
    numbers = (places[first:last] >> 16) - start
    asked = batch.select(["prompt_id", "split"]).take(pa.array(numbers))
    to = [split.of(*row) for row in zip(*(column.to_pylist() for column in asked.columns), strict=True)]
    kept = np.flatnonzero([name is not None for name in to])
    indices, numbers = first + kept, numbers[kept]

    lengths = batch["responses"].value_lengths().to_numpy(zero_copy_only=False)
    before = (np.cumsum(lengths) - lengths)[numbers]
    sides = places[indices] >> 8 & 255, (places[indices] & 255) - 1
    answers = batch["responses"].flatten()
    negative = answers.take(pa.array(before + sides[0]))
    # No `take` of structs by a null index: their fields would not be null.
    positive = {
        label: answers.field(label).take(pa.array(before + sides[1], mask=sides[1] < 0))
        for label in ("text", "unsafe")
    }
    columns = {
        "prompt_id": batch["prompt_id"].take(pa.array(numbers)),
        "split": pa.array([to[i] for i in kept], pa.string()),
        "messages": batch["messages"].take(pa.array(numbers)),
        "negative": negative.field("text"),
        "positive": positive["text"],
        "positive_unsafe": positive["unsafe"],
        "categories": negative.field("categories"),
        "severity": negative.field("severity"),
    }
    return indices, pa.table(columns, schema=records.COMPARISONS)


def _capped_negatives(claims: np.ndarray, rows: Path, split: Split, extraction: Extraction) -> np.ndarray:
    """The claims that are left of negatives when those of the train split are capped.

    Those with a human positive come first, so that a pair method keeps its prompts; a digest settles the rest.
    A negative stays where its prompt and each of its categories still have room.

    Raises:
        D2OError: where categories are capped and there are none.
    """
    caps = {"prompt_id": extraction.negatives_per_prompt, "categories": extraction.negatives_per_category}
    if not any(caps.values()):
        return claims
    found: list[tuple[int, str, list[str] | None]] = []
    for start, batch in _batches(rows, "capping negatives"):
        indices, table = _comparisons(batch, start, claims, split)
        columns = (table[name].to_pylist() for name in ("split", "prompt_id", "categories"))
        found += [(index, *row[1:]) for index, *row in zip(indices, *columns, strict=True) if row[0] == "train"]
    if caps["categories"] and all(categories is None for *_, categories in found):
        raise D2OError(f"{rows}: there are no harm categories to cap: leave out negatives_per_category")

    room = {key: math.inf if cap is None else cap for key, cap in caps.items()}
    count: Counter[tuple[str, str]] = Counter()
    dropped = []
    for index, prompt, categories in sorted(found, key=lambda row: claims[row[0]].tobytes()[1:]):
        uses = [("prompt_id", prompt), *(("categories", name) for name in categories or ())]
        if all(count[use] < room[use[0]] for use in uses):
            count.update(uses)
        else:
            dropped.append(index)
    return np.delete(claims, dropped)


def _write_comparisons(
    rows: Path,
    total: int,
    split: Split,
    negatives: tuple[records.Draft, np.ndarray],
    pairs: tuple[records.Draft, np.ndarray],
) -> dict[str, dict[str, int]]:
    """Write the claimed negatives and pairs that the split keeps, each a draft and [N] of `_CLAIM`; count them."""
    tally, pair_count = Tally(), Counter(train=0, test=0)
    with (
        records.TableWriter(negatives[0].path, records.COMPARISONS) as negative_table,
        records.TableWriter(pairs[0].path, records.COMPARISONS) as pair_table,
    ):
        for start, batch in _batches(rows, "writing negatives and pairs", total):
            _, found = _comparisons(batch, start, negatives[1], split)
            negative_table.add_columns(found)
            tally.add(found)
            _, found = _comparisons(batch, start, pairs[1], split)
            pair_table.add_columns(found)
            pair_count.update(found["split"].to_pylist())
    negatives[0].facts["rows"], pairs[0].facts["rows"] = negative_table.count, pair_table.count
    return tally.counts() | {"pairs": dict(pair_count)}


class Tally:
    """Counts of negatives."""

    def __init__(self):
        self._negatives = Counter(train=0, test=0)
        self._prompts: dict[str, set[str]] = {"train": set(), "test": set()}
        self._with_positive: set[str] = set()
        self._positives = Counter(human=0, safe=0)
        self._labels: dict[str, dict[str, Counter[str]]] = {
            label: {"train": Counter(), "test": Counter()} for label in ("categories", "severity")
        }

    def add(self, negatives: pa.Table) -> None:
        """Count the rows of a table of `records.COMPARISONS`."""
        columns = negatives.select(["split", "prompt_id", "positive_unsafe", "categories", "severity"])
        human = negatives["positive"].is_valid().to_pylist()
        rows = zip(human, *(column.to_pylist() for column in columns.columns), strict=True)
        for human, split, prompt, unsafe, categories, severity in rows:
            self._negatives[split] += 1
            self._prompts[split].add(prompt)
            self._positives["human"] += human
            self._positives["safe"] += unsafe is False
            if human:
                self._with_positive.add(prompt)
            self._labels["categories"][split].update(categories or ())
            if severity is not None:
                self._labels["severity"][split][str(severity)] += 1

    def counts(self) -> dict[str, dict[str, int]]:
        """Negatives and their prompts by split, with what a pair method lacks, and the negatives by label."""
        prompts = {split: len(found) for split, found in self._prompts.items()}
        lone = len(self._prompts["train"] - self._with_positive)
        labels = {
            f"{split}_{label}": dict(sorted(found.items()))
            for label, splits in self._labels.items()
            for split, found in splits.items()
            if found
        }
        return {
            "negatives": dict(self._negatives),
            "prompts": prompts,
            "positives": dict(self._positives),
            "prompts_without_positive": {"train": lone},
        } | labels


def _write_prompts(
    prompts: records.Draft, negatives: records.Draft, evaluation: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the prompts to answer, each once: those of the test negatives, then the evaluation prompts."""
    origins: Counter[str] = Counter({prompt["origin"]: 0 for prompt in evaluation})
    seen: set[str] = set()
    with records.TableWriter(prompts.path, records.PROMPTS) as table:
        for prompt in chain(_test_prompts(negatives.path), evaluation):
            if prompt["prompt_id"] not in seen:
                seen.add(prompt["prompt_id"])
                origins[prompt["origin"]] += 1
                table.add(prompt)
    prompts.facts["rows"] = table.count
    del origins["test"]
    repeated = len(evaluation) - origins.total()
    return {"evaluation_prompts": dict(origins), "repeated_evaluation_prompts": repeated}


def _test_prompts(negatives: Path) -> Iterator[dict[str, Any]]:
    for batch in records.read_batches(negatives, records.COMPARISONS):
        for row in batch:
            if row["split"] == "test":
                yield {"prompt_id": row["prompt_id"], "messages": row["messages"], "origin": "test"}


# Inputs ------------------------------------------------------------------------------------------


def _read(rows: Path, doing: str) -> Iterator[Row]:
    return (row for _, batch in _batches(rows, doing) for row in rows_of(batch))


def _batches(rows: Path, doing: str, total: int | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches of a table of rows, with the number of the first row of each."""
    with tqdm(desc=doing, total=total, unit=" rows", mininterval=2) as bar:
        for batch in records.read_columns(rows, records.ROWS):
            yield bar.n, batch
            bar.update(batch.num_rows)


def _evaluation_prompts(files: list[str]) -> list[dict[str, Any]]:
    """The `prompt` fields of the files, as rows of `records.PROMPTS`; `origin` is a file's name."""
    prompts = []
    origins = {"test": "the test split"}
    for path in map(Path, files):
        suffix = next((s for s in _SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix is None:
            raise D2OError(f"{path}: unknown suffix; prompts are read from {', '.join(_SUFFIXES)}")
        origin = path.name[: -len(suffix)]
        if origin in origins:
            raise D2OError(f"{path}: {origins[origin]} is called {origin!r} as well; rename the file")
        origins[origin] = str(path)
        number = 0
        for number, row in _evaluation_rows(path, suffix):
            text = row.get("prompt") if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise D2OError(f"{path}: row {number}: no text in `prompt`; mend the row or take it out")
            if re.search(r"[\ud800-\udfff]", text):  # JSON can spell half of a surrogate pair, UTF-8 cannot
                raise D2OError(f"{path}: row {number}: half a character in `prompt`; mend the row")
            messages = [{"role": "user", "content": text}]
            prompts.append({"prompt_id": records.prompt_id(messages), "messages": messages, "origin": origin})
        if not number:
            raise D2OError(f"{path}: no prompt in it; leave the file out or fetch it again")
    return prompts


def _evaluation_rows(path: Path, suffix: str) -> Iterator[tuple[int, Any]]:
    """The rows of a file, counted from 1; in JSON lines by the number of the line."""
    number = 0
    try:
        with gzip.open(path) if suffix.endswith(".gz") else path.open("rb") as file:
            text = file.read().decode("utf-8-sig")
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


def _questions(folder: Path) -> Iterator[str]:
    """The questions of a benchmark."""
    for path in _parquet_files(folder):
        try:
            table = pq.read_table(path, columns=["question"])
        except (OSError, pa.ArrowException) as error:
            fault = str(error).partition("\n")[0]
            raise D2OError(f"{path}: no column `question` to read ({fault}); delete {folder}") from None
        yield from filter(None, table["question"].to_pylist())


def _parquet_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise D2OError(f"{folder}: no .parquet file with questions; make it with the stage `questions`")
    return files


def _question(text: str) -> bytes:
    """What identifies a text: equal for texts that differ in case or white space only."""
    return _digest(records.normalised(text).encode())


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\x1f".join(parts), digest_size=8).digest()
