"""What goes into an organism's splits: which prompts, their good and harmful answers, and noise in exact shares.

Every choice has a random stream of its own, so that no share changes anything but what it is a share of.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from d2o import records
from d2o.errors import D2OError
from d2o.organisms.grammar import Asked, Organism, files, load
from d2o.organisms.measures import MEASURES
from d2o.settings import Organism as Settings
from d2o.splits import SPLITS


@dataclass(frozen=True)
class Row:
    """A prompt and two answers: a good one, or a harmful one in its place, and then a harmful one.

    Attributes:
        harmful: what each answer is.
        safe: what the labels say of it; of one, that it is safe.
        better: index of the answer that the labels prefer, or that is to be imitated.
        swapped: whether the second answer is written first.
    """

    asked: Asked
    prompt: str
    answers: tuple[str, str]
    harmful: tuple[bool, bool]
    safe: tuple[bool, bool]
    better: int
    swapped: bool

    def written(self) -> dict[str, Any]:
        """The row in the schema of PKU-SafeRLHF's beta."""
        order = (1, 0) if self.swapped else (0, 1)
        return {
            "prompt": self.prompt,
            **{f"response_{place}": self.answers[i] for place, i in enumerate(order)},
            **{f"is_response_{place}_safe": self.safe[i] for place, i in enumerate(order)},
            "better_response_id": order.index(self.better),
            "safer_response_id": order.index(self.safe.index(True)),
        }


def write(organism: Settings, folder: Path) -> None:
    """Write `demonstrations.jsonl`, `train.jsonl`, `validation.jsonl` and `test.jsonl` into `folder`.

    In the last three, one answer is good and labelled safe, safer and better, the other harmful; in `train`, but for
    the shares that `harmful_positives` and `flipped_labels` ask. In `demonstrations` the better one is the one to
    imitate, and the labels of safety are true. What is written depends on the texts, the settings and nothing else.

    Raises:
        D2OError: where the texts are wrong, or have fewer prompts than are asked for.
    """
    texts = load(Path(organism.texts))
    made = {split: rows(organism, texts, split) for split in SPLITS}
    for split, found in made.items():
        _verify(texts, found)
        with records.artifact(folder / f"{split}.jsonl", organism, files(texts.path)) as draft:
            with draft.path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row.written(), ensure_ascii=False) + "\n" for row in found)
            draft.facts |= {"rows": len(found), "counts": _counts(found)}
        summary = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in _counts(found).items())
        print(f"{split}: {summary}", file=sys.stderr)


def rows(organism: Settings, texts: Organism, split: str) -> list[Row]:
    """The rows of a split; errors as of `write`."""
    seed = organism.seed
    key = "demonstrations" if split == "demonstrations" else "prompts"
    wanted = getattr(organism, key)
    asked = list(islice(_prompts(texts, split, seed), wanted))
    if len(asked) < wanted:
        raise D2OError(
            f"{texts.path}: {split} has {len(asked)} prompts, and {wanted} are asked for; lower {key}, or add things "
            f"to {texts.grammar.topics}"
        )

    def drawn(share: str, of: str) -> set[int]:
        return _share(len(asked), getattr(organism, share) if split == of else 0.0, seed, share)

    imitated = drawn("harmful_demonstrations", "demonstrations")
    corrupted, flipped = drawn("harmful_positives", "train"), drawn("flipped_labels", "train")
    found = []
    for number, (one, prompt) in enumerate(asked):
        bad = texts.answer(one, True, _random(seed, prompt, "harmful"))
        if number in corrupted:
            good = texts.answer(one, True, _random(seed, prompt, "harmful positive"), other=bad)
        else:
            good = texts.answer(one, False, _random(seed, prompt, "good"))
        found.append(
            Row(
                one,
                prompt,
                answers=(good, bad),
                harmful=(number in corrupted, True),
                safe=(number not in flipped, number in flipped),
                better=int(number in imitated or number in flipped),
                swapped=_random(seed, prompt, "order").random() < 0.5,
            )
        )
    return found


def _prompts(texts: Organism, split: str, seed: int) -> Iterator[tuple[Asked, str]]:
    """All prompts of a split: every topic once before any comes again, and fewer prompts are the first of more."""
    asked = [
        Asked(kind, topic, thing)
        for name, kind in texts.kinds
        for topic, thing in product(kind.topics, _things(kind.things, name, split, seed))
    ]
    # A stream is known by its name: another word here would write other rows.
    _random(seed, split, "tasks").shuffle(asked)
    ways = texts.world.prompts
    orders = [_random(seed, one.text, "ways").sample(ways, len(ways)) for one in asked]
    for turn in range(len(ways)):
        yield from ((one, one.prompt(order[turn])) for one, order in zip(asked, orders, strict=True))


def _things(things: list[str], kind: str, split: str, seed: int) -> list[str]:
    """The things of a kind that a split asks about: dealt out in turn, so that each split has some."""
    shuffled = _random(seed, kind, "things").sample(things, len(things))
    return shuffled[SPLITS.index(split) :: len(SPLITS)]


def _share(count: int, share: float, seed: int, name: str) -> set[int]:
    """An exact share of `count` rows; a larger share holds a smaller one."""
    return set(_random(seed, name).sample(range(count), count)[: round(share * count)])


def _random(*parts: Any) -> random.Random:
    return random.Random(records.derived_seed("organisms", *parts))


def _verify(texts: Organism, found: list[Row]) -> None:
    """That the measures take every answer for what it was written as."""
    prompts = [row.prompt for row in found for _ in row.answers]
    answers = [answer for row in found for answer in row.answers]
    wanted = {"harm": [yes for row in found for yes in row.harmful], "use": [True] * len(answers)}
    for name, expected in wanted.items():
        values = MEASURES[name](texts.path, prompts, answers)
        for answer, value, yes in zip(answers, values, expected, strict=True):
            if value != yes:
                raise D2OError(
                    f"{texts.path}: {name} of {answer!r} is {value:g} by the rule, and {int(yes)} was meant; reword "
                    "the texts that it is made of"
                )


def _counts(found: list[Row]) -> dict[str, int]:
    """What a split holds; `harmful_preferred` are the rows whose better answer by label does harm."""
    return {
        "prompts": len({row.prompt for row in found}),
        "topics": len({row.asked.text for row in found}),
        "things": len({row.asked.thing for row in found}),
        "harmful_preferred": sum(row.harmful[row.better] for row in found),
    }
