"""CPU seconds of each stage from its command to its first work, compared with plain processes with the same model.

How it measures. A stage is started as Snakemake starts it, on one row, and its work begins when its own progress bar
shows 0 %: then the process's CPU time (user and system, all threads) is read from /proc, and the process is killed.
So imports, tables, tokenizer, weights, engine and self-checks count; the first forward pass or optimizer step does
not. Each stage is compared with two processes, read when they have loaded the model's weights:

- `torch`: imports torch and reads the weights with safetensors, nothing else;
- `libraries`: imports the libraries of the stage's engine (transformers, DeepSpeed, vLLM or lm-evaluation-harness)
  and loads the model with them, without our code.

So `over_torch` shows how long a user waits, and `over_libraries` our part of it. All run on one thread, because
waiting threads count as CPU time, and in random order. A ratio is taken within a round; its median, lowest and
highest over the rounds are reported.

The model is SmolLM2-135M from its package in bf16, or any model folder. Writes startup.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import packages_distributions, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForSequenceClassification

from d2o import chat, identities, models, questions, records, schemas
from d2o.settings import Model, Questions
from generate import SMOLLM2_135M
from timing import spread

ROOT = Path(__file__).parent.parent
ROUNDS = 5
# Required upper limit of a stage's CPU seconds over those of `torch`.
LIMIT = 2.5
READY = "print('ready', file=sys.stderr, flush=True)"
TORCH = "import sys, torch, safetensors.torch as st; held = st.load_file(sys.argv[1] + '/model.safetensors')"
CAUSAL = "import sys; from transformers import AutoModelForCausalLM as M; held = M.from_pretrained(sys.argv[1])"
LIBRARIES = {
    "logprobs": CAUSAL,
    "train": f"import deepspeed; {CAUSAL}",
    "scores": CAUSAL.replace("CausalLM", "SequenceClassification"),
    "responses": "import sys; from vllm import LLM; held = LLM(sys.argv[1], enforce_eager=True, max_model_len=512)",
    "tasks": "import sys; from lm_eval.models.huggingface import HFLM; held = HFLM(sys.argv[1], device='cpu')",
}
# What each stage prints when its work begins.
BARS = {
    "logprobs": "log-probs of train responses: +0%",
    "train": "simpo: +0%",
    "scores": "scoring answers: +0%",
    "responses": "responses: +0%",
    "tasks": "Running loglikelihood requests: +0%",
}
VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where startup.json goes")
    parser.add_argument("--model", type=Path, help="model folder in place of SmolLM2-135M")
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.model, 1 if options.quick else ROUNDS)
    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    draft = options.folder / ".startup.json.tmp"
    draft.write_text(text)
    draft.replace(options.folder / "startup.json")
    print(text)


def measure(folder: Path, model: Path | None, rounds: int) -> dict:
    """All figures."""
    source = Model(path=str(model.resolve()), context=512) if model else SMOLLM2_135M
    models.fetch(source, None, folder / "model")
    commands = _commands(folder, folder / "model")
    seconds: list[dict[str, float]] = []
    for turn in range(rounds):
        names = sorted(commands)
        random.Random(turn).shuffle(names)
        seconds.append({})
        for name in names:
            seconds[-1][name] = cpu_seconds(*commands[name])
            print(f"round {turn}: {name}, {seconds[-1][name]:.1f} s", file=sys.stderr, flush=True)
    return {
        "stages": {stage: _figures(stage, seconds) for stage in BARS},
        "torch_cpu_seconds": spread(one["torch"] for one in seconds),
        "limit_over_torch": LIMIT,
        "rounds": rounds,
        "versions": {
            name: version(packages_distributions()[name][0])
            for name in ("torch", "transformers", "deepspeed", "vllm", "lm_eval")
        },
        "date": date.today().isoformat(),
    }


def _figures(stage: str, rounds: Sequence[Mapping[str, float]]) -> dict:
    return {
        "cpu_seconds": spread(one[stage] for one in rounds),
        "libraries_cpu_seconds": spread(one[f"{stage}: libraries"] for one in rounds),
        "over_torch": spread(one[stage] / one["torch"] for one in rounds),
        "over_libraries": spread(one[stage] / one[f"{stage}: libraries"] for one in rounds),
    }


def cpu_seconds(command: Sequence[str], sign: str) -> float:
    """CPU seconds of a command until its stderr matches the pattern `sign`; then the process is killed.

    Raises:
        RuntimeError: where the command ends before that.
    """
    environment = os.environ | VLLM | {"OMP_NUM_THREADS": "1"}
    printed = b""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not re.search(sign.encode(), printed):
            more = os.read(process.stderr.fileno(), 1 << 16)
            if not more:
                raise RuntimeError(f"{' '.join(command)}: ended before {sign!r}:\n{printed.decode()[-3000:]}")
            printed += more
        # Fields 14 to 17 of proc(5): user and system ticks, its own and those of children that it waited for.
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        process.kill()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# What the stages read --------------------------------------------------------------------------------


def _commands(folder: Path, model: Path) -> dict[str, tuple[list[str], str]]:
    """Each command, and the pattern in its stderr that shows that its work begins."""
    asked = [{"role": "user", "content": "Where can I return a toaster?"}]
    prompt = {"prompt_id": identities.prompt_id(asked), "messages": asked}
    human = dict.fromkeys(schemas.NEGATIVES.names) | prompt
    human |= {"split": "train", "negative": "No.", "positive": "At the desk.", "positive_unsafe": False}
    sample = {"prompt_id": prompt["prompt_id"], "sample": 0, "seed": 0, "text": "At the desk.", "finish": "stop"}
    tables = {
        "negatives": (schemas.NEGATIVES, human),
        "prompts": (schemas.PROMPTS, prompt | {"origin": "test"}),
        "samples": (schemas.SAMPLES, sample | {"instruction": None, "tokens": 4}),
    }
    path = {name: folder / f"{name}.parquet" for name in tables}
    for name, (schema, row) in tables.items():
        records.write_table(path[name], schema, [row])
    questions.fetch(Questions(path=str(ROOT / "demo" / "mmlu"), limit=1), folder / "questions")
    _reward(model, folder / "reward")

    data = ["--model", model, "--negatives", path["negatives"]]
    method = {"loss": "simpo", "positives": "human", "negatives": True}
    answers = ["--prompts", path["prompts"], "--responses", path["samples"], "--reward", folder / "reward"]
    stages = {
        "logprobs": ({}, data),
        "train": ({"method": method}, [*data, "--checkpoints", folder / "checkpoints"]),
        "scores": ({"source": {"path": "reward"}}, answers),
        "responses": (
            {},
            ["--model", model, "--prompts", path["prompts"], "--execution", '{"engine": {"eager": true}}'],
        ),
        "tasks": ({"path": "mmlu"}, ["--model", model, "--questions", folder / "questions" / "manifest.json"]),
    }
    commands = {"torch": (_python(TORCH, model), "ready")}
    for stage, (settings, arguments) in stages.items():
        output = folder / "made" / stage / "manifest.json"
        command = [sys.executable, "-m", "d2o", stage, "--settings", json.dumps(settings), "--output", output]
        commands[stage] = ([str(part) for part in [*command, *arguments]], BARS[stage])
        weights = folder / "reward" if stage == "scores" else model
        commands[f"{stage}: libraries"] = (_python(LIBRARIES[stage], weights), "ready")
    return commands


def _python(code: str, model: Path) -> list[str]:
    return [sys.executable, "-c", f"{code}; {READY}", str(model)]


def _reward(model: Path, folder: Path) -> None:
    """Write a reward model: the model with a random head."""
    lm = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.bfloat16)
    lm.save_pretrained(folder)
    chat.load_tokenizer(model).save_pretrained(folder)
    (folder / "manifest.json").write_text("{}")


if __name__ == "__main__":
    main()
