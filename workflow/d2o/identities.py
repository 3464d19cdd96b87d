"""Identities of prompts and responses, and seeds derived from identities: the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any


def prompt_id(messages: list[Mapping[str, str]]) -> str:
    """Identity of a prompt: equal for prompts that differ in case or white space only."""
    return _hash("\x1e".join(f"{m['role']}\x1f{normalised(m['content'])}" for m in messages))


def response_id(prompt: str, text: str, finished: bool = True) -> str:
    """Identity of a response to the prompt with the id `prompt`; a cut response differs from a finished one."""
    return _hash(prompt + ("\x1f" if finished else "\x1e") + text)


def normalised(text: str) -> str:
    """`text` in lower case with single spaces, to compare texts."""
    return " ".join(text.lower().split())


def derived_seed(*parts: Any) -> int:
    """A seed of 31 bits that depends on every part, the same on every machine."""
    return int(_hash("\x1f".join(map(str, parts))), 16) % (1 << 31)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
