"""Which of several equal candidates is taken."""

from __future__ import annotations

import polars as pl

from d2o.negatives.rows import collect, normalised


def taken(
    candidates: pl.LazyFrame, doing: str, total: int, *, by_positive: bool
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The candidates of which none equals another, and how many were left out.

    Two are equal when their prompts and texts are, but for case and white space. One with a positive comes first; a
    digest settles the rest, so that the order of rows does not matter. It is not of the positive's label: to choose
    safe positives would hand the pair methods cleaner human answers than people gave.

    Args:
        candidates: as `negatives_of` and `pairs_of` find them.
        doing, total: for the progress bar.
        by_positive: whether candidates of one negative with two positives differ.
    Returns:
        columns `prompt`, `split`, `place`, `no_positive` and `digest`, in the order of places; and how many were
        equal to another letter for letter, and how many but for case and white space.
    """
    answers = ["negative", "positive"] if by_positive else ["negative"]
    asked = ["split", "prompt"]
    # What is written of a candidate, but for the label.
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
        # Between equal texts with two labels.
        pl.struct(*written, "positive_unsafe").hash().alias("label_digest"),
    )
    table = collect(keys, doing, total)
    exact = len(table) - table["exact"].n_unique()
    best = table.drop("exact").sort("identity", "no_positive", "digest", "label_digest", "place")
    best = best.unique("identity", keep="first", maintain_order=True).drop("identity", "label_digest").sort("place")
    return best, {"exact": exact, "normalised": len(table) - exact - len(best)}
