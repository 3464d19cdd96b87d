"""Generation with transformers, where vLLM has no wheel: batches of prompts of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from d2o import chat, devices, dtypes, model_folders
from d2o.generation import Completion, Request
from d2o.settings import Engine, Sampling


class Transformers:
    """As `generation.Generator`."""

    def __init__(self, folder: Path, engine: Engine):
        self._batch = engine.max_num_seqs
        self._tokenizer = chat.load_tokenizer(folder)
        self._device = torch.device(devices.device())
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtypes.checkpoint_dtype(), trust_remote_code=model_folders.trusts_code(folder)
        ).to(self._device)
        own = self._model.generation_config.eos_token_id
        ends = {chat.end_of_turn(self._tokenizer), self._tokenizer.eos_token_id}
        self._ends = (ends | set(own if isinstance(own, list) else [own])) - {None}
        # The checkpoint's own sampling parameters are not used: the settings alone decide.
        self._model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._ends), pad_token_id=self._tokenizer.eos_token_id
        )

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].ids), reverse=True)
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            yield from zip(places, self._answer([requests[place] for place in places], sampling), strict=True)

    def _answer(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        context = self._tokenizer.model_max_length
        limits = [min(sampling.max_tokens, context - len(request.ids)) for request in requests]
        width = max(len(request.ids) for request in requests)
        ids = torch.full((len(requests), width), self._tokenizer.eos_token_id)
        seen = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.ids) :] = torch.tensor(request.ids)
            seen[row, width - len(request.ids) :] = 1
        sampled = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=seen.to(self._device),
            max_new_tokens=max(limits),
            do_sample=False,
            logits_processor=_sampler(sampling, [request.seed for request in requests]),
        )
        return [self._completion(row[:limit]) for row, limit in zip(sampled[:, width:].tolist(), limits, strict=True)]

    def _completion(self, ids: list[int]) -> Completion:
        end = next((place + 1 for place, token in enumerate(ids) if token in self._ends), None)
        text = self._tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        return Completion(text, end or len(ids), "stop" if end else "length")


def _sampler(sampling: Sampling, seeds: Sequence[int]) -> LogitsProcessorList:
    """Processors that turn greedy search into sampling with a seed for every row; none for greedy decoding."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    processors = [
        TemperatureLogitsWarper(float(sampling.temperature)),
        TopPLogitsWarper(sampling.top_p),
        _Gumbel(seeds),
    ]
    return LogitsProcessorList(processors)


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise, each row's from its own seed: the largest sum is a sample from the softmax.

    transformers' own sampling has one seed for a whole batch, so that an answer would depend on its neighbours.
    """

    def __init__(self, seeds: Sequence[int]):
        self._sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self._sources])
        return scores.float() - noise.log().to(scores.device)
