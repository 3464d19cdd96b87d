"""The data sheet of a pool: what a reader wants to know about generated data before training on it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2o import records, schemas, texts
from d2o.settings import Positives

if TYPE_CHECKING:
    import pandas as pd

# Prompts on whose samples distinct-n and self-BLEU are computed, and samples shown. A prompt's id is a digest: the
# first ones in its order are a random choice.
_PROMPTS, _EXAMPLES = 200, 10


def describe(pool: Path, prompts: Path, positives: Positives) -> dict[str, Any]:
    """Counts, lengths in tokens, diversity, flags, instructions, and random examples.

    Diversity: distinct-n over all samples of up to 200 prompts (Li et al., 1510.03055), and self-BLEU, the mean BLEU
    of a sample against the other samples of its prompt (Zhu et al., 1802.01886; by sacrebleu, 0 to 100): the higher,
    the more alike.

    Args:
        prompts: the `schemas.NEGATIVES` table that the pool answers.
    """
    columns = [name for name in schemas.POOL.names if name not in ("seed", "text")]
    rows = records.read_frame(pool, schemas.POOL, columns)
    place = rows["prompt_id"].ne(rows["prompt_id"].shift()).cumsum()  # of the prompt, from 1
    some = rows[place <= _PROMPTS]
    some = some.assign(text=list(islice(_texts(pool), len(some))))
    examples = some[some["sample"] == place[some.index] % positives.k].head(_EXAMPLES)
    asked = _last_turns(prompts, set(examples["prompt_id"]))
    shown = examples[["prompt_id", "sample", "instruction", "text", "flags"]].to_dict("records")
    return {
        "prompts": rows["prompt_id"].nunique(),
        "k": positives.k,
        "samples": len(rows),
        "usable": int(rows["usable"].sum()),
        "resampled": int((rows["attempt"] > 0).sum()),
        "flags": rows["flags"].explode().value_counts().sort_index().to_dict(),
        "instructions": _by_instruction(rows),
        "tokens": rows["tokens"].value_counts().sort_index().to_dict(),
        "distinct": {n: texts.distinct(some["text"], n) for n in (1, 2, 3)},
        "self_bleu": _self_bleu(some.groupby("prompt_id", sort=False)["text"].agg(list)),
        "examples": [{"prompt": asked[row["prompt_id"]]} | row | {"flags": list(row["flags"])} for row in shown],
    }


def _texts(pool: Path) -> Iterator[str]:
    """The samples' texts, read as they are asked for."""
    for batch in records.read_columns(pool, schemas.POOL, ["text"]):
        yield from batch["text"].to_pylist()


def _by_instruction(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """By instruction: samples, how many were cut, and the spread of their lengths in tokens."""
    groups = rows.assign(cut=rows["finish"] == "length").groupby(rows["instruction"].fillna("plain prompt"))
    spread = groups["tokens"].describe()[["mean", "min", "25%", "50%", "75%", "max"]]
    spread.columns = ["mean", "min", "25 %", "median", "75 %", "max"]
    return groups.agg(samples=("tokens", "size"), cut=("cut", "sum")).astype(object).join(spread).to_dict("index")


def _last_turns(prompts: Path, wanted: set[str]) -> dict[str, str]:
    return {
        row["prompt_id"]: row["messages"][-1]["content"]
        for batch in records.read_batches(prompts, schemas.NEGATIVES)
        for row in batch
        if row["prompt_id"] in wanted
    }


def _self_bleu(groups) -> float | None:
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, group[:place] + group[place + 1 :]).score
        for group in groups
        for place, text in enumerate(group)
        if len(group) > 1
    ]
    return float(np.mean(scores)) if scores else None
