"""One shard of a pool: sample its missing answers until each sample is settled."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

from d2o import chat, generation, model_folders, records, schemas
from d2o.errors import D2OError
from d2o.generation import Completion, Request
from d2o.positives.flags import Chosen, flags_of, settle
from d2o.positives.requests import Attempt, identity, instructed, planned, shard_of
from d2o.positives.sampled import Sampled
from d2o.settings import Positives, PositivesStage

# Tokens that are left in the context, up to which a prompt is measured with every instruction.
_NEAR = 16


def sample(stage: PositivesStage, model: Path, prompts: Path, shard: str, sampled: Path, output: Path) -> None:
    """Write the samples of one shard: rows of `schemas.POOL`, sorted by prompt and sample.

    All missing answers are one call of the engine, and so are all that have to be sampled again. Prompts that do not
    fit the context with every instruction are left out, counted and listed in the manifest.

    Args:
        prompts: a `schemas.NEGATIVES` table; its train prompts are answered.
        shard: `1-of-3`.
        sampled: folder of the answers sampled so far, of all shards; it grows.
    """
    tokenizer = chat.load_tokenizer(model)
    asked, long = _fitting(stage.sampling, tokenizer, _messages(prompts, shard))
    if long:
        print(f"positives: {len(long)} prompts are longer than the model's context, left out", file=sys.stderr)
    source = f"{model_folders.digest(model)} {stage.engine.backend}"
    # Each shard has its own file: a shard of another pool may be written at the same time.
    with Sampled(sampled, f"{output.parent.stem}-{shard}", asked) as known:
        prompted = [_Samples(stage.sampling, *item, known, source) for item in sorted(asked.items())]
        unsettled, generator = prompted, None
        while unsettled := [samples for samples in unsettled if not samples.settle()]:
            generator = generator or generation.start(model, stage.engine)
            wanted = [(samples, attempt) for samples in unsettled for attempt in samples.wanted]
            requests = [
                Request(array("i", chat.encode_prompt(tokenizer, s.asked(attempt))), attempt.seed)
                for s, attempt in wanted
            ]
            for index, completion in generation.complete(generator, requests, stage.sampling, f"positives {shard}"):
                samples, attempt = wanted[index]
                samples.add(attempt, completion)
    with records.artifact(output, stage, [model / "manifest.json", prompts]) as draft:
        rows = (row for samples in prompted for row in samples.rows())
        draft.facts["rows"] = records.write_table(draft.path, schemas.POOL, rows)
        draft.facts["long_prompts"] = sorted(long)


def _messages(prompts: Path, shard: str) -> dict[str, chat.Messages]:
    number, _, shards = shard.partition("-of-")
    if not (number.isdigit() and shards.isdigit() and 1 <= int(number) <= int(shards)):
        raise D2OError(f"--shard: {shard!r} is not of the form 1-of-3")
    return {
        row["prompt_id"]: row["messages"]
        for batch in records.read_batches(prompts, schemas.NEGATIVES)
        for row in batch
        if row["split"] == "train" and shard_of(row["prompt_id"], int(shards)) == int(number) - 1
    }


def _fitting(
    positives: Positives, tokenizer, messages: dict[str, chat.Messages]
) -> tuple[dict[str, chat.Messages], set[str]]:
    """The prompts that leave room for an answer whatever the instruction, and the ids of those that do not."""
    instructions = list(positives.instructions.values()) or [None]

    def room(plain: chat.Messages, text: str | None) -> int:
        return tokenizer.model_max_length - len(chat.encode_prompt(tokenizer, instructed(plain, text)))

    longest = min(instructions, key=lambda text: room([{"role": "user", "content": ""}], text))
    # Where two texts meet, tokens may merge: near the limit every instruction is tried.
    long = {
        prompt
        for prompt, plain in messages.items()
        if room(plain, longest) <= _NEAR and any(room(plain, text) <= 0 for text in instructions)
    }
    return {prompt: plain for prompt, plain in messages.items() if prompt not in long}, long


class _Samples:
    """The samples of one prompt: what is settled, and the attempts that are `wanted` next."""

    def __init__(self, positives: Positives, prompt: str, messages: chat.Messages, known: Sampled, source: str):
        self._positives, self._prompt, self._messages = positives, prompt, messages
        self._known, self._source = known, source
        self._settled: dict[int, Chosen] = {}
        self.wanted: list[Attempt] = []

    def settle(self) -> bool:
        """Settle samples with the answers known so far; return whether all are settled."""
        self._settled, wanted = settle(self._positives, self._find)
        self.wanted = [self._planned(*pair) for pair in wanted]
        return not wanted

    def asked(self, attempt: Attempt) -> list[dict[str, str]]:
        """The messages that the model gets in an attempt."""
        return instructed(self._messages, attempt.text)

    def add(self, attempt: Attempt, completion: Completion) -> None:
        """Keep an answer."""
        self._known.add(self._identity(attempt), self._prompt, completion)

    def rows(self) -> Iterator[dict]:
        """The settled samples, as rows of `schemas.POOL`."""
        for sample, chosen in self._settled.items():
            attempt = self._planned(sample, chosen.attempt)
            yield {
                "prompt_id": self._prompt,
                "sample": sample,
                "attempt": attempt.number,
                "instruction": attempt.instruction,
                "seed": attempt.seed,
                **vars(chosen.completion),
                "flags": sorted(chosen.flags),
                "usable": chosen.usable,
            }

    def _planned(self, sample: int, attempt: int) -> Attempt:
        return planned(self._positives, self._prompt, sample, attempt)

    def _identity(self, attempt: Attempt) -> str:
        return identity(self._source, self.asked(attempt), attempt.seed, self._positives)

    def _find(self, sample: int, attempt: int) -> tuple[Completion, set[str]] | None:
        attempt = self._planned(sample, attempt)
        completion = self._known.get(self._identity(attempt))
        if completion is None:
            return None
        return completion, flags_of(completion, attempt.text, self._messages[-1]["content"])
