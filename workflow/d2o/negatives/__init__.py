"""Stage `negatives`: human negatives and human pairs from preference rows, split by prompt.

The table of rows may be larger than memory. The first passes keep digests, and the text of each distinct prompt, and
decide what is kept: which prompts are train and test, and which of several equal candidates is taken. The last passes
write, one batch at a time. Which negatives and prompts are kept does not depend on the order of the rows; the tables
are in this order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from d2o import records
from d2o.errors import D2OError
from d2o.negatives import evaluated
from d2o.negatives.distinct import taken
from d2o.negatives.rows import equal_answers, negatives_of, no_negative, normalised, pairs_of, scan
from d2o.negatives.split import read_prompts, split_prompts
from d2o.negatives.tables import capped_negatives, counts_of, write_candidates, write_prompts
from d2o.settings import Extraction


def extract(extraction: Extraction, rows: Path, folder: Path) -> None:
    """Write `pairs.parquet`, `prompts.parquet` and, last, `negatives.parquet` into `folder`.

    Args:
        extraction: the rule, the size of the splits, and files with further prompts to answer.
        rows: a `schemas.ROWS` table.
        folder: where the tables go.
    Raises:
        D2OError: where an input cannot be read, the rule finds no negative, none is left to train on, or train and
            test share too many prompts.
    """
    rule = extraction.rule
    evaluation = evaluated.prompts(extraction.evaluation_prompts)
    texts = pl.Series([prompt["messages"][0]["content"] for prompt in evaluation], dtype=pl.String)
    asked = pl.select(text=normalised(pl.lit(texts)), origin=pl.lit("evaluation"))
    asked = asked.with_columns(key=pl.col("text").hash())

    table = scan(rows)
    total, equal = table.select(pl.len(), equal_answers().sum()).collect(engine="streaming").row(0)
    candidates = {"negatives": negatives_of(table, rule), "pairs": pairs_of(table, rule)}
    negatives, duplicates = taken(candidates["negatives"], "surveying negatives", total, by_positive=False)
    if negatives.is_empty():
        raise D2OError(f"{rows}: {no_negative(table, rule)}")
    pairs, pair_duplicates = taken(candidates["pairs"], "surveying pairs", total, by_positive=True)
    prompts = read_prompts(table, total)
    split, leaks, capped = split_prompts(prompts, negatives, extraction, asked)
    kept_negatives, kept_pairs = (frame.join(split, on=["prompt", "split"]) for frame in (negatives, pairs))
    if kept_negatives.filter(to="train").is_empty():
        raise D2OError(
            f"{rows}: no negative is left to train on: {len(split.filter(to='test'))} prompts are test prompts, "
            f"{len(split.filter(to='validation'))} validation prompts, and {len(leaks.prompts)} train prompts are "
            f"evaluated as well; change test_share, the test part, validation_prompts, evaluation_prompts or "
            f"near_duplicates"
        )
    in_both, tested = len(prompts.filter("train", "test")), len(prompts.filter("test"))
    if in_both > extraction.max_leak_share * tested:
        raise D2OError(
            f"{rows}: {in_both} of {tested} test prompts are train prompts as well: are both of one release? "
            f"Name files of one, or raise max_leak_share ({extraction.max_leak_share:g})"
        )
    negative_count = len(kept_negatives)
    kept_negatives = capped_negatives(kept_negatives, candidates["negatives"], extraction, rows, total)
    capped["negatives"] = negative_count - len(kept_negatives)

    inputs = [rows, *extraction.evaluation_prompts]
    with (
        records.artifact(folder / "negatives.parquet", extraction, inputs) as negatives_draft,
        records.artifact(folder / "prompts.parquet", extraction, inputs) as prompts_draft,
        records.artifact(folder / "pairs.parquet", extraction, inputs) as pairs_draft,
    ):
        write_candidates(negatives_draft, candidates["negatives"], kept_negatives, "writing negatives", total)
        write_candidates(pairs_draft, candidates["pairs"], kept_pairs, "writing pairs", total)
        counts = {"rows": total, "equal_answers": equal}
        counts |= counts_of(negatives_draft.path, pairs_draft.path)
        counts |= write_prompts(prompts_draft, negatives_draft, evaluation)
        counts |= leaks.counts()
        counts["capped"] = capped
        counts["duplicates"] = duplicates
        counts["pair_duplicates"] = pair_duplicates
        negatives_draft.facts |= {"counts": counts, "leaks": leaks.examples(prompts)}
    for group, count in counts.items():
        parts = count.items() if isinstance(count, dict) else [("in all", count)]
        shown = ", ".join(f"{n:.1%} {name}" if isinstance(n, float) else f"{n} {name}" for name, n in parts) or "none"
        print(f"{group.replace('_', ' ')}: {shown}", file=sys.stderr)
