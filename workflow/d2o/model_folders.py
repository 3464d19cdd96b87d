"""A Hugging Face model folder: whether it is complete, the digest of its files, and whether its code may run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from d2o import records
from d2o.errors import D2OError
from d2o.texts import line


def check(folder: Path) -> None:
    """Check that a model folder has a configuration, a tokenizer and a chat template, without loading weights.

    Raises:
        D2OError: naming what is missing or damaged, and the way out.
    """
    configuration(folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise D2OError(f"{folder}: no tokenizer; save one there with tokenizer.save_pretrained")
    config = folder / "tokenizer_config.json"
    options = read_object(config) if config.exists() else {}
    if not (folder / "chat_template.jinja").exists() and "chat_template" not in options:
        raise D2OError(f"{folder}: the tokenizer has no chat template; name one: `chat_template: alpaca`")


def configuration(folder: Path) -> dict[str, Any]:
    """The content of a model's config.json.

    Raises:
        D2OError: where there is none, or a damaged one.
    """
    path = folder / "config.json"
    if not path.exists():
        raise D2OError(f"{folder}: no config.json; is it a Hugging Face model folder?")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        D2OError: where it does not.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise D2OError(f"{path}: not JSON ({line(error)}); fetch the model again") from None
    if not isinstance(content, dict):
        raise D2OError(f"{path}: not an object of JSON; fetch the model again")
    return content


def check_source(folder: Path) -> None:
    """Check that the files of a model, before they are linked, can be read: its JSON, and the headers of its weights.

    Raises:
        D2OError: naming the file that cannot.
    """
    from safetensors import SafetensorError, safe_open

    configuration(folder)
    if (options := folder / "tokenizer_config.json").exists():
        read_object(options)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise D2OError(f"{path}: no whole safetensors file ({line(error)}); fetch the model again") from None


def trusts_code(model: str | os.PathLike) -> bool:
    """Whether a model folder's own Python code may be run: as its config entry stated when it was fetched.

    A folder that was not made here may hold a manifest too, which is ignored.
    """
    return records.is_ours(Path(model)) and records.read_manifest(model).get("trust_remote_code") is True


# Weights in other formats than safetensors: some can run code.
_NOT_LINKED = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


def link(source: Path, folder: Path) -> None:
    """Link a model's files, without its mark and manifest, into a folder of ours: a checkpoint of 7B exists once."""
    for file in source.iterdir():
        if file.is_file() and file.name not in records.ABOUT and file.suffix not in _NOT_LINKED:
            (folder / file.name).symlink_to(file.resolve())


def weights(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights, by its name, as it was when the folder was made.

    Raises:
        D2OError: where the folder has no manifest.
    """
    content = records.read_manifest(folder).get("content", {})
    return {name: digest for name, digest in content.items() if "/" not in name and name.endswith(".safetensors")}


def digest(folder: Path) -> str:
    """Digest of the files that determine a model's answers: weights, tokenizer, template; not of when it was made."""
    hasher = hashlib.sha256(json.dumps(weights(folder), sort_keys=True).encode())
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).exists():
            hasher.update((folder / name).read_bytes())
    return hasher.hexdigest()
