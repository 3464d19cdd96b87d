"""Quality of a data set's human pairs: Figure 1 of the paper, as numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from d2o import schemas, statistics
from d2o.errors import D2OError
from d2o.metrics import WINS, Archive, together
from d2o.settings import Settings
from d2o.statistics import Sample

# The measures of the pairs, in the order of the figure's panels.
PANELS = {
    "difference": ("score, chosen less rejected, sd", "rewards"),
    "win_rate": ("chosen wins, %", "judges"),
    "toxic": ("toxic answers, %", "rewards with toxic_above"),
}
# Bars of the histogram of a data set's score differences.
BINS = 25

_COLUMNS = ["dataset", "measure", "scorer", "preference", "mean", "low", "high", "prompts", "values"]
_PREFERENCES = ("chosen", "rejected")


def measure(archive: Archive, settings: Settings, dataset: str) -> pd.DataFrame:
    """Every measure that an experiment's reward models and judges give of a data set's pairs.

    Score differences have the sign such that more is better, and are in standard deviations of all scores, so that
    scorers can be compared. A reward model trained on this data set's labels is used on its test prompts only.

    Returns:
        One row per measure: `measure`, a key of `PANELS`; the `preference` it is about, where it is about one; the
        `mean` with its interval over `prompts` clusters; and `values`, the array that these are computed from.
    Raises:
        D2OError: where an artifact is missing, or chosen and rejected answers are not of the same pairs.
    """
    experiment = settings.experiment
    splits = archive.table("pair_prompts", schemas.PROMPTS, dataset=dataset).set_index("prompt_id")["origin"]
    rows = []

    def add(measure: str, scorer: str, preference: str, values: pd.Series, prompts: pd.Series) -> None:
        values = values.to_numpy(float)
        e = statistics.mean(Sample(values, prompts.to_numpy()))
        rows.append([dataset, measure, scorer, preference, e.mean, e.low, e.high, e.n, values])

    for name in experiment.rewards:
        reward = settings.rewards[name]
        pairs = _scores(archive, dataset, name)
        if reward.train:
            pairs = pairs[pairs["prompt_id"].map(splits) == "test"]
        scores, prompts = pairs[[*_PREFERENCES]], pairs["prompt_id"]
        if reward.toxic_above is not None:
            for preference in _PREFERENCES:
                add("toxic", name, preference, scores[preference] > reward.toxic_above, prompts)
        else:
            sign = 1 if reward.better == "higher" else -1
            spread = (scores.to_numpy().std() if len(scores) else 0) or 1.0
            add("difference", name, "", sign * (scores["chosen"] - scores["rejected"]) / spread, prompts)
    for name in experiment.judges:
        verdicts = archive.table("pair_verdicts", schemas.VERDICTS, dataset=dataset, judge=name)
        verdicts = verdicts[verdicts["verdict"].isin(WINS)]
        add("win_rate", name, "", verdicts["verdict"].map(WINS), verdicts["prompt_id"])
    return pd.DataFrame(rows, columns=_COLUMNS)


def _scores(archive: Archive, dataset: str, reward: str) -> pd.DataFrame:
    """The scores of both answers of each pair."""
    names = {"dataset": dataset, "reward": reward}
    chosen, rejected = (
        archive.table("pair_scores", schemas.SCORES, preference=preference, **names) for preference in _PREFERENCES
    )
    pairs = chosen.merge(
        rejected, "outer", ["prompt_id", "sample"], suffixes=("_chosen", "_rejected"), validate="1:1", indicator=True
    ).rename(columns={f"score_{preference}": preference for preference in _PREFERENCES})
    if not pairs["_merge"].eq("both").all():
        folder = archive.path("pair_scores", preference="chosen", **names).parent
        raise D2OError(f"{folder}: chosen and rejected are of different pairs: delete it, run again")
    return pairs


def bars(measures: pd.DataFrame) -> pd.DataFrame:
    """The distributions of the score differences: one row per bar; all scorers of a data set have the same edges.

    Args:
        measures: as from `measure`.
    Returns:
        `dataset`, `scorer`, the ends `from` and `to` in standard deviations, and the `share` of pairs between them.
    """
    parts = []
    for dataset, own in measures[measures["measure"] == "difference"].groupby("dataset", sort=False):
        ends = np.concatenate([*own["values"]])
        edges = np.linspace(ends.min(initial=-0.1), ends.max(initial=0.1), BINS + 1)
        for m in own.itertuples():
            shares = np.histogram(m.values, edges)[0] / max(1, len(m.values))
            place = {"dataset": dataset, "scorer": m.scorer}
            parts.append(pd.DataFrame(place | {"from": edges[:-1], "to": edges[1:], "share": shares}))
    return together(parts, ["dataset", "scorer", "from", "to", "share"])


def as_csv(measures: pd.DataFrame) -> str:
    """pair_quality.csv: one line per measure; shares as fractions."""
    counted = measures.assign(values=measures["values"].map(len))
    return counted.to_csv(index=False, float_format="%.6g", lineterminator="\n")
