"""The data sheet of a pool: what a reader wants to know of generated data before training on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from d2o import records, texts
from d2o.settings import Positives

# Prompts on whose samples distinct-n and self-BLEU are computed, and samples shown. A prompt's id is a digest: the
# first ones in its order are a random choice.
_PROMPTS, _EXAMPLES = 200, 10


def describe(pool: Path, prompts: Path, positives: Positives) -> dict[str, Any]:
    """Counts, lengths in tokens, diversity, reasons, instructions, and random examples.

    Diversity: distinct-n over all samples of up to 200 prompts (Li et al., 1510.03055), and self-BLEU, the mean BLEU
    of a sample against the other samples of its prompt (Zhu et al., 1802.01886; by sacrebleu, 0 to 100): the higher,
    the more alike.

    Args:
        prompts: the `records.COMPARISONS` table that the pool answers.
    """
    reasons: Counter[str] = Counter()
    tokens: dict[str, list[int]] = defaultdict(list)
    cut: Counter[str] = Counter()
    some: dict[str, list[str]] = defaultdict(list)
    examples: list[dict[str, Any]] = []
    fit = redrawn = seen = 0
    last = None
    for batch in records.read_batches(pool, records.POOL):
        for row in batch:
            instruction = row["instruction"] or "plain prompt"
            tokens[instruction].append(row["tokens"])
            cut[instruction] += row["finish"] == "length"
            reasons.update(row["reasons"])
            redrawn += row["attempt"] > 0
            fit += row["fit"]
            seen += row["prompt_id"] != last
            last = row["prompt_id"]
            if seen <= _PROMPTS:
                some[last].append(row["text"])
            if row["sample"] == seen % positives.k and len(examples) < _EXAMPLES:
                examples.append({key: row[key] for key in ("prompt_id", "sample", "instruction", "text", "reasons")})
    asked = _last_turns(prompts, {example["prompt_id"] for example in examples})
    pooled = [text for group in some.values() for text in group]
    return {
        "prompts": seen,
        "k": positives.k,
        "samples": sum(map(len, tokens.values())),
        "fit": fit,
        "redrawn": redrawn,
        "reasons": dict(sorted(reasons.items())),
        "instructions": {
            name: {"samples": len(found), "cut": cut[name]} | _spread(found) for name, found in sorted(tokens.items())
        },
        "tokens": dict(sorted(Counter(length for found in tokens.values() for length in found).items())),
        "distinct": {n: texts.distinct(pooled, n) for n in (1, 2, 3)},
        "self_bleu": _self_bleu(some.values()),
        "examples": [{"prompt": asked[example["prompt_id"]]} | example for example in examples],
    }


def _last_turns(prompts: Path, wanted: set[str]) -> dict[str, str]:
    return {
        row["prompt_id"]: row["messages"][-1]["content"]
        for batch in records.read_batches(prompts, records.COMPARISONS)
        for row in batch
        if row["prompt_id"] in wanted
    }


def _spread(lengths: list[int]) -> dict[str, float]:
    low, quarter, half, three, high = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return {"mean": float(np.mean(lengths)), "min": low, "25 %": quarter, "median": half, "75 %": three, "max": high}


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
