"""Splits prompts into those that are trained on and those that are held out."""

from __future__ import annotations

import polars as pl

from d2o.negatives.leaks import Leaks, find_leaks
from d2o.negatives.rows import SPLIT, collect, text_and_digests, user_turns
from d2o.settings import Extraction


def read_prompts(rows: pl.LazyFrame, total: int) -> pl.DataFrame:
    """The prompts of rows, in the order of their ids.

    Returns:
        columns `prompt`; `train` and `test`: whether a row of that split has it; `text`: all its user turns,
        normalised; `turns`: a digest of each user turn, normalised.
    """
    test = pl.col("test")
    columns = rows.select("number", "prompt", first="number", test=pl.col("split") == "test")
    prompts = (
        collect(columns, "surveying prompts", total)
        .group_by("prompt")
        .agg(number=pl.col("first").min(), train=(~test).any(), test=test.any())
    )
    # Prompts of one id differ in case and white space only: once normalised, it does not matter which is taken.
    user = rows.select("number", turns=user_turns()).join(prompts.lazy(), on="number", maintain_order="left")
    read = user.select("number", "prompt", "train", "test", *text_and_digests())
    return collect(read, "reading prompts", total).sort("prompt")


def split_prompts(
    prompts: pl.DataFrame, negatives: pl.DataFrame, extraction: Extraction, asked: pl.DataFrame
) -> tuple[pl.DataFrame, Leaks, dict[str, int]]:
    """Train, validation and test prompts: disjoint, and no train prompt equal or near to one that is evaluated.

    A prompt id is a digest, so the order of ids is a fixed shuffle of the prompts: the share that is held out and
    the prompts that a cap keeps come first in it. A train prompt leaks when it is a test prompt, or when one
    of its user turns is the whole text of a test prompt or an evaluation prompt. It leaks nearly when all its user
    turns together are a near-duplicate of one of these. Validation prompts are the first train prompts with
    negatives, without those of them that leak, so there may be fewer than requested. For the other train prompts
    they count as evaluated as well.

    Args:
        prompts: as `read_prompts`.
        negatives: `prompt` and `split` of each.
        extraction: `test_share`, `validation_prompts`, `near_duplicates` and the caps. With a cap, only prompts with
            negatives stay.
        asked: what is evaluated besides test prompts: `origin`, `text`, and the text's `key` as in `turns`.
    Returns:
        each `prompt` that is kept, with the `split` that its rows have and the one they go `to`; the leaks; and how
        many prompts of each split exceed a cap.
    """
    given = prompts["test"].any()
    with_negative = {split: negatives.filter(split=split)["prompt"].unique() for split in ("train", "test")}
    if not given:
        with_negative["test"] = with_negative["train"]
        test = _held_out(with_negative["train"], extraction.test_share)
        prompts = prompts.with_columns(test=test, train=~test)
    train, test = (prompts.filter(split) for split in ("train", "test"))
    asked = pl.concat([_asked(test, "test"), asked.select("text", "origin", "key")])
    both = train.filter("test").select("prompt", origin=pl.lit("test"))
    validation = train.filter(pl.col("prompt").is_in(with_negative["train"].implode()))
    validation = validation.head(extraction.validation_prompts)
    if len(validation):
        leaking = find_leaks(validation, asked, both, extraction.near_duplicates).prompts
        validation = validation.join(leaking, on="prompt", how="anti", maintain_order="left")
        train = train.join(validation, on="prompt", how="anti", maintain_order="left")
        asked = pl.concat([asked, _asked(validation, "validation")])
    leaks = find_leaks(train, asked, both, extraction.near_duplicates)

    train = train.join(leaks.prompts, on="prompt", how="anti", maintain_order="left")
    kept_train, capped_train = _capped(train, with_negative["train"], extraction.train_prompts)
    kept_test, capped_test = _capped(test, with_negative["test"], extraction.test_prompts)
    parts = {"train": kept_train, "validation": validation, "test": kept_test}
    kept = pl.concat(part.select("prompt", to=pl.lit(to, SPLIT)) for to, part in parts.items())
    from_test = pl.lit(given) & (pl.col("to") == "test")
    kept = kept.with_columns(split=pl.when(from_test).then("to").otherwise(pl.lit("train", SPLIT)))
    return kept, leaks, {"train": capped_train, "test": capped_test}


def _asked(prompts: pl.DataFrame, origin: str) -> pl.DataFrame:
    """Prompts in the form of `asked` of `find_leaks`; one of several turns has no key: it equals no single turn."""
    lone = pl.when(pl.col("turns").list.len() == 1).then(pl.col("turns").list.first())
    return prompts.select("text", origin=pl.lit(origin), key=lone)


def _held_out(with_negative: pl.Series, share: float) -> pl.Expr:
    """Whether a prompt is held out: whether its id is among the first `share` of those of prompts with negatives."""
    if share == 0:
        return pl.lit(False)
    last = with_negative.sort()[max(1, round(share * len(with_negative))) - 1]
    return pl.col("prompt") <= pl.lit(last, pl.UInt64)


def _capped(prompts: pl.DataFrame, with_negative: pl.Series, cap: int | None) -> tuple[pl.DataFrame, int]:
    """The prompts, in order, that a cap keeps, and how many it drops."""
    if cap is None:
        return prompts, 0
    kept = prompts.filter(pl.col("prompt").is_in(with_negative.implode())).head(cap)
    return kept, len(prompts) - len(kept)
