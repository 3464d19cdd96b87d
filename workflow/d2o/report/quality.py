"""How good a data set's human pairs are: Figure 1 of the paper, as numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2o import records, statistics
from d2o.errors import D2OError
from d2o.report.metrics import Archive
from d2o.settings import Settings
from d2o.statistics import Estimate, Sample

# What is measured of the pairs, in the order of the figure's panels.
PANELS = {
    "difference": ("score, chosen less rejected, sd", "rewards"),
    "win_rate": ("chosen wins, %", "judges"),
    "toxic": ("toxic answers, %", "rewards with toxic_above"),
}


@dataclass(frozen=True)
class Measure:
    """One figure about the pairs of a data set.

    Attributes:
        panel: key of `PANELS`.
        scorer: the reward model, judge or classifier.
        side: the answers it is about, where it is about one side: `chosen` or `rejected`.
        estimate: mean with its interval, over prompts.
        values: the values behind it, for a distribution.
    """

    dataset: str
    panel: str
    scorer: str
    side: str
    estimate: Estimate
    values: np.ndarray


def measure(archive: Archive, settings: Settings, dataset: str) -> list[Measure]:
    """Every measure that an experiment's reward models and judges give of a data set's pairs.

    Score differences are turned such that more is better, in standard deviations of all scores, so that scorers
    compare. A reward model trained on this data set's labels is asked about its test prompts only.

    Raises:
        D2OError: where an artifact is missing, or chosen and rejected answers are not of the same pairs.
    """
    (experiment,) = settings.experiments.values()
    folder = f"{dataset}/quality"
    splits = {row["prompt_id"]: row["origin"] for row in archive.table(f"{folder}/prompts.parquet", records.PROMPTS)}
    found = []
    for name in experiment.rewards:
        reward = settings.rewards[name]
        sides = [_scores(archive, f"{folder}/scores/{name}/{side}.parquet") for side in ("chosen", "rejected")]
        if sides[0].keys() != sides[1].keys():
            raise D2OError(
                f"{folder}/scores/{name}: chosen and rejected are of different pairs: delete it, run again"
            )
        pairs = [pair for pair in sides[0] if not reward.train or splits[pair[0]] == "test"]
        prompts = np.array([prompt for prompt, _ in pairs])
        scores = np.array([[side[pair] for side in sides] for pair in pairs]).reshape(-1, 2)
        if reward.toxic_above is not None:
            toxic = scores > reward.toxic_above
            found += [
                _estimated(dataset, "toxic", name, side, toxic[:, column], prompts)
                for column, side in enumerate(("chosen", "rejected"))
            ]
        else:
            sign = 1 if reward.better == "higher" else -1
            spread = (scores.std() if pairs else 0) or 1.0
            difference = sign * (scores[:, 0] - scores[:, 1]) / spread
            found.append(_estimated(dataset, "difference", name, "", difference, prompts))
    for name in experiment.judges:
        rows = list(archive.table(f"{folder}/judge/{name}.parquet", records.VERDICTS))
        wins = np.array([{"method": 1.0, "tie": 0.5, "initial": 0.0}[row["verdict"]] for row in rows])
        prompts = np.array([row["prompt_id"] for row in rows])
        found.append(_estimated(dataset, "win_rate", name, "", wins, prompts))
    return found


def _scores(archive: Archive, path: str) -> dict[tuple[str, int], float]:
    return {(row["prompt_id"], row["sample"]): row["score"] for row in archive.table(path, records.SCORES)}


def _estimated(dataset: str, panel: str, scorer: str, side: str, values: np.ndarray, prompts: np.ndarray) -> Measure:
    values = values.astype(float)
    return Measure(dataset, panel, scorer, side, statistics.mean(Sample(values, prompts)), values)


def as_csv(measures: Sequence[Measure]) -> str:
    """quality.csv: one line a measure; shares as fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "measure", "scorer", "side", "mean", "low", "high", "prompts", "values"])
    for m in measures:
        e = m.estimate
        ends = ["" if np.isnan(x) else f"{x:.6g}" for x in (e.mean, e.low, e.high)]
        writer.writerow([m.dataset, m.panel, m.scorer, m.side, *ends, e.n, len(m.values)])
    return text.getvalue()
