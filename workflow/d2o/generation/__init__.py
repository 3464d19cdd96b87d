"""Text generation: token ids in, texts out as they finish, a seed for every request; two engines, one interface."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from d2o.errors import D2OError
from d2o.settings import Engine, Sampling


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, fewer than the model's context, and the seed that its answer is sampled with."""

    ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One generated answer: its text, its length in tokens, and why it ended, `stop` or `length`."""

    text: str
    tokens: int
    finish: str


class Generator(Protocol):
    """A model that is ready to answer."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Answer all requests; yields a request's place among them and its answer, in the order they finish."""
        ...


def start(folder: Path, engine: Engine) -> Generator:
    """Load a model folder into an engine.

    Raises:
        D2OError: where the backend is not installed.
    """
    if engine.backend == "transformers":
        from d2o.generation.with_transformers import Transformers

        return Transformers(folder, engine)
    # vLLM reads these when it is imported and when its engine starts; a value that the user has set stays.
    for key, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(key, value)
    try:
        from d2o.generation.with_vllm import VLLM
    except ImportError as error:
        raise D2OError(
            f"engine.backend: vLLM cannot be loaded here ({error}); install it from envs/, or set "
            f"`engine: {{backend: transformers}}`, which is slower"
        ) from None
    return VLLM(folder, engine)


def complete(
    generator: Generator, requests: Sequence[Request], sampling: Sampling, description: str
) -> Iterator[tuple[int, Completion]]:
    """As `Generator.generate`, with progress, rate and time left on stderr."""
    from tqdm import tqdm

    with tqdm(total=len(requests), desc=description, unit=" answers", mininterval=2) as progress:
        tokens = 0
        for index, completion in generator.generate(requests, sampling):
            tokens += completion.tokens
            elapsed = progress.format_dict["elapsed"]
            progress.set_postfix_str(f"{tokens / max(elapsed, 1e-9):.0f} tokens/s", refresh=False)
            progress.update()
            yield index, completion
