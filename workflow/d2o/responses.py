"""Stage `responses`: a model's answers to the test and evaluation prompts, the ones that are judged."""

from __future__ import annotations

import sys
from pathlib import Path

from d2o import chat, generation, identities, records, schemas
from d2o.generation import Request
from d2o.settings import ResponsesStage


def answer(stage: ResponsesStage, model: Path, prompts: Path, output: Path) -> None:
    """Write one row of `schemas.SAMPLES` per prompt of `schemas.PROMPTS`.

    Prompts that do not fit the context are left out and counted.
    """
    tokenizer = chat.load_tokenizer(model)
    asked = [
        (row["prompt_id"], ids, identities.derived_seed(stage.seed, row["prompt_id"]))
        for row in records.read_table(prompts, schemas.PROMPTS)
        if len(ids := chat.encode_prompt(tokenizer, row["messages"])) < tokenizer.model_max_length
    ]
    with records.artifact(output, stage, [model / "manifest.json", prompts]) as draft:
        requests = [Request(ids, seed) for _, ids, seed in asked]
        generator = generation.start(model, stage.engine)
        done = dict(generation.complete(generator, requests, stage.sampling, "responses"))
        rows = [
            {"prompt_id": prompt, "sample": 0, "instruction": None, "seed": seed, **vars(done[index])}
            for index, (prompt, _, seed) in enumerate(asked)
        ]
        draft.facts["rows"] = records.write_table(draft.path, schemas.SAMPLES, rows)
        draft.facts["cut"] = sum(row["finish"] == "length" for row in rows)
    print(f"responses: {len(rows)} answers in {output}", file=sys.stderr)
