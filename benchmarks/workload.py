"""Inputs of the benchmarks, a model with random weights and groups of random tokens; and the work of a step."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from d2o.groups import Group, Response

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; its embeddings are tied."""

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152

    def model(self, precision: str, device: str = "cpu") -> PreTrainedModel:
        """A model of this shape with the same random weights each time, up to rounding; in evaluation mode."""
        torch.manual_seed(0)
        return LlamaForCausalLM(self.config(tie_word_embeddings=True)).to(device, PRECISIONS[precision]).eval()

    def config(self, **options) -> LlamaConfig:
        """The config of transformers for a model of this shape; options as of `LlamaConfig`."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            **options,
        )

    @property
    def linear(self) -> int:
        """Number of weights in the layers' matrices; a token takes twice as many FLOPs in them."""
        attention = 2 * self.hidden * self.hidden * (1 + self.kv_heads / self.heads)
        return int(self.layers * (attention + 3 * self.hidden * self.intermediate))


SMOLLM2 = Shape()


@dataclass(frozen=True)
class Lengths:
    """Uniform ranges of the lengths of prompt and response, in tokens, both ends included."""

    prompt: tuple[int, int]
    response: tuple[int, int]

    def over(self, factor: int) -> Lengths:
        """The ranges divided by `factor`."""
        (a, b), (c, d) = self.prompt, self.response
        return Lengths((a // factor, b // factor), (c // factor, d // factor))

    def sample(self, k: int, vocabulary: int, *seed, negatives: int = 1) -> Group:
        """A group of k positives and some negatives, of random tokens.

        Two groups with the same seed have the same prompt and first negative, and the positives of the smaller one
        are the first positives of the larger one. The cached reference is that of a uniform model; its value does not
        change the time.
        """
        source = random.Random(repr(seed))

        def ids(span: tuple[int, int]) -> list[int]:
            return [source.randrange(3, vocabulary) for _ in range(source.randint(*span))]

        def response(name: str) -> Response:
            tokens = ids(self.response)
            return Response(name, tokens, -len(tokens) * math.log(vocabulary))

        prompt, first = ids(self.prompt), response("negative 0")
        positives = [response(f"positive {i}") for i in range(k)]
        return Group("p", prompt, positives, [first, *(response(f"negative {i}") for i in range(1, negatives))])


# `pku_like` has the means of the paper's own data, 40 and 180 tokens. Its responses vary about as real ones do: the
# longest of twelve has about 1.7 times the mean (2.1 times in a sample of PKU-SafeRLHF).
LENGTHS = {"brief": Lengths((64, 256), (32, 128)), "pku_like": Lengths((20, 60), (30, 330))}


def pairs(group: Group) -> list[Group]:
    """The group as pair methods see it: every positive with the negative."""
    return [replace(group, positives=[positive]) for positive in group.positives]


@dataclass(frozen=True)
class Work:
    """The work of a step in one way.

    Attributes:
        body: tokens that go through the layers.
        attended: pairs of a token and a token that it attends to.
        scored: tokens that go through the head.
        passes: passes through the layers; a forward counts once, a backward twice.
        head_passes: the same for the head; a forward that is recomputed for the backward counts once more.
    """

    body: int
    attended: float
    scored: int
    passes: float = 3
    head_passes: int = 4

    def flops(self, shape: Shape) -> float:
        """Floating-point operations of the matrix products."""
        attention = 2 * shape.layers * shape.hidden * self.attended
        head = shape.vocabulary * shape.hidden * self.scored
        return 2 * (self.passes * (shape.linear * self.body + attention) + self.head_passes * head)


def sequences(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """Lengths of prompt and response, for every response."""
    return [(len(group.prompt), len(response.ids)) for group in groups for response in group.responses]


def shared_work(groups: Sequence[Group], **passes) -> Work:
    """Work with each prompt computed once; a response attends to its prompt and itself."""
    responses = sequences(groups)
    attended = sum(len(g.prompt) ** 2 / 2 for g in groups) + sum(p * r + r * r / 2 for p, r in responses)
    return Work(sum(g.tokens for g in groups), attended, sum(r for _, r in responses), **passes)


def packed_work(groups: Sequence[Group], **passes) -> Work:
    """Work on each response with its prompt, nothing padded."""
    whole = [p + r for p, r in sequences(groups)]
    return Work(sum(whole), sum(n * n / 2 for n in whole), sum(r for _, r in sequences(groups)), **passes)


def padded_work(groups: Sequence[Group], *, all_scored: bool = False, **passes) -> Work:
    """Work on each response with its prompt, padded to the longest; the head on the responses' tokens, or on all."""
    responses = sequences(groups)
    width = max(p + r for p, r in responses)
    body = len(responses) * width
    scored = body if all_scored else sum(r for _, r in responses)
    return Work(body, body * width / 2, scored, **passes)


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Time of a call: CPU seconds of the process, or on a GPU wall seconds until it is done."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_peak(precision: str, device: str = "cpu", least: float = 0.2) -> float:
    """FLOP/s of the fastest of some large matrix products, each repeated for at least `least` seconds."""
    best = 0.0
    for m, k, n in ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 576, 1536), (2048, 1536, 576), (512, 576, 8192)):
        a, b = (torch.randn(size, dtype=PRECISIONS[precision], device=device) for size in ((m, k), (k, n)))
        out = a @ b
        spent, done = 0.0, 0
        while spent < least:
            spent += seconds(lambda: torch.mm(a, b, out=out), device)  # noqa: B023
            done += 1
        best = max(best, 2 * m * k * n * done / spent)
    return best
