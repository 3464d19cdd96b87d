"""Numbers of rows and lengths of their texts: from finished tables, else assumed. All such assumptions are here."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from d2o import datasets, records
from d2o.formats import FORMATS
from d2o.layout import Layout
from d2o.settings import Dataset, Method, Settings, Task

# Characters per token; tokens that a chat template adds to a prompt; tokens that a self-correction instruction adds.
CHARACTERS, TEMPLATE, INSTRUCTION = 4.0, 20.0, 20.0
# Length of a generated answer as a share of `max_tokens`; share of a pool's samples that are sampled again.
ANSWER, AGAIN = 0.45, 0.1
# Tokens of a task's question with its choices, and of the choices alone; questions of an unknown task.
QUESTION, CHOICES, QUESTIONS = 85.0, 25.0, 10_000
# Number of rows that are read to measure lengths in a model's own tokens; columns by which answers are counted.
_READ, _COUNTED = 100, ["split", "prompt_id", "positive", "negative", "positive_unsafe"]


@dataclass(frozen=True)
class Human:
    """Counts of the human answers to the prompts of one split, or of those that one table has.

    Attributes:
        rows: one per negative, or one per pair.
        prompts: distinct ones.
        positives: rows with a human positive.
        safe: rows whose positive is labelled safe.
        answers: distinct answers, positives and negatives.
    """

    rows: float
    prompts: float
    positives: float
    safe: float
    answers: float

    def groups(self, method: Method, by_prompt: bool) -> float:
        """Number of groups that a method has from these rows, as `groups.view` makes them; by prompt `groups.merged`.

        Human positives are assumed to be all different, so that no two rows form one group.
        """
        if method.positives in ("human", "safe-human"):
            return self.positives if method.positives == "human" else self.safe
        return self.rows if method.negatives and not by_prompt else self.prompts

    def scaled(self, prompts: float) -> Human:
        """Scaled to another number of prompts."""
        share = prompts / max(self.prompts, 1)
        return Human(*(value * share for value in (self.rows, self.prompts, self.positives, self.safe, self.answers)))


@dataclass(frozen=True)
class DatasetSize:
    """One data set as one model reads it.

    Attributes:
        train: the train split of the negatives' table.
        pairs: the train split of the pairs' table.
        held_out: the rows of the negatives' table that no method is trained on.
        asked: prompts that every model answers.
        judged: prompts among them that a judge sees.
        prompt: tokens of a prompt in its template, on average.
        answer: tokens of a human answer, on average.
        known: where the numbers are from.
    """

    train: Human
    pairs: Human
    held_out: Human
    asked: float
    judged: float
    prompt: float
    answer: float
    known: str


# Public data sets: train rows, pairs, and characters of a prompt and an answer. Approximate for PKU-SafeRLHF's beta;
# exact numbers are known once the Hub's data are read.
_PUBLIC = {
    "PKU-Alignment/PKU-SafeRLHF": (Human(130_000, 15_000, 75_000, 75_000, 200_000), 297_000, (70, 330)),
    "Anthropic/hh-rlhf": (Human(160_000, 155_000, 160_000, 0, 320_000), 160_000, (500, 230)),
}
_UNKNOWN = (Human(10_000, 10_000, 10_000, 10_000, 20_000), 10_000, (200, 400))


def of(s: Settings, dataset: str, model: str) -> DatasetSize:
    """What is known about a data set, or else assumed."""
    if known(s, dataset):
        return _read(_tables(s, dataset), Path(Layout(s.results).path("model", model=model)).parent, s)
    return _assumed(s, s.datasets[dataset])


def known(s: Settings, dataset: str) -> bool:
    """Whether the tables of a data set are finished."""
    return all(table.exists() for table in _tables(s, dataset))


def _tables(s: Settings, dataset: str) -> list[Path]:
    return [Path(Layout(s.results).path(name, dataset=dataset)) for name in ("negatives", "pairs", "prompts")]


def _read(tables: Sequence[Path], model: Path, s: Settings) -> DatasetSize:
    negatives, pairs = records.read_any(tables[0], [*_COUNTED, "messages"]), records.read_any(tables[1], _COUNTED)
    origins = records.read_any(tables[2], ["origin"])["origin"].to_pylist()
    trained = pc.equal(negatives["split"], "train")
    prompt, answer = _lengths(_some(negatives), model, s)
    return DatasetSize(
        _human(negatives.filter(trained)),
        _human(pairs.filter(pc.equal(pairs["split"], "train"))),
        _human(negatives.filter(pc.invert(trained))),
        len(origins),
        sum(origin != "validation" for origin in origins),
        prompt,
        answer,
        f"rows and lengths of {tables[0].parent}",
    )


def _human(table: pa.Table) -> Human:
    positive = table["positive"]
    safe = pc.and_(pc.is_valid(positive), pc.fill_null(pc.invert(table["positive_unsafe"]), False))
    answers = pa.concat_tables(
        table.select(["prompt_id", answer]).rename_columns(["prompt_id", "text"])
        for answer in ("positive", "negative")
    )
    answers = answers.filter(pc.fill_null(pc.not_equal(answers["text"], ""), False))
    return Human(
        table.num_rows,
        pc.count_distinct(table["prompt_id"]).as_py(),
        table.num_rows - positive.null_count,
        pc.sum(safe).as_py() or 0,
        answers.group_by(["prompt_id", "text"]).aggregate([]).num_rows,
    )


def _some(table: pa.Table) -> list[dict[str, Any]]:
    """About `_READ` rows of the negatives' table, evenly spread: of the train split, where it has any."""
    trained = table.filter(pc.equal(table["split"], "train"))
    table = trained if trained.num_rows else table
    return table.take([*range(0, table.num_rows, max(1, table.num_rows // _READ))]).to_pylist()


def _lengths(rows: Sequence[Mapping[str, Any]], model: Path, s: Settings) -> tuple[float, float]:
    """Mean tokens of a prompt and of a human answer: the model's own where its folder exists, else by characters."""
    if not rows:
        return TEMPLATE, 0.0
    longest = s.forward.max_response_tokens
    if (model / "config.json").exists():
        from d2o import chat

        tokenizer = chat.load_tokenizer(model)
        dialogues = [
            (row["messages"], [(text, True) for text in (row["positive"], row["negative"]) if text]) for row in rows
        ]
        encoded = chat.encode(tokenizer, dialogues, chat.end_of_turn(tokenizer))
        answers = [min(len(ids), longest) for _, responses in encoded for ids in responses]
        return sum(len(ids) for ids, _ in encoded) / len(encoded), sum(answers) / len(answers)
    asked = [sum(len(turn["content"]) for turn in row["messages"]) for row in rows]
    answers = [len(text) for row in rows for text in (row["positive"], row["negative"]) if text]
    prompt, answer = (sum(lengths) / len(lengths) / CHARACTERS for lengths in (asked, answers))
    return prompt + TEMPLATE, min(answer, longest)


def _assumed(s: Settings, dataset: Dataset) -> DatasetSize:
    train, pairs, (prompt, answer) = _PUBLIC.get(dataset.hub or "", _UNKNOWN)
    known = f"about, as {dataset.hub} was published" if dataset.hub in _PUBLIC else "assumed"
    if dataset.organism:
        organism = s.organisms[dataset.organism]
        counts = {"demonstrations": organism.demonstrations}
        prompts = sum(counts.get(split, organism.prompts) for split in dataset.train)
        tested = sum(counts.get(split, organism.prompts) for split in dataset.test)
        train, pairs, known = Human(prompts, prompts, prompts, prompts, 2 * prompts), prompts, "of the organism"
        prompt, answer = 60, 110
    elif not dataset.hub:
        rows = _count_all(dataset.train)
        paired = rows if FORMATS[dataset.format].pairs else 0.0
        train, pairs, known = Human(rows, rows, paired, paired, rows + paired), paired, "lines of its files"
        tested = _count_all(dataset.test)
    else:
        tested = train.prompts / 10
    if not dataset.test:
        tested, kept = train.prompts * dataset.test_share, 1 - dataset.test_share
        train, pairs = train.scaled(train.prompts * kept), pairs * kept
    kept = min(train.prompts - dataset.validation_prompts, dataset.train_prompts or train.prompts)
    pairs, train = pairs * kept / max(train.prompts, 1), train.scaled(kept)
    if dataset.negatives_per_prompt and (fewer := dataset.negatives_per_prompt * train.prompts) < train.rows:
        share = fewer / train.rows
        train = replace(train, rows=fewer, positives=share * train.positives, safe=share * train.safe)
    tested = min(tested, dataset.test_prompts or tested)
    evaluated = float(sum(map(_count, dataset.evaluation_prompts)))
    longest = s.forward.max_response_tokens
    share = train.safe / max(train.positives, 1)
    return DatasetSize(
        train,
        Human(pairs, train.prompts, pairs, share * pairs, 2 * pairs),
        train.scaled(tested + dataset.validation_prompts),
        tested + evaluated + dataset.validation_prompts,
        tested + evaluated,
        prompt / CHARACTERS + TEMPLATE,
        min(answer / CHARACTERS, longest),
        known,
    )


def _count_all(sources: Sequence[str]) -> float:
    """Rows of local files, and of all files in local folders."""
    return float(sum(_count(file) for source in sources for file in datasets.files(source)))


def _count(file: str | Path) -> int:
    """Number of rows of a local file, by its lines or its Parquet footer."""
    path = Path(file)
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "rb") as lines:
        return sum(line.strip() not in (b"", b"[", b"]") for line in lines)


def generated(table: Path, max_tokens: int) -> float:
    """Mean tokens of the answers of a table; a share of `max_tokens` where the table does not exist yet."""
    if table.exists():
        tokens = records.read_any(table, ["tokens"])["tokens"]
        return sum(tokens.to_pylist()) / max(len(tokens), 1)
    return ANSWER * max_tokens


def questions(task: Task, folder: Path) -> float:
    """Number of questions of a task: from its finished folder or its local files, else that of MMLU, or assumed."""
    if (folder / "manifest.json").exists():
        return float(records.read_manifest(folder)["rows"])
    if task.path and not task.subjects:
        return float(sum(_capped(rows, task) for rows in _subjects(Path(task.path))))
    if task.data:
        return float(sum(map(_count, [path for split, path in task.data.items() if split == "test"])))
    return 14_042.0 if (task.hub or "").endswith("/mmlu") and not task.subjects else float(QUESTIONS)


def question_tokens(folder: Path) -> float:
    """Mean tokens of a task's question with its choices: from its finished folder, else assumed."""
    if (folder / "questions.parquet").exists():
        texts = records.read_any(folder / "questions.parquet", ["text"])["text"].to_pylist()
        return sum(map(len, texts)) / max(len(texts), 1) / CHARACTERS + CHOICES
    return QUESTION


def _capped(rows: int, task: Task) -> int:
    return min(rows, task.limit or rows)


def _subjects(path: Path) -> list[int]:
    """Number of test questions of each subject of a folder or .zip in MMLU's form."""
    from d2o import questions

    return [len(splits["test"]()) for splits in questions.local(path).values() if "test" in splits]
