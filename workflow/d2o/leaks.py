"""Which train prompts say what is evaluated as well, exactly or nearly, and which say nearly the same.

Near-duplicates are found by MinHash and confirmed by the Jaccard similarity itself: a text is the set of its pairs of
neighbouring words; two of Broder's sketches (Compression and Complexity of SEQUENCES, 1997) agree in each place with
a probability that is the similarity of the sets, so that banding them (locality-sensitive hashing) finds candidates
without comparing all texts with all.

Pairs of words, because prompts are short: a word changed in the middle of ten leaves 7 of 11 pairs common, but 5
of 11 triples, while single words are common to most questions of one kind.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tqdm import tqdm

# Places of a sketch. The bands are chosen such that few true neighbours are missed; false ones are sorted out after.
_PLACES = 64
_WEIGHTS = (0.1, 0.9)  # of false and of missed neighbours
_EXAMPLES = 3

# Of prompts by id: the nearest other text, and its similarity.
Neighbours = dict[str, tuple[str, float]]


@dataclass(frozen=True)
class Leaks:
    """What was found among train prompts.

    Attributes:
        exact: by origin (`test`, `evaluation`, `benchmark`), the prompts that are asked there.
        near: by origin, further prompts that are near to something asked there.
        alike: prompts without a leak that are near to another one.
    """

    exact: dict[str, set[str]]
    near: dict[str, Neighbours]
    alike: Neighbours

    @property
    def prompts(self) -> set[str]:
        """All prompts that leak."""
        return set().union(*self.exact.values(), *self.near.values())

    def counts(self) -> dict[str, dict[str, int]]:
        """Prompts in all, and by origin; a prompt may leak to several."""
        kinds = {"leaks": self.exact, "near_leaks": self.near}
        counts = {
            kind: {"prompts": len(set().union(*found.values()))} | {origin: len(ids) for origin, ids in found.items()}
            for kind, found in kinds.items()
        }
        return counts | {"near_duplicates": {"train": len(self.alike)}}

    def examples(self, texts: Mapping[str, str]) -> list[dict[str, Any]]:
        """A few prompts of each kind and origin, with their nearest text and its similarity."""
        kinds = [("leak", origin, {p: (texts[p], 1.0) for p in found}) for origin, found in self.exact.items()]
        kinds += [("near leak", origin, found) for origin, found in self.near.items()]
        kinds += [("near-duplicate", "train", self.alike)]
        return [
            {
                "kind": kind,
                "origin": origin,
                "train": texts[prompt],
                "other": other,
                "similarity": round(similarity, 3),
            }
            for kind, origin, found in kinds
            for prompt, (other, similarity) in sorted(found.items())[:_EXAMPLES]
        ]


def find_leaks(
    exact: dict[str, set[str]], texts: Mapping[str, str], asked: Mapping[str, Iterable[str]], threshold: float | None
) -> Leaks:
    """Leaks among train prompts.

    Args:
        exact: by origin, the train prompts known to be asked there.
        texts: the train prompts, by id.
        asked: by origin, the texts that are asked there.
        threshold: Jaccard similarity from which two texts are near; None: not searched.
    """
    near: dict[str, Neighbours] = {origin: {} for origin in exact}
    if threshold is None:
        return Leaks(exact, near, {})
    leaking = set().union(*exact.values())
    index = Index({prompt: texts[prompt] for prompt in sorted(texts.keys() - leaking)}, threshold)
    for origin, found in asked.items():
        for text in tqdm(
            found, f"near-duplicates, train and {origin}", unit=" prompts", mininterval=2, disable=not found
        ):
            for prompt, similarity in index.near(text):
                best = near[origin].get(prompt, (text, 0.0))
                near[origin][prompt] = max(best, (text, similarity), key=lambda pair: (pair[1], pair[0]))
    leaking.update(*near.values())
    alike: Neighbours = {}
    for prompt in tqdm(sorted(texts.keys() - leaking), "near-duplicates in train", unit=" prompts", mininterval=2):
        others = [(s, name) for name, s in index.near(texts[prompt]) if name != prompt and name not in leaking]
        if others:
            similarity, name = max(others)
            alike[prompt] = texts[name], similarity
    return Leaks(exact, near, alike)


class Index:
    """Texts by name, to be asked for those near to another text."""

    def __init__(self, texts: Mapping[str, str], threshold: float):
        """
        Args:
            texts: the texts, by name; they are not copied.
            threshold: Jaccard similarity from which two texts are near, above 0.
        """
        from datasketch import MinHash, MinHashLSH

        self._texts, self._threshold = texts, threshold
        self._empty = MinHash(_PLACES, hashfunc=zlib.crc32)
        self._bands = MinHashLSH(threshold, _PLACES, weights=_WEIGHTS)
        for name, text in texts.items():
            self._bands.insert(name, self._sketch(word_pairs(text)), check_duplication=False)

    def near(self, text: str) -> Iterator[tuple[str, float]]:
        """The names of the texts near to `text`, itself included where it is one, with their similarity."""
        pairs = word_pairs(text)
        for name in self._bands.query(self._sketch(pairs)):
            similarity = jaccard(pairs, word_pairs(self._texts[name]))
            if similarity >= self._threshold:
                yield name, similarity

    def _sketch(self, pairs: set[str]):
        sketch = self._empty.copy()
        sketch.update_batch([pair.encode() for pair in pairs])
        return sketch


def word_pairs(text: str) -> set[str]:
    """The pairs of neighbouring words; of a lone word, itself. Case, punctuation and white space do not count."""
    words = re.findall(r"\w+", text.lower()) or text.split()
    return {f"{first} {second}" for first, second in pairwise(words)} or set(words)


def jaccard(first: set[str], second: set[str]) -> float:
    """Share of the elements of either set that are in both; of two empty sets 0."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0
