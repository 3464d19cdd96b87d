"""Dimensions of a model: from its folder where that exists, else by its name; never over the network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder, or of an encoder that scores.

    Attributes:
        layers: how many.
        hidden: h, width of the states.
        inner: I, width inside the MLP.
        queries: heads times their width.
        keys: heads of keys times their width.
        vocabulary: V, tokens.
        gated: whether the MLP has three matrices, as Llama's, or two.
        tied: whether head and embedding are one matrix.
    """

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @property
    def linear(self) -> int:
        """Weights of the linear layers below the head."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        return self.layers * (attention + (3 if self.gated else 2) * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Layers times width of the queries."""
        return self.layers * self.queries

    @property
    def parameters(self) -> int:
        """All weights but those of norms and biases."""
        return self.linear + self.head * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token, in bf16."""
        return 4 * self.layers * self.keys


# Shapes by a part of a repository's name; case is ignored, and the part must not lie within a number (27b, 1.7b,
# 8x7b). The first match counts. Without one the size in the name decides; for a mixture of experts, that of all.
_KNOWN = {
    "smollm2-135m": Shape(30, 576, 1536, 576, 192, 49152, tied=True),
    "phi-3-mini": Shape(32, 3072, 8192, 3072, 3072, 32064),
    "qwen2-1.5b": Shape(28, 1536, 8960, 1536, 256, 151936, tied=True),
    "llama3": Shape(32, 4096, 14336, 4096, 1024, 128256),
    "deberta-v3-large": Shape(24, 1024, 4096, 1024, 1024, 128100, gated=False, tied=True),
    "toxic-bert": Shape(12, 768, 3072, 768, 768, 30522, gated=False, tied=True),
    "7b": Shape(32, 4096, 11008, 4096, 4096, 32000),
    "13b": Shape(40, 5120, 13824, 5120, 5120, 32000),
}
_INSIDE = r"(?<![\d.x])"
_SIZE = re.compile(r"(?<![\d.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z])", re.IGNORECASE)


def of_folder(folder: Path) -> Shape | None:
    """The shape of a model folder by its `config.json`; None where that is missing or of another kind of model."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return of_config(config)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def of_config(config: Mapping[str, Any]) -> Shape:
    """The shape by a `config.json` of transformers; KeyError where a key is missing."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return Shape(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        heads * width,
        (config.get("num_key_value_heads") or heads) * width,
        config["vocab_size"],
        gated=config.get("model_type") not in ("bert", "roberta", "deberta-v2", "gpt_neox"),
        tied=config.get("tie_word_embeddings", False),
    )


def of_name(name: str) -> tuple[Shape, str]:
    """The shape by a repository's or file's name, and the model or size that it was taken for."""
    for known, shape in _KNOWN.items():
        if re.search(_INSIDE + re.escape(known), name.lower()):
            return shape, known
    if size := _SIZE.search(name):
        return _of_size(int(size[1] or 1) * float(size[2]) * {"b": 1e9, "m": 1e6}[size[3].lower()]), size[0]
    return _KNOWN["7b"], "7b, for the name has no size"


def _of_size(parameters: float) -> Shape:
    """A decoder of about `parameters` weights: 12 L h², with h = 128 L."""
    layers = max(2, round((parameters / (12 * 128**2)) ** (1 / 3)))
    hidden = 128 * layers
    return Shape(layers, hidden, 64 * round(hidden * 8 / 3 / 64), hidden, hidden, 32000)
