"""Shared fixtures: a tiny randomly initialised Llama with a real tokenizer and chat template."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A busy machine is no failure. CI tries the same examples each time; elsewhere new ones are generated.
hypothesis.settings.register_profile("d2o", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("d2o")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Modules that take minutes, the longest first: begun last, one would run alone at the end.
_LONG = ["pipeline", "train", "faults", "demo", "benchmarks", "slurm", "controls", "kubernetes", "tasks", "check"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort modules into the order in which workers begin them."""
    names = [f"test_{name}" for name in _LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def policy_of(script: str, style: str) -> str:
    """The Content-Security-Policy that lets a page's own script and style sheet work, and nothing load."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    own = "script-src 'sha256-{}'; style-src 'sha256-{}'".format(*digests)
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def make_tiny_model(folder: Path, *, tie: bool = True, seed: int = 0) -> Path:
    """A Llama of about 0.4 M random weights, 2 layers, 512 tokens of vocabulary learnt from written answers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in (ROOT / "tests" / "data" / "thumbs-down.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([row["response"] for row in rows], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    fast.chat_template = CHATML
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def overwritten(path: Path, text: str) -> Iterator[None]:
    """Write `text` to a file; afterwards, also on errors, restore the file, or remove it if it did not exist."""
    before = path.read_text() if path.exists() else None
    path.write_text(text)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_text(before)


def edited(path: Path, old: str, new: str) -> AbstractContextManager[None]:
    """Replace the first `old` in a file by `new`; afterwards restore the file."""
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    return overwritten(path, text.replace(old, new, 1))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium, Debian's package, as Playwright drives it (`playwright.sync_api.Browser`).

    Until it ends, Playwright's event loop runs in this thread and no other loop can: so its scope is a module.
    """
    wanted = os.environ.get("D2O_TEST_CHROMIUM") == "1"
    if wanted and shutil.which("chromium") is None:
        if os.geteuid() != 0:
            pytest.fail("D2O_TEST_CHROMIUM is 1, and installing Chromium needs root")
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=True)
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium; with D2O_TEST_CHROMIUM=1 this test installs it, as root")
    if not wanted:
        pytest.importorskip("playwright", reason="playwright is not installed: make env")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield started
        started.close()
