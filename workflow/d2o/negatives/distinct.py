"""Which of several equal candidates is taken."""

from __future__ import annotations

import polars as pl

from d2o.negatives.rows import collect, normalised


def taken(
    candidates: pl.LazyFrame, doing: str, total: int, *, by_positive: bool
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The candidates of which none equals another, and how many were left out.

    Two are equal when their prompts and texts are, but for case and white space. One with a positive labelled safe
    comes first, then one with any positive; a digest settles the rest, so that the order of rows does not matter.

    Args:
        candidates: as `negatives_of` and `pairs_of` find them.
        doing, total: for the progress bar.
        by_positive: whether candidates of one negative with two positives differ.
    Returns:
        columns `prompt`, `split`, `place`, `not_safe`, `no_positive` and `digest`, in the order of places; and how
        many were equal to another letter for letter, and how many but for case and white space.
    """
    sides = ["negative", "positive"] if by_positive else ["negative"]
    asked = ["split", "prompt"]
    keys = candidates.select(
        "number",
        *asked,
        "place",
        pl.struct(*asked, *sides).hash().alias("exact"),
        pl.struct(*asked, *(normalised(pl.col(side)) for side in sides)).hash().alias("identity"),
        (~pl.col("positive_unsafe")).fill_null(False).not_().alias("not_safe"),
        pl.col("positive").is_null().alias("no_positive"),
        # Of all that is written.
        pl.struct(
            pl.col("messages").list.eval(pl.element().struct.field("content")),
            "negative",
            "positive",
            "positive_unsafe",
            "categories",
            "severity",
        )
        .hash()
        .alias("digest"),
    )
    found = collect(keys, doing, total)
    exact = len(found) - found["exact"].n_unique()
    best = found.drop("exact").sort("identity", "not_safe", "no_positive", "digest", "place")
    best = best.unique("identity", keep="first", maintain_order=True).drop("identity").sort("place")
    return best, {"exact": exact, "normalised": len(found) - exact - len(best)}
