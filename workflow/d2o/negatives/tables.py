"""The tables of negatives, of human pairs and of prompts, and their counts."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl

from d2o import records, schemas
from d2o.errors import D2OError
from d2o.negatives.rows import batches, collect
from d2o.settings import Extraction


def capped_negatives(
    kept: pl.DataFrame, candidates: pl.LazyFrame, extraction: Extraction, rows: Path, total: int
) -> pl.DataFrame:
    """The negatives that are left when those of the train split are capped.

    Those with a human positive come first, so that a pair method keeps its prompts; a digest orders the rest.
    A negative is kept where its prompt and each of its categories are below their caps.

    Raises:
        D2OError: where categories are capped and the data set has none.
    """
    caps = {"prompt": extraction.negatives_per_prompt, "categories": extraction.negatives_per_category}
    if not any(caps.values()):
        return kept
    train = candidates.select("number", "place", "categories").join(
        kept.lazy().filter(to="train"), on="place", maintain_order="left"
    )
    ranked = collect(train, "capping negatives", total).sort("no_positive", "digest", "place")
    if caps["categories"] and ranked["categories"].is_null().all():
        raise D2OError(f"{rows}: there are no harm categories to cap: leave out negatives_per_category")

    room = {key: math.inf if cap is None else cap for key, cap in caps.items()}
    count: Counter[tuple[str, str | int]] = Counter()
    dropped = []
    for place, prompt, categories in ranked.select("place", "prompt", "categories").iter_rows():
        uses = [("prompt", prompt), *(("categories", name) for name in categories or ())]
        if all(count[use] < room[use[0]] for use in uses):
            count.update(uses)
        else:
            dropped.append(place)
    return kept.filter(~pl.col("place").is_in(dropped))


def write_candidates(
    draft: records.Draft, candidates: pl.LazyFrame, kept: pl.DataFrame, doing: str, total: int
) -> None:
    """Write the candidates that are kept, in the order of rows.

    Args:
        candidates: as `negatives_of` and `pairs_of` find them.
        kept: `place` of those kept, and the split they go `to`.
    """
    places = kept.lazy().select("place", "to")
    rows = candidates.join(places, on="place", maintain_order="left").with_columns(split="to")
    with records.TableWriter(draft.path, schemas.NEGATIVES) as table:
        for batch in batches(rows.select("number", *schemas.NEGATIVES.names), doing, total):
            table.add_columns(batch.to_arrow().cast(schemas.NEGATIVES))
    draft.facts["rows"] = table.count


def counts_of(negatives: Path, pairs: Path) -> dict[str, dict[str, int | float]]:
    """Counts: negatives, their prompts and pairs by split, positives, train prompts without a positive, the share of
    positives that are labelled unsafe, and the negatives by label."""
    table = pl.scan_parquet(negatives, glob=False)
    human, safe = pl.col("positive").is_not_null(), ~pl.col("positive_unsafe")
    by_prompt = table.group_by("split", "prompt_id").agg(pl.len(), human=human.sum(), safe=safe.sum())
    prompts = by_prompt.collect(engine="streaming")
    counts = {
        "negatives": _by_split(prompts, pl.col("len").sum()),
        "prompts": _by_split(prompts, pl.len()),
        "positives": {label: prompts[label].sum() for label in ("human", "safe")},
        "prompts_without_positive": {"train": len(prompts.filter(split="train", human=0))},
        "pairs": _by_split(pl.scan_parquet(pairs, glob=False).select("split").collect(), pl.len()),
    }
    unsafe = {"negatives": _unsafe(negatives), "pairs": _unsafe(pairs)}
    counts["unsafe_positives"] = {name: share for name, share in unsafe.items() if share is not None}
    labels = {
        "categories": table.select("split", name="categories").explode("name"),
        "severity": table.select("split", name=pl.col("severity").cast(pl.String)),
    }
    for label, names in labels.items():
        named = names.drop_nulls("name").group_by("split", "name").len().sort("name").collect(engine="streaming")
        for split, name, count in named.iter_rows():
            counts.setdefault(f"{split}_{label}", {})[name] = count
    return counts


def _unsafe(path: Path) -> float | None:
    """The share of a table's labelled positives that are unsafe; None where none has a label."""
    unsafe = pl.scan_parquet(path, glob=False).select(pl.col("positive_unsafe").mean()).collect(engine="streaming")
    return unsafe.item()


def _by_split(frame: pl.DataFrame, count: pl.Expr) -> dict[str, int]:
    return {"train": 0, "test": 0} | dict(frame.group_by("split").agg(count).iter_rows())


def write_prompts(
    prompts: records.Draft, negatives: records.Draft, evaluation: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the prompts to answer, each once: those of the held-out negatives, then the evaluation prompts."""
    held = pl.scan_parquet(negatives.path, glob=False).filter(pl.col("split") != "train")
    held = held.select("prompt_id", "messages", origin="split").unique("prompt_id", keep="first", maintain_order=True)
    origins: Counter[str] = Counter({prompt["origin"]: 0 for prompt in evaluation})
    seen: set[str] = set()
    with records.TableWriter(prompts.path, schemas.PROMPTS) as table:
        for prompt in chain(held.collect(engine="streaming").iter_rows(named=True), evaluation):
            if prompt["prompt_id"] not in seen:
                seen.add(prompt["prompt_id"])
                origins[prompt["origin"]] += 1
                table.add(prompt)
    prompts.facts["rows"] = table.count
    del origins["test"], origins["validation"]
    repeated = len(evaluation) - origins.total()
    return {"evaluation_prompts": dict(origins), "repeated_evaluation_prompts": repeated}
