"""Seconds that a reward model takes to score the answers to some prompts: with a shared prompt, and in padded rows.

The model is a sequence classifier of SmolLM2-135M's shape with random weights; prompts and answers are random tokens
with lengths from `workload.LENGTHS`. Three ways score the same answers, one after the other in random order. A ratio
is taken within a round; its median, lowest and highest over the rounds are reported.

- `ours`: what the stage `scores` does, its check against padded rows included;
- `padded`: one batch per prompt, padded to its longest answer: a plain loop over prompts;
- `sorted`: padded rows of similar length, whatever their prompts: what the stage does for other models.

Writes score.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaForSequenceClassification

from d2o import reward_inputs
from timing import spread
from workload import LENGTHS, PRECISIONS, SMOLLM2, Shape

TOKENS = 16384
# Largest difference between two ways' scores that counts as rounding; the answers' scores differ by about 1.
ROUNDING = {"bf16": 0.1, "fp32": 1e-3}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where score.json goes")
    parser.add_argument("--prompts", type=int, default=4, help="how many")
    parser.add_argument("--answers", type=int, default=12, help="to each")
    parser.add_argument("--rounds", type=int, default=3, help="how often all ways score all answers")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the weights")
    parser.add_argument("--layers", type=int, default=SMOLLM2.layers, help="fewer of them for a trial")
    options = parser.parse_args()
    shape = Shape(layers=options.layers)
    model = classifier(shape, options.precision)
    result = {
        "model": f"Llama classifier of random weights, {shape.layers} layers of {shape.hidden}, {options.precision}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "date": date.today().isoformat(),
        "lengths": {
            name: measure(model, name, options.prompts, options.answers, options.rounds, ROUNDING[options.precision])
            for name in LENGTHS
        },
    }
    text = json.dumps(result, indent=2)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "score.json").write_text(text + "\n")
    print(text)


def classifier(shape: Shape, precision: str) -> LlamaForSequenceClassification:
    """A classifier of a shape with one output, the same random weights each time."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification(shape.config(num_labels=1)).to(PRECISIONS[precision]).eval()


def measure(model, lengths: str, prompts: int, answers: int, rounds: int, rounding: float) -> dict:
    """Our seconds on answers of some lengths, and the seconds of each other way over ours.

    Raises:
        RuntimeError: where two ways give different scores.
    """
    groups = [LENGTHS[lengths].sample(answers, SMOLLM2.vocabulary, lengths, n) for n in range(prompts)]
    inputs = [{"input_ids": [*group.prompt, *one.ids]} for group in groups for one in group.positives]
    owners = [n for n in range(prompts) for _ in range(answers)]

    def ours() -> list[float]:
        return reward_inputs.score_all(model, inputs, owners, TOKENS, "ours")

    @torch.inference_mode()
    def padded() -> list[float]:
        starts = range(0, len(inputs), answers)
        return [s for at in starts for s in reward_inputs.forward(model, inputs[at : at + answers]).tolist()]

    def in_order() -> list[float]:
        return reward_inputs.score_all(model, inputs, range(len(inputs)), TOKENS, "sorted")

    ways = {"ours": ours, "padded": padded, "sorted": in_order}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        scores = {}
        for name in random.Random(turn).sample(list(ways), len(ways)):
            start = time.perf_counter()
            scores[name] = torch.tensor(ways[name]())
            taken[name].append(time.perf_counter() - start)
        worst = max(float((scores[name] - scores["ours"]).abs().max()) for name in ways)
        if not worst <= rounding:
            raise RuntimeError(f"{lengths}: two ways differ by {worst:.3g} in a score")
    return {
        "answers": len(inputs),
        "largest_difference": worst,
        "our_seconds": spread(taken["ours"]),
    } | {
        f"{name}_over_ours": spread(b / a for a, b in zip(taken["ours"], taken[name], strict=True))
        for name in ("padded", "sorted")
    }


if __name__ == "__main__":
    main()
