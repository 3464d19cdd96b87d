"""Who is asked about which pair of answers, and in which order: as even as possible, random by a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from d2o import schemas
from d2o.settings import HumanEvalStage

# The keys of an annotator: answer 1 is better, answer 2 is better, neither.
KEYS = "120"


def design(stage: HumanEvalStage, prompts: Mapping[tuple[str, str], Sequence[str]]) -> list[list[dict[str, Any]]]:
    """The items of each annotator's page, in the order in which they are asked: rows of `schemas.HUMAN_KEY` without
    `version`.

    Every method has the same prompts, shared equally (±1) among its trainings: verdicts are about the method, not
    about one training. The share `overlap` of a method's pairs is on all pages; the others are dealt out, equally
    many (±1) of each method to each annotator. On a page each method is answer 1 as often as answer 2 (±1).
    One prompt with several methods goes to different annotators as far as their number and `overlap` allow: an answer
    that is seen again would be recognised as the initial model's.

    Args:
        prompts: for each data set and model, the ids of the prompts that all methods have answered.
    """
    rng = Random(f"human_eval {stage.pages.seed}")
    pages: list[list[dict[str, Any]]] = [[] for _ in range(stage.pages.annotators)]
    methods = [method for method in stage.seeds if method != "initial"]
    for (dataset, model), known in prompts.items():
        chosen = rng.sample(sorted(known), min(stage.pages.prompts, len(known)))
        for place, method in enumerate(methods):
            shared = round(stage.pages.overlap * len(chosen))
            pairs = _pairs(rng, chosen, stage.seeds[method], shared, place, len(methods))
            pairs = [{"dataset": dataset, "model": model, "method": method} | pair for pair in pairs]
            for annotator, page in enumerate(pages):
                dealt = (pair for n, pair in enumerate(pairs[shared:]) if (n + place) % len(pages) == annotator)
                page += _ordered(rng, [*pairs[:shared], *dealt], first=place + annotator)
    for page in pages:
        rng.shuffle(page)
        asked = {(row["dataset"], row["prompt_id"]) for row in page}
        spare = [
            {"dataset": dataset, "model": model, "prompt_id": prompt, "method": None, "seed": None}
            for (dataset, model), known in prompts.items()
            for prompt in sorted(known)
            if (dataset, prompt) not in asked
        ]
        checks = list(_checks(rng, page, spare, stage.pages.checks if page else 0))
        # One check in each part of the page, wherever it is paused; the last is inserted first, so that places stay.
        ends = [len(page) * number // max(1, len(checks)) for number in range(len(checks) + 1)]
        for check, start, end in reversed([*zip(checks, ends[:-1], ends[1:], strict=True)]):
            page.insert(rng.randint(start, end), check)
    return [
        [{"annotator": number, "item": item} | row for item, row in enumerate(page, 1)]
        for number, page in enumerate(pages, 1)
    ]


def _pairs(
    rng: Random, prompts: Sequence[str], seeds: Sequence[int], shared: int, place: int, methods: int
) -> list[dict]:
    """Pairs of one method: first `shared` pairs, on other prompts than other methods' shared pairs, then the rest.

    In the rest, prompts that no method shares come first, so that each has the same place for every method.
    """
    trainings = [seeds[number % len(seeds)] for number in range(len(prompts))]
    rng.shuffle(trainings)
    turned = sorted(range(len(prompts)), key=lambda number: ((number - place) % methods, number))
    turned[shared:] = sorted(turned[shared:], reverse=True)
    return [{"prompt_id": prompts[number], "seed": trainings[number], "check": None} for number in turned]


def _ordered(rng: Random, pairs: Sequence[dict], first: int) -> list[dict]:
    """Pairs, each with an order, both equally often; for an odd number, `first` decides which comes once more."""
    both = [*schemas.ORDERS]
    orders = [both[(number + first) % 2] for number in range(len(pairs))]
    rng.shuffle(orders)
    return [pair | {"order": order} for pair, order in zip(pairs, orders, strict=True)]


def _checks(rng: Random, page: Sequence[dict], spare: Sequence[dict], number: int) -> Iterator[dict]:
    """Attention checks: keys and orders as even as possible.

    They are about prompts that are not on the page, `spare`, as far as there are enough. The others repeat an answer
    of the page, the initial model's as often as a method's (±1), so that a repeated answer reveals nothing.
    """
    shown = rng.sample(spare, min(number, len(spare)))
    again = [rng.choice(page) for _ in range(number - len(shown))]
    turned = rng.randrange(2)
    shown += [pair | {"method": None, "seed": None} if (n + turned) % 2 else pair for n, pair in enumerate(again)]
    first, both = rng.randrange(len(KEYS) * len(schemas.ORDERS)), [*schemas.ORDERS]
    for n, answer in enumerate(shown, first):
        yield answer | {"check": KEYS[n % len(KEYS)], "order": both[n // len(KEYS) % 2]}
