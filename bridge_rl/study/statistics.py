"""Means, paired differences and relative gains over seeds: plain numbers in, estimates out.

A seed is the unit: it stands for a training of its own, and what one training gives says little of the next. Few seeds
make wide intervals (of 5, t is 2.78), which is what they are worth.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bridge_rl.evaluation.results import Estimate

RESAMPLES = 10_000
SEED = 0
Array = NDArray[np.float64]


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of Student's t with n - 1 degrees of freedom; of one seed no interval.

    It takes the values for normal. Shares of well over a hundred problems that are not near 0 or 1 nearly are; the ends
    are not cut off at 0 and 1, lest an interval look tighter than it is.
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean)
    reach = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - reach, mean + reach)


def over_seeds_and_problems(differences: Array) -> Estimate:
    """Mean of paired differences [seeds, problems] and a 95 % percentile interval of a two-way bootstrap.

    Seeds and problems are drawn anew independently, since every seed answers the same problems (pigeonhole bootstrap,
    Owen 2007, Annals of Applied Statistics 1, 386-411). From few seeds it is too narrow, as every percentile bootstrap
    is: it is there to show what the choice of the problems adds.
    """
    seeds, problems = differences.shape
    rng = np.random.default_rng(SEED)
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds  # [R, S]
    drawn_problems = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES) / problems  # [R, P]
    means = np.einsum("rs,rs->r", drawn_seeds, drawn_problems @ differences.T)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(differences.mean()), float(low), float(high))


def ratio(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `first` over mean of `second`, paired, with Fieller's 95 % interval (Fieller 1954, JRSS B 16, 175-185).

    The ratios r for which the mean of first - r second is within t standard errors of 0. Without an interval where that
    is unbounded, which is when the mean of `second` is itself not away from 0; and for one pair.
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    mean = [float(x.mean()), float(y.mean())]
    value = mean[0] / mean[1] if mean[1] != 0 else math.nan
    if len(x) < 2:
        return Estimate(value)
    # (mean_x - r mean_y)^2 <= t^2 var(x - r y) / n  <=>  a r^2 - 2 b r + c <= 0
    covariance = np.cov(x, y) * float(stats.t.ppf(0.975, len(x) - 1)) ** 2 / len(x)
    a = mean[1] ** 2 - float(covariance[1, 1])
    b = mean[0] * mean[1] - float(covariance[0, 1])
    c = mean[0] ** 2 - float(covariance[0, 0])
    if a <= 0:
        return Estimate(value)
    root = math.sqrt(max(0.0, b * b - a * c))  # below 0 by rounding alone
    return Estimate(value, (b - root) / a, (b + root) / a)
