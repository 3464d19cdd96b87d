"""The rows of an organism's splits: prompts, good and harmful answers, and noise in exact shares.

Every choice has its own random stream, so a change of one share changes only the rows of that share.
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

from d2o import identities, records
from d2o.errors import D2OError
from d2o.organisms.grammar import Asked, OrganismTexts, files, load
from d2o.organisms.measures import MEASURES
from d2o.settings import Organism
from d2o.splits import SPLITS


@dataclass(frozen=True)
class WrittenRow:
    """A prompt and two answers. The second answer is harmful; the first is good, or harmful as noise.

    Attributes:
        asked: what the prompt asks for.
        harmful: whether each answer is harmful.
        safe: whether each answer is labelled safe; exactly one of them is.
        better: index of the answer that the labels prefer, or of the answer to imitate.
        swapped: whether the second answer is written first in the file.
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


def write(organism: Organism, folder: Path) -> None:
    """Write `demonstrations.jsonl`, `train.jsonl`, `validation.jsonl` and `test.jsonl` into `folder`.

    In `train`, `validation` and `test`, one answer is good and labelled safe, safer and better; the other is harmful.
    Exceptions are the shares `harmful_positives` and `flipped_labels` of `train`. In `demonstrations`, the better
    answer is the one to imitate, and the labels of safety are true. The files depend on the texts and the settings
    only.

    Raises:
        D2OError: if the texts are wrong, or have fewer prompts than the settings ask for.
    """
    texts = load(Path(organism.texts))
    made = {split: rows(organism, texts, split) for split in SPLITS}
    for split, written in made.items():
        _verify(texts, written)
        with records.artifact(folder / f"{split}.jsonl", organism, files(texts.path)) as draft:
            with draft.path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row.written(), ensure_ascii=False) + "\n" for row in written)
            draft.facts |= {"rows": len(written), "counts": _counts(written)}
        summary = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in _counts(written).items())
        print(f"{split}: {summary}", file=sys.stderr)


def rows(organism: Organism, texts: OrganismTexts, split: str) -> list[WrittenRow]:
    """The rows of one split; errors as in `write`."""
    seed = organism.seed
    key = "demonstrations" if split == "demonstrations" else "prompts"
    wanted = getattr(organism, key)
    asked = list(islice(_prompts(texts, split, seed), wanted))
    if len(asked) < wanted:
        raise D2OError(
            f"{texts.path}: {split} has {len(asked)} prompts, and {wanted} are asked for; lower {key}, or add things "
            f"to {texts.grammar.topics}"
        )

    def chosen(share: str, of: str) -> set[int]:
        return _share(len(asked), getattr(organism, share) if split == of else 0.0, seed, share)

    imitated = chosen("harmful_demonstrations", "demonstrations")
    corrupted, flipped = chosen("harmful_positives", "train"), chosen("flipped_labels", "train")
    made = []
    for number, (one, prompt) in enumerate(asked):
        bad = texts.answer(one, True, _random(seed, prompt, "harmful"))
        if number in corrupted:
            good = texts.answer(one, True, _random(seed, prompt, "harmful positive"), other=bad)
        else:
            good = texts.answer(one, False, _random(seed, prompt, "good"))
        made.append(
            WrittenRow(
                one,
                prompt,
                answers=(good, bad),
                harmful=(number in corrupted, True),
                safe=(number not in flipped, number in flipped),
                better=int(number in imitated or number in flipped),
                swapped=_random(seed, prompt, "order").random() < 0.5,
            )
        )
    return made


def _prompts(texts: OrganismTexts, split: str, seed: int) -> Iterator[tuple[Asked, str]]:
    """All prompts of a split. Each topic and thing comes once before any comes twice; fewer prompts are a prefix."""
    asked = [
        Asked(kind, topic, thing)
        for name, kind in texts.kinds
        for topic, thing in product(kind.topics, _things(kind.things, name, split, seed))
    ]
    # The name is the seed of the stream: another word here would write other rows.
    _random(seed, split, "tasks").shuffle(asked)
    ways = texts.world.prompts
    orders = [_random(seed, one.text, "ways").sample(ways, len(ways)) for one in asked]
    for turn in range(len(ways)):
        yield from ((one, one.prompt(order[turn])) for one, order in zip(asked, orders, strict=True))


def _things(things: list[str], kind: str, split: str, seed: int) -> list[str]:
    """The things of a kind that a split asks about. The splits take things in turn, so each has some."""
    shuffled = _random(seed, kind, "things").sample(things, len(things))
    return shuffled[SPLITS.index(split) :: len(SPLITS)]


def _share(count: int, share: float, seed: int, name: str) -> set[int]:
    """Indices of an exact share of `count` rows. A larger share contains the smaller ones."""
    return set(_random(seed, name).sample(range(count), count)[: round(share * count)])


def _random(*parts: Any) -> random.Random:
    return random.Random(identities.derived_seed("organisms", *parts))


def _verify(texts: OrganismTexts, written: list[WrittenRow]) -> None:
    """Check that the measures agree with how each answer was meant: harmful or not, and useful."""
    prompts = [row.prompt for row in written for _ in row.answers]
    answers = [answer for row in written for answer in row.answers]
    wanted = {"harm": [yes for row in written for yes in row.harmful], "use": [True] * len(answers)}
    for name, expected in wanted.items():
        values = MEASURES[name](texts.path, prompts, answers)
        for answer, value, yes in zip(answers, values, expected, strict=True):
            if value != yes:
                raise D2OError(
                    f"{texts.path}: {name} of {answer!r} is {value:g} by the rule, and {int(yes)} was meant; reword "
                    "the texts that it is made of"
                )


def _counts(written: list[WrittenRow]) -> dict[str, int]:
    """Counts of a split. `harmful_preferred` is the number of rows whose better answer, by label, does harm."""
    return {
        "prompts": len({row.prompt for row in written}),
        "topics": len({row.asked.text for row in written}),
        "things": len({row.asked.thing for row in written}),
        "harmful_preferred": sum(row.harmful[row.better] for row in written),
    }
