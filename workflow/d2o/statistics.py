"""Means, differences and AUC with intervals, for values that share prompts and trainings.

Two things vary: the prompts that were asked (or the questions of a task), and the training, whose outcome depends on
its seed. A value of one prompt under one seed is μ + prompt + seed + rest, a two-way layout with random effects, and
the variance of its mean is the sum of three components (Searle, Casella and McCulloch, Variance Components, 1992,
ch. 4). The degrees of freedom of such a sum are Satterthwaite's (Biometrics Bulletin 2, 1946). With
2 to 5 seeds these t intervals contain the true value in 94 to 98 of 100 simulated tables; those of a bootstrap of
seeds, then prompts, in 72 to 91, since two or three resampled seeds vary less than trainings do.
`tests/test_statistics.py` counts both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.special import stdtr, stdtrit

RESAMPLES = 10_000
LEVEL = 0.95
# Cells of a matrix of weights held at once: 16 MB.
_CELLS = 2_000_000
# Values below this are 0 but for rounding.
_NOTHING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with its interval.

    Attributes:
        mean: the estimate; NaN without values.
        low, high: ends of the 95 % interval; NaN if it is undefined, as for a single cluster.
        n: number of clusters.
        p: two-sided p-value of the null hypothesis, not below the true one even if that is small, so that it can be
            adjusted for multiple tests; NaN where there is no interval. It may be above .05 where the interval
            excludes 0.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float = np.nan

    def excludes(self, value: float) -> bool:
        """Whether the interval lies on one side of `value`; False where it is undefined."""
        return self.low > value or self.high < value


NOTHING = Estimate(np.nan, np.nan, np.nan, 0)


@dataclass(frozen=True)
class Sample:
    """Measured values.

    Attributes:
        values: [N] float.
        clusters: [N] the cluster of each value, such as its prompt. Values of different clusters are independent but
            for their seed.
        strata: [N] the stratum of each value, a fixed part of the population such as a subject of MMLU. All values of
            a cluster are in one stratum. None: one stratum for all.
        seeds: [N] the training behind each value. None, or one seed: the variance between trainings is not known, and
            the interval is over clusters only.
    """

    values: np.ndarray
    clusters: np.ndarray
    strata: np.ndarray | None = None
    seeds: np.ndarray | None = None


def mean(sample: Sample, *, macro: bool = False, null: float = 0.0) -> Estimate:
    """The mean with its 95 % interval over clusters and, where there are several, seeds.

    Clusters vary within their stratum, because the strata are fixed and not a random choice. The mean is over all
    values; for MMLU that is over all questions, as in Hendrycks et al. (2009.03300) and on the leaderboards.

    The interval is undefined (NaN) if no stratum has two clusters. If all values are equal, its width is zero; this
    does not mean certainty.

    Args:
        macro: take the mean of the strata's means, with equal weights, in place of the mean of all values.
        null: the mean under the null hypothesis of `p`.
    """
    return _estimate([(1.0, _Cells.of(sample))], macro, null)


def difference(sample: Sample, other: Sample, *, macro: bool = False) -> Estimate:
    """The mean of `sample` minus the mean of `other`, on the clusters that both have, with its 95 % interval.

    The difference is paired by cluster, so what makes a prompt hard for both cancels. Trainings are not paired:
    two methods of one seed see the data in one order, but otherwise vary independently. Strata and `macro` as
    in `mean`; the null hypothesis is no difference.
    """
    return contrast([(1.0, sample), (-1.0, other)], macro=macro)


def contrast(terms: Sequence[tuple[float, Sample]], *, macro: bool = False) -> Estimate:
    """The weighted sum of the means of samples, on the clusters that all have, with its 95 % interval.

    Paired as in `difference`, which has the weights 1 and −1; with weights (x − mean x) / Σ (x − mean x)² it is the
    slope of the means on x. The null hypothesis is a sum of 0.
    """
    cells = [(weight, _Cells.of(sample)) for weight, sample in terms]
    shared = reduce(np.intersect1d, [own.keys for _, own in cells])
    return _estimate([(weight, own.taken(np.searchsorted(own.keys, shared))) for weight, own in cells], macro, 0.0)


def effect_size(sample: Sample, other: Sample) -> float:
    """Cohen's d: the difference of two means in standard deviations of the clusters' means, on shared clusters.

    The root mean square of both samples' standard deviations (Cohen, Statistical Power Analysis, 1988, § 2.2); NaN
    where that is 0 or there are fewer than two clusters.
    """
    one, two = _Cells.of(sample), _Cells.of(other)
    _, here, matching = np.intersect1d(one.keys, two.keys, assume_unique=True, return_indices=True)
    if len(here) < 2:
        return np.nan
    means = [cells.sums.sum(0) / cells.counts.sum(0) for cells in (one.taken(here), two.taken(matching))]
    spread = np.sqrt(np.mean([m.var(ddof=1) for m in means]))
    return float((means[0].mean() - means[1].mean()) / spread) if spread else np.nan


def holm(p: Sequence[float]) -> np.ndarray:
    """P-values adjusted for their number, so that each bounds the probability of any error among all of them.

    Holm's step-down method (Scandinavian Journal of Statistics 6, 1979). NaN stays, and does not count.
    """
    p = np.asarray(p, float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    adjusted = np.full(len(p), np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted


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
    interval is the percentile cluster bootstrap (Davison and Hinkley, Bootstrap Methods and their Application, 1997,
    § 3.8); resamples with one class only are left out. If the labels have one class
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

    low = high = np.nan
    if len(keys) > 1:
        resampled = np.concatenate([areas(weights) for weights in _weights(len(keys), resamples, seed)])
        low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(areas(np.ones((1, len(keys))))[0]), float(low), float(high), len(keys))


def alpha(counts: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Krippendorff's α of nominal values, with its 95 % interval: 1 is full agreement, 0 agreement by chance.

    α is 1 less the observed disagreement over that expected by chance (Krippendorff, Content Analysis, 2004, ch. 11).
    The interval is the percentile bootstrap over units; resamples in which all values are the same are left out.
    Where all units have the same value, agreement cannot be told from chance, and there is no α (NaN).

    Args:
        counts: [N, V] int, how many annotators gave a unit each value; two or more in sum.
    """
    from krippendorff import alpha as of

    def one(units: np.ndarray) -> float:
        varied = np.count_nonzero(units.sum(0)) > 1
        return float(of(value_counts=units, level_of_measurement="nominal")) if varied else np.nan

    n, value = len(counts), one(counts)
    if n < 2 or np.isnan(value):
        return Estimate(value, np.nan, np.nan, n)
    chosen = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = np.nanquantile([one(counts[units]) for units in chosen], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), n)


@dataclass(frozen=True)
class _Cells:
    """Values by seed and cluster: their `sums` and `counts` [S, C], the clusters' `keys` [C] and `strata` [C]."""

    sums: np.ndarray
    counts: np.ndarray
    keys: np.ndarray
    strata: np.ndarray

    @classmethod
    def of(cls, sample: Sample) -> _Cells:
        values = np.asarray(sample.values, float)
        keys, first, column = np.unique(np.asarray(sample.clusters), return_index=True, return_inverse=True)
        seeds = np.zeros(len(values)) if sample.seeds is None else np.asarray(sample.seeds)
        rows, row = np.unique(seeds, return_inverse=True)
        shape = len(rows), len(keys)
        cell = row * len(keys) + column
        strata = np.zeros(len(keys), int)
        if sample.strata is not None:
            strata = np.unique(np.asarray(sample.strata)[first], return_inverse=True)[1]
        sums = np.bincount(cell, values, shape[0] * shape[1]).reshape(shape)
        return cls(sums, np.bincount(cell, minlength=sums.size).reshape(shape).astype(float), keys, strata)

    def taken(self, columns: np.ndarray) -> _Cells:
        """The cells of these clusters only."""
        return _Cells(self.sums[:, columns], self.counts[:, columns], self.keys[columns], self.strata[columns])

    def linear(self, macro: bool) -> tuple[float, np.ndarray]:
        """The mean, and the influence of each cell on it, [S, C]; the mean influence is its first-order error."""
        groups = self.strata if macro else np.zeros(len(self.keys), int)
        total = np.bincount(groups, self.counts.sum(0))
        means = np.bincount(groups, self.sums.sum(0)) / total
        pull = (self.sums - means[groups] * self.counts) / (len(total) * total[groups])
        return float(means.mean()), pull * pull.size


def _estimate(terms: Sequence[tuple[float, _Cells]], macro: bool, null: float) -> Estimate:
    """The weighted sum of the means of cells; the columns of all are the same clusters."""
    strata = terms[0][1].strata
    n = len(strata)
    if n == 0:
        return NOTHING
    linear = [(weight, *cells.linear(macro)) for weight, cells in terms]
    value = sum(weight * mean for weight, mean, _ in linear)
    pulls = [weight * pull for weight, _, pull in linear]

    # Of the clusters, within their strata: mean squares and degrees of freedom.
    each = sum(pull.mean(0) for pull in pulls)
    parts = [each[strata == stratum] for stratum in np.unique(strata)]
    known = [part for part in parts if len(part) > 1]
    if not known:
        return Estimate(value, np.nan, np.nan, n)
    over_clusters = [part.var(ddof=1) * len(part) / n**2 for part in known]
    variance = clusters = sum(over_clusters)
    uncertain = sum(v**2 / (len(part) - 1) for v, part in zip(over_clusters, known, strict=True))
    least = min([len(part) - 1 for part in known] + [len(pull) - 1 for pull in pulls if len(pull) > 1])
    for pull in pulls:
        seeds = len(pull)
        if seeds > 1:
            over_seeds = pull.mean(1).var(ddof=1) / seeds
            rest = pull - pull.mean(0) - pull.mean(1, keepdims=True) + pull.mean()
            variance += over_seeds - (rest**2).sum() / max(1, (seeds - 1) * (n - 1)) / pull.size
            uncertain += over_seeds**2 / (seeds - 1)
    # The component of the seeds may come out negative: no interval is narrower than over clusters alone.
    variance = max(variance, clusters)
    error, away = np.sqrt(variance), abs(value - null)
    if error < _NOTHING * max(1, abs(value)):  # all clusters have the same value: the sign test
        return Estimate(value, value, value, n, 1.0 if away < _NOTHING else 0.5 ** (n - 1))
    # A sum has at least the degrees of its least certain part; a part that is subtracted would leave fewer than one.
    df = max(variance**2 / uncertain, least)
    half = error * stdtrit(df, (1 + LEVEL) / 2)
    # Far out in the tail, where corrected p-values are read, Satterthwaite's degrees are too many: with 3 seeds, 3 of
    # 1,000 equal pairs have p < 0.001. Those of the trainings alone are too few, on the safe side.
    trainings = sum(len(pull) - 1 for pull in pulls)
    p = 2 * stdtr(min(df, trainings) if trainings else df, -away / error)
    return Estimate(value, float(value - half), float(value + half), n, float(p))


def _weights(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `n` clusters is in each resample, [R, n], in blocks of rows."""
    rng = np.random.default_rng(seed)
    size = max(1, _CELLS // n)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        chosen = rng.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
        # One count for all rows: each row has numbers of its own.
        yield np.bincount(chosen.ravel(), minlength=chosen.size).reshape(chosen.shape).astype(float)
