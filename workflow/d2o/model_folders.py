"""A Hugging Face model folder: whether it is whole, what it answers with, and whether its code may run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from d2o.errors import D2OError
from d2o.records import read_manifest


def check(folder: Path) -> None:
    """Check that a model folder has a configuration, a tokenizer and a chat template, without loading any.

    Raises:
        D2OError: naming what is missing and the way out.
    """
    if not (folder / "config.json").exists():
        raise D2OError(f"{folder}: no config.json; is it a Hugging Face model folder?")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise D2OError(f"{folder}: no tokenizer; save one there with tokenizer.save_pretrained")
    config = folder / "tokenizer_config.json"
    if not (folder / "chat_template.jinja").exists() and not (
        config.exists() and '"chat_template"' in config.read_text()
    ):
        raise D2OError(f"{folder}: the tokenizer has no chat template; name one: `chat_template: alpaca`")


def trusts_code(model: str | os.PathLike) -> bool:
    """Whether a model folder's own Python code may be run: as its config entry said when it was fetched."""
    path = Path(model) / "manifest.json"
    return path.exists() and json.loads(path.read_text()).get("trust_remote_code", False)


def digest(folder: Path) -> str:
    """Digest of what a model folder answers with: weights, tokenizer and template, whenever it was made."""
    hasher = hashlib.sha256(json.dumps(read_manifest(folder).get("weights"), sort_keys=True).encode())
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).exists():
            hasher.update((folder / name).read_bytes())
    return hasher.hexdigest()
