"""Stage `leaks`: finds the questions of a task that train prompts contain, so that the report leaves them out."""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from d2o import records, schemas
from d2o.negatives.leaks import find_leaks
from d2o.negatives.rows import normalised, text_and_digests, user_turns
from d2o.settings import Extraction

_EXAMPLES = 5


def find(extraction: Extraction, tables: list[Path], questions: Path, output: Path) -> None:
    """Write one row of `schemas.LEAKS` per question that leaks into a train prompt; counts are in the manifest.

    A question leaks when it equals a user turn of a train prompt. It leaks nearly when it is near to all user turns
    of a train prompt together.

    Args:
        extraction: `near_duplicates`, the similarity from which two texts are near.
        tables: `schemas.NEGATIVES` tables whose train split is trained on.
        questions: the folder made by the stage `questions`.
    Raises:
        D2OError: as `records.read_table`.
    """
    asked = _questions(questions / "questions.parquet")
    prompts = _train_prompts(tables)
    none = pl.DataFrame(schema={"prompt": pl.UInt32, "origin": pl.String})
    # The questions are passed as prompts, and the train prompts as texts asked elsewhere: each question is looked up.
    table = find_leaks(asked, prompts, none, extraction.near_duplicates).table
    leaks = table.filter(pl.col("kind") != "near-duplicate").join(asked, on="prompt").sort("prompt")
    rows = leaks.select("subject", "question", "kind", "similarity", prompt="other").select(schemas.LEAKS.names)
    counts = {"questions": len(asked)}
    counts |= {f"{kind}s".replace(" ", "_"): len(leaks.filter(kind=kind)) for kind in ("leak", "near leak")}
    with records.artifact(output, extraction, [*tables, questions / "manifest.json"]) as draft:
        draft.facts["rows"] = records.write_table(draft.path, schemas.LEAKS, rows.to_dicts())
        examples = leaks.group_by("kind", maintain_order=True).head(_EXAMPLES)
        shown = examples.select("kind", "similarity", question="text", prompt="other")
        draft.facts |= {"counts": counts, "examples": shown.to_dicts()}
    print(", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()), file=sys.stderr)


def _questions(path: Path) -> pl.DataFrame:
    """The questions in the form of the prompts of `find_leaks`: numbered, one turn each."""
    table = pl.DataFrame(records.read_table(path, schemas.QUESTIONS), pl.Schema(schemas.QUESTIONS))
    table = table.with_row_index("prompt").with_columns(text=normalised(pl.col("text"))).filter(pl.col("text") != "")
    return table.with_columns(turns=pl.concat_list(pl.col("text").hash()))


def _train_prompts(tables: list[Path]) -> pl.DataFrame:
    """The user turns of each train prompt in the form of `asked` of `find_leaks`: one row per turn."""
    for path in tables:
        records.check_table(path, schemas.NEGATIVES)
    rows = pl.scan_parquet(tables, glob=False).filter(pl.col("split") == "train").unique("prompt_id")
    read = rows.select("prompt_id", turns=user_turns()).select("prompt_id", *text_and_digests())
    prompts = read.collect(engine="streaming").sort("prompt_id")
    return prompts.select("text", key="turns", origin=pl.lit("train")).explode("key")
