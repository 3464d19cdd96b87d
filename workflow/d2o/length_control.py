"""Win rates at equal length: judges favour long answers (AlpacaEval 2, Dubois et al. 2024, arXiv 2404.04475)."""

from __future__ import annotations

import numpy as np

# Standard deviation, in log-odds, of a weak prior on the weight of length: it keeps the fit finite where length alone
# separates wins from losses (Gelman et al., Annals of Applied Statistics 2, 2008).
_SPREAD = 2.5


def values(wins: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """One value per verdict; their mean is the win rate that a logistic model predicts at equal length.

        log-odds of a win = a + b · tanh(Δ / sd(Δ))

    This is AlpacaEval 2's model without its term for how hard a prompt is, which takes many models to fit. A value is
    the rate plus the verdict's influence on it (Davison and Hinkley, Bootstrap Methods and their Application, 1997,
    § 2.7), so that the mean of a resample is, to first order, the rate of a fit to this resample.

    NaN where the same model's answers are always the longer ones: the effect of length cannot then be separated.

    Args:
        wins: [N] 1, 0, or 0.5 for a tie.
        longer: [N] Δ, by how much the answer whose wins count is longer than the other.
    """
    if not len(wins) or longer.min() > 0 or longer.max() < 0:
        return np.full(len(wins), np.nan)
    inputs = np.stack([np.ones(len(wins)), np.tanh(longer / (longer.std() or 1.0))], 1)
    prior = np.array([0.0, _SPREAD**-2])
    weights = np.zeros(2)
    for _ in range(25):  # Newton's method; five steps suffice, but if all verdicts are wins the rate nears 1 slowly
        expected = 1 / (1 + np.exp(-inputs @ weights))
        gradients = inputs * (wins - expected)[:, None] - prior * weights / len(wins)
        curvature = (inputs * (expected * (1 - expected))[:, None]).T @ inputs + np.diag(prior)
        step = np.linalg.solve(curvature, gradients.sum(0))
        if np.abs(step).max() < 1e-9:
            break
        weights = weights + step
    rate = 1 / (1 + np.exp(-weights[0]))
    influence = len(wins) * gradients @ np.linalg.inv(curvature)[0]
    return rate + rate * (1 - rate) * influence
