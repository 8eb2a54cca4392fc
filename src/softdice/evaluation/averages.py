"""Means of the scores of cases, their bootstrap intervals, quantiles and standard deviations; nan is left out.

N is a case, K a class, R a resample of the bootstrap, S a quantile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
"""Resamples of a bootstrap."""

FEWEST_CASES = 5
"""Cases from which on there is an interval: with fewer a bootstrap draws little but the same cases again."""

_HUGE = 1e300
"""Stands for inf where NumPy interpolates quantiles: beside inf it would interpolate to nan."""

_SEED = 0
_DRAWS = 1 << 18
"""Cases that are drawn at a time, so that memory does not grow with their number."""


def mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis, nan left out, (N, ...) to (...); nan where all values are nan."""
    valid = ~np.isnan(values)
    total, number = np.where(valid, values, 0.0).sum(0), valid.sum(0)
    return np.divide(total, number, out=np.full(np.shape(total), np.nan), where=number > 0)


def deviation(values_NK: np.ndarray) -> np.ndarray:
    """Return the standard deviation (n - 1) of each class, (K,); nan with fewer than two values."""
    number_K = (~np.isnan(values_NK)).sum(0)
    squares_K = np.nansum((values_NK - mean(values_NK)) ** 2, 0)
    return np.sqrt(np.divide(squares_K, number_K - 1, out=np.full(number_K.shape, np.nan), where=number_K > 1))


def quantiles(values_NK: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Return the quantiles of each class at S shares in [0, 1], (S, K); nan for a class without values.

    A quantile that lies between a finite value and inf is inf.
    """
    quantiles_SK = np.full((len(shares), values_NK.shape[1]), np.nan)
    for k, column in enumerate(values_NK.T):
        column = column[~np.isnan(column)]
        if column.size:
            quantiles_SK[:, k] = np.quantile(np.where(np.isinf(column), _HUGE, column), shares)
    # only an interpolation between a score and _HUGE exceeds 1e200, whatever its weights
    return np.where(quantiles_SK > _HUGE / 1e100, np.inf, quantiles_SK)


def intervals(values_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 95 % intervals of the mean of each class, (2, K), and of the mean of these means, (2,).

    Percentile bootstrap over the cases (2000 resamples, fixed seed). nan is skipped as in the mean itself; a class with
    fewer than five scores has the interval nan. Source: B. Efron, Annals of Statistics 7, 1979.
    """
    N, K = values_NK.shape
    valid_NK = ~np.isnan(values_NK)
    enough_K = valid_NK.sum(0) >= FEWEST_CASES
    if valid_NK.any(1).sum() < FEWEST_CASES:
        return np.full((2, K), np.nan), np.full(2, np.nan)
    generator = np.random.default_rng(_SEED)
    filled_NK, weight_NK = np.where(valid_NK, values_NK, 0.0), valid_NK.astype(np.float64)
    means_RK = np.full((RESAMPLES, K), np.nan)
    step = min(64, max(1, _DRAWS // N))  # resamples at a time
    for start in range(0, RESAMPLES, step):
        R = min(step, RESAMPLES - start)
        # how often resample r draws case n: each row counts in N bins of its own
        drawn_RN = generator.integers(0, N, (R, N)) + N * np.arange(R)[:, None]
        times_RN = np.bincount(drawn_RN.reshape(-1), minlength=R * N).reshape(R, N).astype(np.float64)
        total_RK, number_RK = times_RN @ filled_NK, times_RN @ weight_NK
        np.divide(total_RK, number_RK, out=means_RK[start : start + R], where=number_RK > 0)
    bounds = (0.025, 0.975)
    class_intervals_2K = np.where(enough_K, quantiles(means_RK, bounds), np.nan)
    return class_intervals_2K, quantiles(mean(means_RK.T)[:, None], bounds)[:, 0]
