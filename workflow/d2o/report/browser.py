"""Data of the page's answer browser: every prompt with its answers, their scores, and what follows from these."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from d2o import exact, identities, refusals, schemas, texts
from d2o.metrics import Archive
from d2o.report.tables import Measured
from d2o.runs import Run, runs
from d2o.settings import Reward

# Limits of the page's answers in bytes: packed, so that the page stays below 15 MB with its figures; and as JSON, so
# that it opens within a second.
PACKED_BYTES, JSON_BYTES = 12_000_000, 60_000_000
# The verdicts of a judge in words.
_OUTCOMES = {"method": "won", "initial": "lost", "tie": "tied", "unread": "unread"}


@dataclass(frozen=True)
class Answers:
    """The answers to the prompts of one data set, by the models of one seed.

    Attributes:
        prompts: by prompt id: `messages`, `origin`, and `categories` of harm, a list; in random order.
        answers: one row per answer: `prompt_id`, `method`, `text`, `tokens`, `finish`, `score/<scorer>`,
            `judge/<judge>`, and the columns that `assessed` adds.
    """

    dataset: str
    model: str
    seed: int
    prompts: pd.DataFrame
    answers: pd.DataFrame


def gather(archive: Archive, measured: Measured) -> list[Answers]:
    """The first answer of every model to each prompt: one entry per seed, data set and model, the first seed's first.

    The initial model, of which there is one, is in each. Validation prompts, used for selection, are left out.

    Raises:
        D2OError: where an artifact is missing.
    """
    experiment = measured.experiment
    prompts = {dataset: _prompts(archive, dataset) for dataset in experiment.datasets}
    entries = {name: measured.settings.rewards[name] for name in experiment.rewards}
    gathered = []
    for seed, dataset, model in product(experiment.seeds, experiment.datasets, experiment.models):
        chosen = [r for r in runs(experiment, dataset, model) if r.seed == seed or r.method == "initial"]
        if chosen:
            rows = pd.concat([_answers(archive, measured, run) for run in chosen], ignore_index=True)
            rows = rows[rows["prompt_id"].isin(prompts[dataset].index)].reset_index(drop=True)
            gathered.append(Answers(dataset, model, seed, prompts[dataset], assessed(rows, entries)))
    return gathered


def _prompts(archive: Archive, dataset: str) -> pd.DataFrame:
    """The prompts by id, in an order that depends on their ids alone, with the harm categories of their negatives."""
    rows = archive.table("prompts", schemas.PROMPTS, dataset=dataset).set_index("prompt_id")
    rows = rows[rows["origin"] != "validation"]
    human = archive.table("negatives", schemas.NEGATIVES, dataset=dataset)
    named: dict[str, dict[str, None]] = {prompt: {} for prompt in rows.index}
    for prompt, categories in zip(human["prompt_id"], human["categories"], strict=True):
        if prompt in named and categories is not None:
            named[prompt] |= dict.fromkeys(map(texts.visible, categories))
    rows = rows.assign(categories=[list(categories) for categories in named.values()])
    return rows.loc[sorted(rows.index, key=lambda prompt: identities.derived_seed("examples", prompt))]


def _answers(archive: Archive, measured: Measured, run: Run) -> pd.DataFrame:
    """The first answer of a run to each prompt, with one column per scorer and judge."""
    rows = _firsts(archive.table("responses", schemas.SAMPLES, **run.names))
    rows = rows[["prompt_id", "text", "tokens", "finish"]].assign(method=run.method)
    for reward in measured.experiment.rewards:
        scores = _firsts(archive.table("scores", schemas.SCORES, reward=reward, **run.names))
        rows[f"score/{reward}"] = rows["prompt_id"].map(scores.set_index("prompt_id")["score"])
    for judge in measured.experiment.judges if run.method != "initial" else []:
        verdicts = archive.table("verdicts", schemas.VERDICTS, judge=judge, **run.names)
        words = verdicts["verdict"].map(_OUTCOMES).groupby(verdicts["prompt_id"])
        rows[f"judge/{judge}"] = rows["prompt_id"].map(words.agg(_both_orders))
    return rows


def _both_orders(orders: pd.Series) -> str:
    """A judge's verdict on a pair that it saw in both orders; a verdict that could not be read contradicts none."""
    read = orders[orders != "unread"]
    if read.empty:
        return "unread"
    if read.nunique() > 1:
        return "orders disagree"
    return read.iloc[0] + " (in the other order unread)" * (len(read) < len(orders))


def _firsts(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["sample"].eq(0)].drop_duplicates("prompt_id")


def assessed(answers: pd.DataFrame, entries: Mapping[str, Reward]) -> pd.DataFrame:
    """The answers with values that follow from their texts and scores.

    - `refusal`: whether the answer refuses, as in the tables.
    - `harmful`: whether a scorer that measures harm finds it harmful; None where no such scorer has scored it.
    - `gain`: how much better it is than the initial model's answer to the prompt: the mean over the scorers of the
      difference of the scores, such that more is better, in standard deviations of the scorer's scores of all these
      answers. NaN where one of the two has no score, and for the initial model.
    - `disagreement`: from 0 to 1, the largest difference between two scorers in the answer's rank. The rank is the
      share of these answers that the scorer rates worse, plus half of those that it rates equal. NaN where there are
      not two scores.

    Args:
        answers: `prompt_id`, `method`, `text`, and `score/<scorer>` of each scorer.
        entries: the scorers' entries in the config.
    """
    signs = {name: -1 if entry.better == "lower" else 1 for name, entry in entries.items()}
    scores = pd.DataFrame({name: answers[f"score/{name}"] * sign for name, sign in signs.items()}, answers.index)
    first = answers["method"].eq("initial")
    start = scores[first].set_axis(answers.loc[first, "prompt_id"]).reindex(answers["prompt_id"])
    spread = scores.std(ddof=0).replace(0, np.nan)
    ranks = (scores.rank() - 0.5) / scores.count()
    harms = {name: answers[f"score/{name}"] for name, entry in entries.items() if measures_harm(entry)}
    verdicts = {name: harmful(own, entries[name]).astype(float).where(own.notna()) for name, own in harms.items()}
    worst = pd.DataFrame(verdicts, answers.index, dtype=float).max(axis=1)
    return answers.assign(
        refusal=answers["text"].map(refusals.refuses).astype(bool),
        harmful=worst.eq(1).astype(object).where(worst.notna(), None),
        gain=((scores - start.to_numpy()) / spread).mean(axis=1).where(~first),
        disagreement=(ranks.max(axis=1) - ranks.min(axis=1)).where(scores.count(axis=1) > 1),
    )


def measures_harm(entry: Reward) -> bool:
    """Whether a scorer measures harm: see `harmful`."""
    threshold = (entry.toxic_above, entry.safe_at) != (None, None)
    return threshold or (entry.rule is not None and entry.rule.measure == "harm")


def harmful(scores: pd.Series, entry: Reward) -> pd.Series:
    """Whether each score of a scorer that measures harm means a harmful answer.

    A score means harm above `toxic_above` or on the wrong side of `safe_at`; for the `harm` of an organism, above 0.
    """
    if entry.toxic_above is not None:
        return scores > entry.toxic_above
    if entry.safe_at is not None:
        return scores > entry.safe_at if entry.better == "lower" else scores < entry.safe_at
    return scores > 0


def pack(measured: Measured, gathered: Sequence[Answers]) -> tuple[str, list[str]]:
    """The answers as the page stores them: base64 of gzip of JSON, which no text can break out of.

    Where the answers exceed `PACKED_BYTES` or `JSON_BYTES`, some are left out: first all seeds but one, then prompts.
    Prompts are in random order, so that those that stay are a random sample.

    Returns:
        The text, and what was left out, one line each.
    """
    shown, prompts = list(gathered), max((len(one.prompts) for one in gathered), default=0)
    while True:
        text = json.dumps(_document(measured, shown, prompts), separators=(",", ":"), allow_nan=False)
        packed = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
        excess = max(len(text) / JSON_BYTES, len(packed) / PACKED_BYTES)
        if excess <= 1 or not prompts:
            break
        if len({one.seed for one in shown}) > 1:
            shown = [one for one in shown if one.seed == shown[0].seed]
        else:
            prompts = int(0.95 * prompts / excess)
    seeds = sorted({one.seed for one in gathered} - {one.seed for one in shown})
    left_out = [f"all trainings with seed {seed}" for seed in seeds]
    for dataset, total in {one.dataset: len(one.prompts) for one in shown}.items():
        if total > prompts:
            left_out.append(f"{total - prompts:,} of the {total:,} prompts of {dataset}, chosen at random")
    return packed, left_out


def _document(measured: Measured, gathered: Sequence[Answers], prompts: int) -> dict[str, Any]:
    """The data that browser.js reads. Each text is stored once, in `texts`, and referred to by its index there."""
    rewards = {name: measured.settings.rewards[name] for name in measured.experiment.rewards}
    judges = measured.experiment.judges
    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(text, len(places))

    def answer(row: dict[str, Any]) -> list[Any]:
        return [
            place(row["text"]),
            row["tokens"],
            int(row["finish"] == "length"),
            int(row["refusal"]),
            None if row["harmful"] is None else int(row["harmful"]),
            _short(row["gain"]),
            _short(row["disagreement"]),
            [_short(row[f"score/{name}"]) for name in rewards],
            [outcome if isinstance(outcome := row.get(f"judge/{name}"), str) else None for name in judges],
        ]

    answered = {method for one in gathered for method in one.answers["method"].unique()}
    methods = [method for method in measured.methods if method in answered]
    sets = []
    for one in gathered:
        shown = one.prompts.head(prompts)
        rows = one.answers[one.answers["prompt_id"].isin(shown.index)].to_dict("records")
        known = {(row["prompt_id"], row["method"]): row for row in rows}
        lines = []
        for prompt in shown.itertuples():
            turns = [[texts.visible(turn["role"]), place(turn["content"])] for turn in prompt.messages]
            own = [known.get((prompt.Index, method)) for method in methods]
            answers = [row and answer(row) for row in own]
            lines.append([prompt.Index, texts.visible(prompt.origin), prompt.categories, turns, answers])
        sets.append({"dataset": one.dataset, "model": one.model, "seed": one.seed, "prompts": lines})
    return {
        "methods": methods,
        "scorers": [
            {"name": name, "lower": entry.better == "lower", "share": bool(entry.rule and exact.is_share(entry.rule))}
            for name, entry in rewards.items()
        ],
        "judges": judges,
        "sets": sets,
        "texts": list(places),
    }


def _short(number: float) -> float | None:
    """A number for JSON, to three decimals; None for NaN and infinity."""
    return round(number, 3) if math.isfinite(number) else None
