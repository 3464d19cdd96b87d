"""Intervals that cover what they claim, and the cases in which there is none."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from d2o import statistics
from d2o.statistics import Sample


def prompts(n: int, each: int = 1) -> np.ndarray:
    """Cluster names of `n` prompts with `each` values."""
    return np.repeat([f"prompt {i}" for i in range(n)], each)


def covered(simulate, truth: float, rounds: int = 400) -> float:
    """Share of simulated data sets whose interval holds the truth."""
    estimates = [statistics.mean(simulate(), resamples=1000, seed=i) for i in range(rounds)]
    return float(np.mean([not e.excludes(truth) for e in estimates]))


def test_the_interval_covers_the_truth_in_95_of_100():
    rng = np.random.default_rng(0)
    # 400 rounds: the standard error of the share is 1.1 points, and the percentile method is a little narrow.
    assert covered(lambda: Sample(rng.exponential(size=100), prompts(100)), 1.0) == pytest.approx(0.94, abs=0.03)


def test_dependent_values_need_clusters():
    rng = np.random.default_rng(1)

    def simulated(clustered: bool) -> Sample:
        values = np.repeat(rng.normal(size=60), 5) + 0.3 * rng.normal(size=300)
        return Sample(values, prompts(60, 5) if clustered else prompts(300))

    assert covered(lambda: simulated(True), 0.0) == pytest.approx(0.94, abs=0.03)
    assert covered(lambda: simulated(False), 0.0) < 0.75


def test_equals_the_normal_interval_for_many_values():
    values = np.random.default_rng(2).normal(3, 2, size=4000)
    estimate = statistics.mean(Sample(values, prompts(4000)))
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.05 * half
    )
    assert estimate.n == 4000


def test_the_mean_is_over_values_not_over_clusters():
    sample = Sample(np.array([1.0, 1.0, 1.0, 5.0]), np.array(["a", "a", "a", "b"]))
    estimate = statistics.mean(sample)
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (2.0, 1.0, 5.0, 2)


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(3)
    hardness = rng.normal(size=200)
    here = Sample(hardness + 0.2 + 0.1 * rng.normal(size=200), prompts(200))
    there = Sample(hardness + 0.1 * rng.normal(size=200), prompts(200))
    paired = statistics.difference(here, there)
    apart = [statistics.mean(sample) for sample in (here, there)]
    unpaired = np.hypot(*(e.high - e.low for e in apart))
    assert paired.high - paired.low < 0.2 * unpaired
    assert paired.mean == pytest.approx(apart[0].mean - apart[1].mean)
    assert paired.excludes(0) and not paired.excludes(0.2)


def test_a_difference_is_on_shared_prompts_whatever_their_order_and_seeds():
    here = Sample(np.array([3.0, 1.0, 2.0, 100.0]), np.array(["b", "a", "a", "only here"]))
    there = Sample(np.array([0.0, 1.0, -50.0]), np.array(["a", "b", "only there"]))
    estimate = statistics.difference(here, there)
    # Means over values: (1 + 2 + 3) / 3 less (0 + 1) / 2; alone, a gives 1.5 − 0 and b gives 3 − 1.
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (1.5, 1.5, 2.0, 2)


def test_strata_are_not_resampled():
    values = np.array([0.0] * 30 + [1.0] * 10)
    strata = np.repeat(["law", "maths"], [30, 10])
    within = statistics.mean(Sample(values, prompts(40), strata))
    assert (within.low, within.mean, within.high) == (0.25, 0.25, 0.25)
    assert statistics.mean(Sample(values, prompts(40))).low < 0.15
    assert statistics.mean(Sample(values, prompts(40), strata), macro=True).mean == 0.5


def test_stratified_accuracy_has_the_textbook_variance():
    rng = np.random.default_rng(4)
    sizes, rates = np.array([50, 200, 400]), np.array([0.2, 0.5, 0.9])
    strata = np.repeat(["a", "b", "c"], sizes)
    values = (rng.random(len(strata)) < np.repeat(rates, sizes)).astype(float)
    p = np.array([values[strata == s].mean() for s in "abc"])
    sample = Sample(values, prompts(len(strata)), strata)
    for macro, weights in ((False, sizes / sizes.sum()), (True, np.full(3, 1 / 3))):
        estimate = statistics.mean(sample, macro=macro)
        error = np.sqrt((weights**2 * p * (1 - p) / sizes).sum())
        assert estimate.mean == pytest.approx((weights * p).sum())
        assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_one_cluster_has_no_interval_and_none_has_no_mean():
    one = statistics.mean(Sample(np.array([1.0, 3.0]), np.array(["a", "a"])))
    assert one.mean == 2 and np.isnan([one.low, one.high]).all() and one.n == 1
    assert not one.excludes(0)
    apart = Sample(np.array([1.0]), np.array(["a"])), Sample(np.array([1.0]), np.array(["b"]))
    none = statistics.difference(*apart)
    assert np.isnan([none.mean, none.low, none.high]).all() and none.n == 0
    assert np.isnan(statistics.mean(Sample(np.array([]), np.array([]))).mean)
    singles = statistics.mean(Sample(np.array([0.0, 1.0]), np.array(["a", "b"]), np.array(["law", "maths"])))
    assert singles.mean == 0.5 and np.isnan(singles.low)


def test_auc_is_the_rank_statistic_with_ties():
    rng = np.random.default_rng(5)
    scores, labels = rng.integers(0, 5, 80).astype(float), rng.random(80) < 0.4
    scores[labels] += 1
    estimate = statistics.auc(scores, labels)
    assert estimate.mean == pytest.approx(roc_auc_score(labels, scores))
    assert estimate.low < estimate.mean < estimate.high and estimate.n == 80
    sampled = [roc_auc_score(labels[i], scores[i]) for i in rng.integers(80, size=(1000, 80))]
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(sampled, [0.025, 0.975]), abs=0.02)


def test_auc_by_clusters_and_without_a_class():
    scores, labels = np.tile([0.0, 1.0, 2.0, 0.5], 50), np.tile([False, True, True, False], 50)
    scores = scores + np.repeat(np.random.default_rng(6).normal(size=50), 4)
    alone, together = statistics.auc(scores, labels), statistics.auc(scores, labels, prompts(50, 4))
    assert alone.mean == together.mean and together.n == 50
    assert (alone.low, alone.high) != (together.low, together.high)
    assert np.isnan(statistics.auc(scores, np.ones(200, bool)).mean)
    assert statistics.auc(np.array([]), np.array([])).n == 0


def test_a_seed_decides_the_interval():
    sample = Sample(np.random.default_rng(7).normal(size=50), prompts(50))
    assert statistics.mean(sample, seed=1) == statistics.mean(sample, seed=1) != statistics.mean(sample, seed=2)


def test_ten_thousand_resamples_of_a_thousand_prompts_are_quick():
    sample = Sample(np.random.default_rng(8).normal(size=1000), prompts(1000))
    start = time.process_time()
    statistics.mean(sample)
    # About 0.3 s; a loop in Python would take minutes.
    assert time.process_time() - start < 5
