"""Writes demo/long-answers.jsonl from what was sampled with demo/log.yaml (the command stands there)."""

import json
from pathlib import Path

import pyarrow.parquet as pq

RESULTS = Path("results/questions")
WORDS = 40

if __name__ == "__main__":
    prompts = {row["prompt_id"]: row for row in pq.read_table(RESULTS / "prompts.parquet").to_pylist()}
    answers = pq.read_table(RESULTS / "smollm2/initial/seed0/responses.parquet").to_pylist()
    with Path("demo/long-answers.jsonl").open("w", encoding="utf-8") as file:
        for answer in answers:
            if len(answer["text"].split()) > WORDS and answer["finish"] == "stop":
                prompt = prompts[answer["prompt_id"]]["messages"][-1]["content"]
                file.write(json.dumps({"prompt": prompt, "response": answer["text"]}, ensure_ascii=False) + "\n")
