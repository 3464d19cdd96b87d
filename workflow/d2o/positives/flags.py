"""Selects usable samples: the flags of each sample, and the attempt at it that is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from d2o import identities, refusals, texts
from d2o.generation import Completion
from d2o.settings import Positives

# Share of distinct 4-grams of words below which a text is a loop; words below which it is too short to be one.
_LOOP, _LOOP_WORDS = 0.7, 20
# Words in a run of the instruction that, repeated in the answer and not in the prompt, reveals the instruction.
_LEAK_WORDS = 5
_META = ("as asked", "as you asked", "as requested", "as you requested", "as instructed", "as you instructed")


@dataclass(frozen=True)
class Chosen:
    """A sample as the pool stores it: the attempt that is taken, its flags, and whether it is usable."""

    attempt: int
    completion: Completion
    flags: set[str]
    usable: bool


def flags_of(completion: Completion, instruction: str | None, prompt: str) -> set[str]:
    """The flags that an answer has by itself.

    `empty`; `truncated`: cut at the limit of tokens; `repeating`: its n-grams loop;
    `leaking`: it reveals that there was an instruction, which the prompt in training lacks; `refusal`: it declines.

    Args:
        instruction: the text put before the prompt, if there was one.
        prompt: the text of the prompt's last turn.
    """
    text = completion.text
    flags = {
        "empty": not text,
        "truncated": completion.finish == "length",
        "repeating": len(texts.words(text)) >= _LOOP_WORDS and texts.distinct([text], 4) < _LOOP,
        "leaking": instruction is not None and _leaks(text, instruction, prompt),
        "refusal": refusals.refuses(text),
    }
    return {flag for flag, applies in flags.items() if applies}


def _leaks(text: str, instruction: str, prompt: str) -> bool:
    ngrams, asked, given = (set(texts.ngrams(texts.words(part), _LEAK_WORDS)) for part in (text, prompt, instruction))
    return text.lower().startswith(_META) or not ngrams.isdisjoint(given - asked)


def settle(
    positives: Positives, find: Callable[[int, int], tuple[Completion, set[str]] | None]
) -> tuple[dict[int, Chosen], list[tuple[int, int]]]:
    """Take for each sample of a prompt its first usable attempt, or its last one.

    A sample with the same text as one with a lower number is a `duplicate`. Nothing depends on samples with higher
    numbers, so that a pool of K is the beginning of every larger one.

    Args:
        positives: K, the flags that exclude a sample, and how often it is sampled again.
        find: the answer to (sample, attempt) and its flags by itself; None before it is sampled.
    Returns:
        the samples that are settled, and each (sample, attempt) to sample next; none when all are settled.
    """
    settled: dict[int, Chosen] = {}
    wanted: list[tuple[int, int]] = []
    excluded = {"empty", *positives.exclude}
    settled_texts: set[str] = set()
    for sample in range(positives.k):
        lower_are_settled = len(settled) == sample
        for attempt in range(positives.resamples + 1):
            if (answer := find(sample, attempt)) is None:
                wanted.append((sample, attempt))
                break
            completion, flags = answer
            text = identities.normalised(completion.text)
            flags = flags | ({"duplicate"} if text and text in settled_texts else set())
            if (usable := flags.isdisjoint(excluded)) or attempt == positives.resamples:
                if lower_are_settled:  # otherwise it may still become a duplicate
                    settled[sample] = Chosen(attempt, completion, flags, usable)
                    settled_texts.add(text)
                break
    return settled, wanted
