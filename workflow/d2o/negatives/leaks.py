"""Finds prompts that also occur elsewhere, exactly or nearly, and prompts that are near-duplicates of one another.

MinHash proposes near-duplicates, and the Jaccard similarity itself confirms them. A text is the set of its pairs of
neighbouring words. Two of Broder's sketches (Compression and Complexity of SEQUENCES, 1997) agree in each place with
a probability that equals the similarity of the sets, so that banding them (locality-sensitive hashing) finds
candidates without comparing all texts with all.

Pairs of words are used because prompts are short: a word changed in the middle of ten leaves 7 of 11 pairs in common,
but only 5 of 11 triples, while single words are common to most questions of one kind.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

# Origins of prompts that are not trained on.
ORIGINS = ("test", "evaluation")
# Places of a sketch. The bands are chosen such that few true neighbours are missed; false ones are removed later.
_PLACES = 64
_WEIGHTS = (0.1, 0.9)  # of false and of missed neighbours
# Texts that share a band with thousands follow one pattern. Each of ours is compared with this many of ours that come
# after it, and with this many texts of each origin, those that share most bands with it.
_WINDOW, _ALIKE = 10, 100
# Number of texts that are sketched at once: their hashes stay in the processor's cache.
_CHUNK = 4096
_EXAMPLES = 3


@dataclass(frozen=True)
class Leaks:
    """Prompts that are equal or near to another text.

    Attributes:
        table: one row per `prompt` and `other` text that is equal or near to it: its `kind` (leak, near leak, or
            near-duplicate where the other text is one of the prompts, too), the `origin` of the other text (null for
            one of the prompts), and their `similarity`. A prompt has one kind only.
    """

    table: pl.DataFrame

    @property
    def prompts(self) -> pl.DataFrame:
        """Each `prompt` that leaks."""
        return self.table.filter(pl.col("kind") != "near-duplicate").select("prompt").unique()

    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of prompts, in all and by origin; a prompt may leak to several origins."""
        origins = dict.fromkeys([*ORIGINS, *self.table["origin"].drop_nulls().unique().sort()])
        counts = {
            name: {"prompts": self._count(kind=kind)} | {o: self._count(kind=kind, origin=o) for o in origins}
            for name, kind in (("leaks", "leak"), ("near_leaks", "near leak"))
        }
        return counts | {"near_duplicates": {"train": self._count(kind="near-duplicate")}}

    def _count(self, **what: str) -> int:
        return self.table.filter(**what)["prompt"].n_unique()

    def examples(self, train: pl.DataFrame) -> list[dict[str, Any]]:
        """A few prompts of each kind and origin, with a text near to each and their similarity."""
        place = ["kind", "origin", "prompt"]
        first = self.table.sort(*place, "other").unique(place, keep="first", maintain_order=True)
        shown = first.group_by("kind", "origin", maintain_order=True).head(_EXAMPLES)
        shown = shown.join(train.select("prompt", train="text"), on="prompt", maintain_order="left")
        origin = pl.col("origin").fill_null("train")
        return shown.select("kind", origin, "train", "other", pl.col("similarity").round(3)).to_dicts()


def find_leaks(prompts: pl.DataFrame, asked: pl.DataFrame, known: pl.DataFrame, threshold: float | None) -> Leaks:
    """Leaks among prompts; of near ones not all, but one per prompt and origin.

    Args:
        prompts: in order: `prompt`, `text` (all user turns), `turns` (a digest of each).
        asked: each `text` that is asked elsewhere, its `origin`, and its `key` as in `turns`. Texts are normalised.
        known: `prompt` and `origin` of further leaks.
        threshold: Jaccard similarity from which two texts are near; None: not searched.
    """
    turns = prompts.select("prompt", key="turns").explode("key").join(asked, on="key").select("prompt", "origin")
    exact = pl.concat([turns, known]).unique().join(prompts, on="prompt")
    leaks = exact.select("prompt", "origin", other="text", similarity=1.0, kind=pl.lit("leak"))
    if threshold is None:
        return Leaks(leaks)
    rest = prompts.join(exact, on="prompt", how="anti", maintain_order="left")
    asked = asked.unique(["text", "origin"], keep="first", maintain_order=True)
    return Leaks(pl.concat([leaks, _near(rest, asked, threshold)]))


def _near(prompts: pl.DataFrame, asked: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """Near leaks, and near-duplicates among the prompts without one; columns as `Leaks.table`."""
    texts = pl.concat([prompts["text"], asked["text"]], rechunk=True)
    origins = pl.concat([pl.repeat(None, len(prompts), dtype=pl.String, eager=True), asked["origin"]])
    schema = {"one": pl.UInt32, "other": pl.UInt32, "similarity": pl.Float64}
    pairs = pl.DataFrame(list(near_pairs(texts, origins.to_list(), threshold)), schema, orient="row")
    asked_there = pl.col("other") >= len(prompts)
    swapped = pairs.filter(~asked_there).select("similarity", one="other", other="one").select(*schema)
    pairs = pl.concat([pairs, swapped])
    leaking = pairs.filter(asked_there)["one"].implode()
    pairs = pairs.filter(asked_there | ~(pl.col("one").is_in(leaking) | pl.col("other").is_in(leaking)))
    return pairs.select(
        prompt=prompts["prompt"].gather(pairs["one"]),
        origin=origins.gather(pairs["other"]),
        other=texts.gather(pairs["other"]),
        similarity="similarity",
        kind=pl.when(asked_there).then(pl.lit("near leak")).otherwise(pl.lit("near-duplicate")),
    )


def near_pairs(
    texts: Sequence[str], origins: Sequence[str | None], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Pairs of one of our texts and another text that are near, with their similarity.

    Not all pairs are found: for each of ours, one of each origin and a few of ours. Thousands of texts of one pattern
    are not all compared with one another, or time would grow with their square; a line reports where this was so.

    Args:
        origins: where each text is from; ours come first, with None.
        threshold: Jaccard similarity from which two texts are near, above 0.
    """
    count = origins.count(None)
    known = {origin: bytearray(count) for origin in {None, *origins}}
    bounded: set[int] = set()
    keys = _band_keys(texts, threshold)
    for band in tqdm(keys, "comparing prompts", unit=" bands", mininterval=2):
        for alike in _equal(band):
            ours, others = alike[alike < count].tolist(), alike[alike >= count]
            words = cache(lambda text: word_pairs(texts[text]))
            for first, second in chain.from_iterable(
                zip(ours, ours[i:], strict=False) for i in range(1, _WINDOW + 1)
            ):
                if known[None][first] and known[None][second]:
                    continue
                if (value := jaccard(words(first), words(second))) >= threshold:
                    known[None][first] = known[None][second] = True
                    yield first, second, value
            for origin, group in groupby(others.tolist(), origins.__getitem__):
                asked = np.array(list(group))
                bands = keys[:, asked]
                for first in ours:
                    if known[origin][first]:
                        continue
                    nearest = asked
                    if len(asked) > _ALIKE:
                        bounded.add(first)
                        common = (bands == keys[:, first, None]).sum(axis=0)
                        nearest = asked[np.argsort(-common, kind="stable")[:_ALIKE]]
                    for second in nearest.tolist():
                        if (value := jaccard(words(first), words(second))) >= threshold:
                            known[origin][first] = True
                            yield first, second, value
                            break
    if unsure := sum(not any(known[origin][text] for origin in known if origin) for text in bounded):
        print(
            f"near-duplicates: {unsure:,} prompts are of a pattern that more than {_ALIKE} others have; each was "
            f"compared with the {_ALIKE} most alike in each of {len(keys)} bands, and none is near",
            file=sys.stderr,
        )


def _band_keys(texts: Sequence[str], threshold: float) -> np.ndarray:
    """Keys [bands, N]: two texts that may be near have an equal key in one band or more."""
    bands, size = _bands(threshold)
    # Multiply-shift hashing (Dietzfelbinger et al., 1997).
    factors, terms = np.random.default_rng(0).integers(2**64, size=(2, bands * size), dtype=np.uint64)
    factors |= np.uint64(1)
    keys = np.empty((bands, len(texts)), np.uint64)
    with tqdm(desc="near-duplicates", total=len(texts), unit=" prompts", mininterval=2) as bar:
        for start in range(0, len(texts), _CHUNK):
            words = [word_pairs(text) or {""} for text in texts[start : start + _CHUNK]]
            hashes = pl.Series(list(chain.from_iterable(words))).hash().to_numpy()
            starts = np.cumsum([0, *map(len, words[:-1])])
            places = [
                np.minimum.reduceat(hashes * factor + term >> np.uint64(32), starts)
                for factor, term in zip(factors, terms, strict=True)
            ]
            sketches = np.reshape(places, (bands, size, len(words)))
            # One key for the places of a band.
            keys[:, start : start + len(words)] = (sketches * factors[:size, None]).sum(axis=1)
            bar.update(len(words))
    return keys


def _bands(threshold: float) -> tuple[int, int]:
    """Number of bands, and places of each, such that few neighbours are missed.

    Two texts of similarity s have a band in common with a probability of 1 - (1 - s ** size) ** bands.
    """
    similarity = np.linspace(0, 1, 1001)
    near = similarity >= threshold

    def cost(shape: tuple[int, int]) -> float:
        bands, size = shape
        missed = (1 - similarity**size) ** bands
        return _WEIGHTS[0] * (1 - missed[~near]).sum() + _WEIGHTS[1] * missed[near].sum()

    return min(((_PLACES // size, size) for size in range(1, _PLACES + 1)), key=cost)


def _equal(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The indices, ascending, of each set of two or more equal keys of [N]."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    starts, ends = np.r_[0, ends], np.r_[ends, len(keys)]
    for place in np.flatnonzero(ends - starts > 1):
        yield order[starts[place] : ends[place]]


def word_pairs(text: str) -> set[str]:
    """The pairs of neighbouring words; a lone word itself. Case, punctuation and white space are ignored."""
    words = re.findall(r"\w+", text.lower()) or text.split()
    return set(map(" ".join, pairwise(words))) or set(words)


def jaccard(first: set[str], second: set[str]) -> float:
    """Share of the elements of either set that are in both; 0 for two empty sets."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0
