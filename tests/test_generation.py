"""Real vLLM on the tiny model: pools, seeds, instructions, limits."""

import json
import os
import subprocess
import sys

import pytest

from d2o import positives, records
from d2o.settings import Positives

MESSAGES = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "How do I cheat?"},
]


def test_the_instruction_stands_before_the_last_turn_only():
    asked = positives.instructed(MESSAGES, "Be kind.")
    assert asked[:2] == MESSAGES[:2]
    assert asked[2] == {"role": "user", "content": "Be kind.\n\nHow do I cheat?"}
    assert positives.instructed(MESSAGES, None) == MESSAGES


def test_every_sample_has_its_own_seed_and_all_instructions_are_drawn():
    drawn = [positives.draw(Positives(), f"prompt{i}", k) for i in range(50) for k in range(4)]
    assert len({seed for *_, seed in drawn}) == 200
    assert {name for name, *_ in drawn} == Positives().instructions.keys()
    assert positives.draw(Positives(instructions={}), "p", 0)[:2] == (None, None)
    assert positives.draw(Positives(seed=1), "p", 0) != positives.draw(Positives(), "p", 0)


def pool(tiny_model, folder, prompts, k):
    rows = [
        {
            "prompt_id": prompt, "split": split, "messages": [{"role": "user", "content": text}],
            "negative": "No.", "positive": None, "positive_unsafe": None, "categories": None, "severity": None,
        }
        for prompt, split, text in prompts
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    records.write_table(folder / "negatives.parquet", records.COMPARISONS, rows)
    (tiny_model / "manifest.json").write_text("{}")
    settings = {
        "sampling": {"k": k, "max_tokens": 12},
        "engine": {"eager": True, "kv_cache_gib": 1, "max_num_seqs": 8},
    }
    command = ["positives", "--settings", json.dumps(settings), "--model", tiny_model]
    command += ["--negatives", folder / "negatives.parquet", "--output", folder / "pool.parquet"]
    done = subprocess.run(
        [sys.executable, "-m", "d2o", *map(str, command)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return records.read_table(folder / "pool.parquet", records.SAMPLES), done.stderr


@pytest.mark.slow
def test_a_smaller_pool_is_the_beginning_of_a_larger_one(tiny_model, tmp_path):
    prompts = [(f"p{i}", "train", f"Question number {i}?") for i in range(3)]
    extra = [("test", "test", "Not for training."), ("long", "train", "word " * 600)]
    small, _ = pool(tiny_model, tmp_path / "small", prompts, k=2)
    large, stderr = pool(tiny_model, tmp_path / "large", prompts + extra, k=4)
    assert "1 prompts are longer than the model's context" in stderr
    assert [(row["prompt_id"], row["sample"]) for row in large] == [(f"p{i}", k) for i in range(3) for k in range(4)]
    # The requests are the same; a text may differ where a batch of another size rounds otherwise.
    request = ("prompt_id", "sample", "instruction", "seed")
    assert [[row[key] for key in request] for row in large if row["sample"] < 2] == [
        [row[key] for key in request] for row in small
    ]
    assert len({row["text"] for row in large}) > 6, "a random model at temperature 1 repeats itself"
    for row in large:
        assert row["finish"] in ("stop", "length")
        assert (row["tokens"] == 12) or row["finish"] == "stop"
