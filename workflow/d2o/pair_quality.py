"""Stage `pair_quality`: a data set's human pairs as answers, to be scored and judged like a model's (Figure 1).

How good are the answers that annotators chose? Reward models, a judge and classifiers of toxicity are asked about
the chosen and the rejected answers of the same pairs, by the stages `scores` and `judge`.
"""

from __future__ import annotations

import heapq
from pathlib import Path

import pandas as pd

from d2o import identities, records, schemas
from d2o.errors import D2OError
from d2o.settings import PairQuality


def choose(pair_quality: PairQuality, pairs: Path, output: Path) -> None:
    """Choose human pairs; write `chosen.parquet` and `rejected.parquet` beside `output`, which holds their prompts.

    Pairs of test prompts come first: for a reward model trained here, only these count. Then a digest decides, not
    the order of the rows, so that a larger choice contains each smaller one. The two answers of a pair have the same
    `sample`; a prompt's `origin` is its split.

    Args:
        pairs: the `schemas.NEGATIVES` table of all human pairs.
        output: the `schemas.PROMPTS` table to write.
    Raises:
        D2OError: where the data set has no pair.
    """
    rows = (row for batch in records.read_batches(pairs, schemas.NEGATIVES) for row in batch)
    chosen = heapq.nsmallest(pair_quality.pairs, rows, key=_order)
    if not chosen:
        raise D2OError(
            f"{pairs}: the data set has no human pair whose quality could be shown: leave `pair_quality` out"
        )
    chosen = pd.DataFrame(chosen)
    prompts = chosen.drop_duplicates("prompt_id").rename(columns={"split": "origin"})[schemas.PROMPTS.names]
    unknown = dict.fromkeys(("instruction", "seed", "tokens"))
    answers = chosen.assign(sample=chosen.groupby("prompt_id").cumcount(), finish="stop", **unknown)
    with records.artifact(output, pair_quality, [pairs]) as draft:
        for preference, column in (("chosen", "positive"), ("rejected", "negative")):
            rows = answers.assign(text=answers[column])[schemas.SAMPLES.names].to_dict("records")
            with records.artifact(output.with_name(f"{preference}.parquet"), pair_quality, [pairs]) as table:
                table.facts["rows"] = records.write_table(table.path, schemas.SAMPLES, rows)
        draft.facts["rows"] = records.write_table(draft.path, schemas.PROMPTS, prompts.to_dict("records"))


def _order(row: dict) -> tuple[bool, str]:
    return row["split"] != "test", identities.response_id(row["prompt_id"], f"{row['negative']}\x1f{row['positive']}")
