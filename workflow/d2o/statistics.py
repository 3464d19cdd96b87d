"""Means, paired differences and AUC with intervals, for answers that are not independent of each other.

Several answers to one prompt (seeds, samples) are correlated. So intervals come from resampling *clusters* (prompts,
or questions of a task) with all their values: the percentile cluster bootstrap (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, ch. 13; Davison and Hinkley, Bootstrap Methods and their Application, 1997, § 3.8). Two
methods are compared on the clusters that both have: a resample takes a cluster for both or for neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
# Cells of a matrix of weights held at once: 16 MB.
_CELLS = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: the estimate; NaN without values.
        low, high: ends of the interval; NaN if it is undefined, as for a single cluster.
        n: number of clusters, the independent units behind the mean.
    """

    mean: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether the interval lies on one side of `value`; False where it is undefined."""
        return self.low > value or self.high < value


@dataclass(frozen=True)
class Sample:
    """Measured values.

    Attributes:
        values: [N] float.
        clusters: [N] the cluster of each value. Values of different clusters are independent.
        strata: [N] the stratum of each value, a fixed part of the population such as a subject of MMLU. All values of
            a cluster are in one stratum. None: one stratum for all.
    """

    values: np.ndarray
    clusters: np.ndarray
    strata: np.ndarray | None = None


def mean(sample: Sample, *, macro: bool = False, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean with its 95 % interval.

    Clusters are resampled within each stratum, because the strata are fixed and not a random choice. The mean is over
    all values; for MMLU that is over all questions, as in Hendrycks et al. (2009.03300) and on the leaderboards.

    The interval is undefined (NaN) if no stratum has two clusters. If all values are equal, its width is zero; this
    does not mean certainty.

    Args:
        macro: take the mean of the strata's means, with equal weights, in place of the mean of all values.
    """
    keys, sums, counts, strata = _by_cluster(sample)
    return _interval(np.stack([sums, counts], 1), strata, len(keys), macro, resamples, seed)


def difference(
    sample: Sample, other: Sample, *, macro: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of `sample` minus the mean of `other`, on the clusters that both have, with its 95 % interval.

    The difference is paired: a resample takes a cluster with its values on both sides, so what makes a prompt hard
    for both sides cancels. Strata and `macro` as in `mean`.
    """
    keys, sums, counts, strata = _by_cluster(sample)
    other_keys, other_sums, other_counts, _ = _by_cluster(other)
    shared, here, there = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    columns = np.stack([sums[here], counts[here], other_sums[there], other_counts[there]], 1)
    return _interval(columns, strata[here], len(shared), macro, resamples, seed)


def auc(
    scores: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Area under the ROC curve, with its 95 % interval.

    The area is the probability that an item of the class True scores above one of the class False; a tie counts half.
    It is the Mann–Whitney statistic divided by the number of pairs (Hanley and McNeil, Radiology 143, 1982). The
    interval comes from resampling clusters; resamples with one class only are left out. If the labels have one class
    only, there is no area (NaN, n = 0).

    Args:
        scores: [N] float.
        labels: [N] bool, True for the class that should score higher.
        clusters: [N] the cluster of each score; None: each score is a cluster of its own.
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    if labels.all() or not labels.any():
        return Estimate(np.nan, np.nan, np.nan, 0)
    order = np.argsort(scores, kind="stable")
    starts = np.unique(scores[order], return_index=True)[1]
    keys, members = np.unique(
        np.arange(len(scores)) if clusters is None else np.asarray(clusters), return_inverse=True
    )

    def areas(weights: np.ndarray) -> np.ndarray:
        """[R, C] how often each cluster is in each resample → [R] areas. Equal scores are one step of the curve."""
        times = weights[:, members[order]]
        above = np.add.reduceat(times * labels[order], starts, axis=1)
        below = np.add.reduceat(times * ~labels[order], starts, axis=1)
        wins = (above * (below.cumsum(1) - below / 2)).sum(1)
        with np.errstate(invalid="ignore"):
            return wins / (above.sum(1) * below.sum(1))

    strata = np.zeros(len(keys), int)
    resampled = np.concatenate([areas(weights) for weights in _weights(strata, resamples, seed)])
    return _estimate(float(areas(np.ones((1, len(keys))))[0]), resampled, strata)


def _by_cluster(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per cluster: name [C], sum [C] and count [C] of its values, number of its stratum [C]."""
    keys, first, members = np.unique(np.asarray(sample.clusters), return_index=True, return_inverse=True)
    values = np.asarray(sample.values, float)
    sums = np.bincount(members, values, len(keys))
    counts = np.bincount(members, minlength=len(keys)).astype(float)
    strata = np.zeros(len(keys), int)
    if sample.strata is not None:
        strata = np.unique(np.asarray(sample.strata)[first], return_inverse=True)[1]
    return keys, sums, counts, strata


def _interval(columns: np.ndarray, strata: np.ndarray, n: int, macro: bool, resamples: int, seed: int) -> Estimate:
    """A mean from [C, 2], or a difference of means from [C, 4]: the sum and the count of each cluster, per side."""
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    parts = columns
    if macro:  # [C, S, 2 or 4], so that one product with the weights gives the totals of every stratum
        inside = strata[:, None] == np.unique(strata)
        parts = (inside[:, :, None] * columns[:, None, :]).reshape(n, -1)

    def statistic(weights: np.ndarray) -> np.ndarray:
        totals = (weights @ parts).reshape(len(weights), -1, columns.shape[1])
        means = (totals[..., ::2] / totals[..., 1::2]).mean(1)
        return means[:, 0] - means[:, 1] if means.shape[1] == 2 else means[:, 0]

    resampled = np.concatenate([statistic(weights) for weights in _weights(strata, resamples, seed)])
    return _estimate(float(statistic(np.ones((1, n)))[0]), resampled, strata)


def _weights(strata: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster is in each resample, [R, C], in pieces of rows. Resampling is within each stratum."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    size = max(1, _CELLS // len(strata))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        chosen = np.concatenate([group[rng.integers(len(group), size=(rows, len(group)))] for group in groups], 1)
        # One count for all rows: each row has numbers of its own.
        chosen += np.arange(rows)[:, None] * len(strata)
        yield np.bincount(chosen.ravel(), minlength=chosen.size).reshape(chosen.shape).astype(float)


def _estimate(value: float, resampled: np.ndarray, strata: np.ndarray) -> Estimate:
    low = high = np.nan
    if np.bincount(strata).max() > 1 and not np.isnan(resampled).all():
        low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), len(strata))
