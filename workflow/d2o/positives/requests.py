"""The sampling plan: the request to the model for sample k of a prompt, and the identity of that request."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

from d2o import chat, identities
from d2o.settings import Positives, Sampling


@dataclass(frozen=True)
class Attempt:
    """One attempt at one sample: its seed, and name and text of its instruction (None for the plain prompt)."""

    sample: int
    number: int
    seed: int
    instruction: str | None
    text: str | None


def planned(positives: Positives, prompt: str, sample: int, attempt: int = 0) -> Attempt:
    """The attempt's seed and instruction. They depend on nothing else, so a pool is a prefix of every larger one."""
    seed = identities.derived_seed(positives.seed, prompt, sample, *([attempt] if attempt else []))
    names = sorted(positives.instructions)
    name = random.Random(seed).choice(names) if names else None
    return Attempt(sample, attempt, seed, name, positives.instructions.get(name))


def instructed(messages: chat.Messages, instruction: str | None) -> list[dict[str, str]]:
    """The prompt with a self-correction instruction before its last turn; unchanged without one.

    The answer is sampled with it; training sees the plain prompt.
    """
    if instruction is None:
        return list(messages)
    last = messages[-1]
    return [*messages[:-1], {"role": last["role"], "content": f"{instruction}\n\n{last['content']}"}]


def identity(source: str, asked: chat.Messages, seed: int, sampling: Sampling) -> str:
    """Digest of all that an answer is sampled from: the same for the same source, text, seed and parameters.

    Args:
        source: the digest of the model that answers, and the library that runs it.
        asked: the prompt with its instruction.
    """
    parameters = [sampling.temperature, sampling.top_p, sampling.max_tokens]
    parts = json.dumps([source, [[m["role"], m["content"]] for m in asked], seed, parameters])
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def shard_of(prompt: str, shards: int) -> int:
    """The shard, from 0, that a prompt is sampled in; it depends on no other prompt."""
    return int(prompt, 16) % shards
