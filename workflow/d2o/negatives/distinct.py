"""Removes duplicates among candidates."""

from __future__ import annotations

import polars as pl

from d2o.negatives.rows import collect, normalised


def taken(
    candidates: pl.LazyFrame, doing: str, total: int, *, by_positive: bool
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The candidates without duplicates, and how many were left out.

    Two candidates are equal when their prompts and texts are, except for case and white space. Of equal ones, one
    with a positive is preferred; a digest decides the rest, so that the order of rows does not matter. The digest
    does not include the positive's label: to choose safe positives would give the pair methods cleaner human answers
    than people gave.

    Args:
        candidates: as `negatives_of` and `pairs_of` find them.
        doing, total: for the progress bar.
        by_positive: whether candidates of one negative with two positives differ.
    Returns:
        columns `prompt`, `split`, `place`, `no_positive` and `digest`, in the order of places; and the number of
        exact duplicates, and of those that are equal except for case and white space.
    """
    answers = ["negative", "positive"] if by_positive else ["negative"]
    asked = ["split", "prompt"]
    # The contents of a candidate, without the label.
    written = [
        pl.col("messages").list.eval(pl.element().struct.field("content")),
        *map(pl.col, ("negative", "positive", "categories", "severity")),
    ]
    keys = candidates.select(
        "number",
        *asked,
        "place",
        pl.struct(*asked, *answers).hash().alias("exact"),
        pl.struct(*asked, *(normalised(pl.col(answer)) for answer in answers)).hash().alias("identity"),
        pl.col("positive").is_null().alias("no_positive"),
        pl.struct(*written).hash().alias("digest"),
        # Decides between equal texts with two labels.
        pl.struct(*written, "positive_unsafe").hash().alias("label_digest"),
    )
    table = collect(keys, doing, total)
    exact = len(table) - table["exact"].n_unique()
    best = table.drop("exact").sort("identity", "no_positive", "digest", "label_digest", "place")
    best = best.unique("identity", keep="first", maintain_order=True).drop("identity", "label_digest").sort("place")
    return best, {"exact": exact, "normalised": len(table) - exact - len(best)}
