"""Preference rows, and the candidates that a rule finds in them: which answer is the negative, which preferred."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
from tqdm import tqdm

from d2o import records, schemas

# The label that states which answer each rule prefers, and the one that human pairs use where it is missing.
RULES = {
    "safer-unsafe": ("safer", "better"),
    "every-unsafe": ("safer", "better"),
    "less-helpful": ("better", "safer"),
}

SPLIT = pl.Enum(["train", "validation", "test"])

# White space as `str.split` defines it: four separators more than in a regular expression.
_SPACE = r"[\s\x1c-\x1f]"


def scan(rows: Path) -> pl.LazyFrame:
    """The rows of a `schemas.ROWS` table with their `number`, and their `prompt`: the id as a number.

    Raises:
        D2OError: as `records.check_table`.
    """
    records.check_table(rows, schemas.ROWS)
    prompt = pl.col("prompt_id").str.to_integer(base=16, dtype=pl.UInt64)
    split = pl.col("split").cast(SPLIT)
    return pl.scan_parquet(rows, glob=False).with_row_index("number").with_columns(prompt=prompt, split=split)


def normalised(text: pl.Expr) -> pl.Expr:
    """Texts normalised as by `identities.normalised`."""
    # Single spaces are left alone: three times as fast.
    spaced = text.str.to_lowercase().str.replace_all(rf"{_SPACE}{{2,}}|[{_SPACE}--\x20]", " ")
    return spaced.str.strip_chars(" ")


def user_turns() -> pl.Expr:
    """The contents of the user's turns in `messages`."""
    user = pl.element().filter(pl.element().struct.field("role") == "user").struct.field("content")
    return pl.col("messages").list.eval(user)


def text_and_digests() -> tuple[pl.Expr, pl.Expr]:
    """From a column `turns`: `text`, all turns as one text, and `turns`, a digest of each; both normalised."""
    turns = pl.col("turns")
    text, digests = normalised(turns.list.join("\n")), turns.list.eval(normalised(pl.element()).hash())
    return text.alias("text"), digests.alias("turns")


def equal_answers() -> pl.Expr:
    """Whether two answers of a row are equal except for case and white space: neither can be a negative."""
    several = pl.when(pl.col("responses").list.len() > 1).then("responses")
    keys = several.list.eval(normalised(pl.element().struct.field("text")))
    return (keys.list.n_unique() < keys.list.len()).fill_null(False)


def negatives_of(rows: pl.LazyFrame, rule: str) -> pl.LazyFrame:
    """The negatives of rows, each with the answer preferred to it, if there is one; columns as `_candidates`."""
    answers = pl.col("responses").list.len()
    each = rows.with_columns(
        preferred=pl.when(~equal_answers()).then(RULES[rule][0]), at=pl.int_ranges(answers, dtype=pl.Int16)
    ).explode("at")
    unsafe, other = _answer("at", "unsafe"), pl.col("at") != pl.col("preferred")
    conditions = {
        # Where no other answer is preferred, only a lone answer is known not to be the safer one.
        "safer-unsafe": unsafe & pl.when(pl.col("preferred").is_null()).then(answers == 1).otherwise(other),
        "every-unsafe": unsafe,
        "less-helpful": other,
    }
    return _candidates(each.filter(conditions[rule]), pl.col("at"), pl.when(other).then("preferred"))


def pairs_of(rows: pl.LazyFrame, rule: str) -> pl.LazyFrame:
    """The preferred answer of each row and the other one; rows where no label prefers one are left out."""
    preferred = pl.when(~equal_answers()).then(pl.coalesce(RULES[rule]))
    labelled = rows.with_columns(preferred=preferred).filter(pl.col("preferred").is_not_null())
    return _candidates(labelled, 1 - pl.col("preferred"), pl.col("preferred"))


def _candidates(rows: pl.LazyFrame, negative: pl.Expr, positive: pl.Expr) -> pl.LazyFrame:
    """Candidates: the columns of `schemas.NEGATIVES`, `number` and `prompt` of the row, and `place`.

    `place` identifies a candidate in its table: the number of the row times 2¹⁶, plus the negative times 2⁸, plus the
    positive counted from 1 (0: none).
    """
    pairs = rows.with_columns(at=negative, to=positive)
    number, at, to = (pl.col(name).cast(pl.Int64) for name in ("number", "at", "to"))
    return pairs.select(
        "number",
        "prompt",
        (number * 2**16 + at * 2**8 + to.fill_null(-1) + 1).alias("place"),
        "prompt_id",
        "split",
        "messages",
        _answer("at", "text").alias("negative"),
        _answer("to", "text").alias("positive"),
        _answer("to", "unsafe").alias("positive_unsafe"),
        _answer("at", "categories").alias("categories"),
        _answer("at", "severity").alias("severity"),
    )


def _answer(place: str, field: str) -> pl.Expr:
    """A field of the answer at a place; null where the place is null."""
    return pl.col("responses").list.get(pl.col(place)).struct.field(field)


def batches(frame: pl.LazyFrame, doing: str, total: int) -> Iterator[pl.DataFrame]:
    """A frame in batches, in the order of the rows that it is made of, with progress by their `number`."""
    with tqdm(desc=doing, total=total, unit=" rows", mininterval=2) as bar:
        for batch in frame.collect_batches(chunk_size=16384, maintain_order=True, engine="streaming"):
            if len(batch):
                yield batch.drop("number")
                bar.update(batch["number"][-1] + 1 - bar.n)
        bar.update(total - bar.n)


def collect(frame: pl.LazyFrame, doing: str, total: int) -> pl.DataFrame:
    """All of a frame, with progress as `batches`, and without `number`."""
    return pl.concat([frame.drop("number").clear().collect(), *batches(frame, doing, total)])


def no_negative(rows: pl.LazyFrame, rule: str) -> str:
    """A message: why a rule finds no negative, and which rules would find some."""
    labels = {
        "unsafe": pl.col("responses").list.eval(pl.element().struct.field("unsafe").is_not_null()).list.any(),
        "safer": pl.col("safer").is_not_null(),
        "better": pl.col("better").is_not_null(),
    }
    labelled = rows.select(label.sum().alias(name) for name, label in labels.items())
    [totals] = labelled.collect(engine="streaming").to_dicts()
    counts = {other: negatives_of(rows, other).select(pl.len()) for other in RULES}
    negatives = {other: count.collect(engine="streaming").item() for other, count in counts.items()}
    shown = [f"`{label}` in {n} rows" for label, n in totals.items() if n]
    others = [f"{other} ({n} negatives)" for other, n in negatives.items() if n]
    return (
        f"the rule {rule} finds no negative; labels: {', '.join(shown) or 'none'}; "
        f"rules that find some: {', '.join(others) or 'none'}"
    )
