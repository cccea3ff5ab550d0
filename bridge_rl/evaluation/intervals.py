"""Intervals and tests of means over problems: problems are the sampled unit, and the groups of each stay together.

Rows of a group depend on each other, and groups of a problem share its difficulty, so neither is ever the unit. The
intervals are a Bayesian bootstrap (Rubin 1981): a resample weighs the problems by independent Exp(1) draws. The plain
bootstrap is too narrow in three ways, for which there are three corrections:

1. Few problems. The quantile is taken at Phi(-t) instead of 2.5 %, t being that of Student with P - 1 degrees of
   freedom (close to the expanded percentile interval of Hesterberg 2014, arXiv 1411.5279).
2. Values near a bound, in the extreme all 0 or all 1, where resampling sees no variation and would claim certainty. Two
   more observations are weighed in, one at each bound of the metric, by Gamma(r/2) draws. r is the standard deviation
   over problems over the largest that it could be, s / sqrt(m (1 - m)) on a scale from 0 to 1. Where values are 0 or 1,
   r is 1, and this is the interval of Jeffreys, Beta(c + 1/2, P - c + 1/2). Where no value differs from another, r is
   1 too. (A power of s between 0 and 2 is a choice: 2 would leave small differences with long tails too narrow, 0
   would make all that varies little too wide. 1 was the best of 1, 1.5 and 2 in the simulation.)
3. Paired differences that are 0 for nearly all problems. What varies little in them can be rare instead of small, which
   s does not tell: two further observations, by Gamma(PAIRED_RATIO / 2) draws, are as far from 0 as the root of the
   mean square of those differences that are not 0. (A choice as well: 0.35 and 0.5 left rare changes too narrow, 1 made
   everything on 30 problems wider.)

`benchmarks/intervals.py` measures how often they cover, from 30 problems on: pass@1 and gains in it 93 to 97 %, gains
on 30 problems up to 98 %, rare changes 94 to 98 %, rates below .05 or above .95 up to 99 %; the mean length of 30
problems whose lengths are lognormal only 92 %.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bridge_rl.evaluation.results import Estimate

RESAMPLES = 4000
FLIPS = 10_000
MOST_EXACT = 13  # differences whose 2^13 = 8,192 signs are tried one by one, fewer than FLIPS
SEED = 0
PAIRED_RATIO = 0.7
Array = NDArray[np.float64]


def estimate(values: Sequence[Sequence[float]], low: float = 0.0, high: float = 1.0) -> Estimate:
    """Mean over problems of the mean over each problem's groups, and its 95 % interval.

    values: of each problem, one of each group. low, high: bounds of the metric, infinite where it has none. No interval
    for one problem, nor where all values are the same and the metric has no bound. Raises ValueError without a value.
    """
    means = np.array([np.mean(groups) for groups in values])
    return estimates(means[:, None], [(low, high)])[0]


def paired_estimates(differences: Array, spans: Sequence[float]) -> list[Estimate]:
    """As `estimates`, for paired differences [P, M] between values of metrics with these spans between their bounds."""
    return estimates(differences, [(-span, span) for span in spans], paired=True)


def estimates(means: Array, limits: Sequence[tuple[float, float]], paired: bool = False) -> list[Estimate]:
    """As `estimate`, for several metrics with the same resamples. means: [P, M], NaN where a problem has no value.

    paired: they are differences of pairs, which the third correction is for.
    """
    present = ~np.isnan(means)
    count = present.sum(axis=0)  # [M]
    if not count.all():
        raise ValueError("A metric has no value for any problem.")
    value = np.nanmean(means, axis=0)
    many = count > 1
    low, high = np.full(len(value), np.nan), np.full(len(value), np.nan)
    if many.any():
        chosen = [limit for limit, enough in zip(limits, many, strict=True) if enough]
        low[many], high[many] = _intervals(means[:, many], present[:, many], value[many], chosen, paired)
    known = np.isfinite(low)
    return [
        Estimate(float(v), float(a), float(b)) if k else Estimate(float(v))
        for v, a, b, k in zip(value, low, high, known, strict=True)
    ]


def _intervals(
    means: Array,
    present: NDArray[np.bool_],
    value: Array,
    limits: Sequence[tuple[float, float]],
    paired: bool,
) -> Array:
    """[2, M], NaN where nothing can be said."""
    weights = resample_weights(len(means))
    total = weights @ present.astype(np.float32)  # [R, M]
    # Centred, so that single precision does not see how large the values are.
    shift = weights @ np.where(present, means - value, 0.0).astype(np.float32)
    count, variance = present.sum(axis=0), np.nanvar(means, axis=0, ddof=1)
    for m, (low, high) in enumerate(limits):
        if math.isfinite(high - low):
            ends = [(low, high, spread_ratio(variance[m], value[m], low, high))]
            if paired and variance[m] > 0:
                moved = means[present[:, m] & (means[:, m] != 0), m]
                size = math.sqrt(np.mean(moved**2))
                ends.append((-size, size, PAIRED_RATIO))
            for number, (below, above, ratio) in enumerate(ends):
                pair = end_weights(ratio, number)  # [2, R]
                total[:, m] += pair.sum(axis=0)
                shift[:, m] += pair[0] * (below - value[m]) + pair[1] * (above - value[m])
        elif variance[m] == 0:
            shift[:, m] = np.nan
    # Without those two observations the weights' own variance is s^2 / (P + 1) (P - 1) / P, not s^2 / P.
    bounded = np.isfinite([high - low for low, high in limits])
    student = stats.t.ppf(0.975, count - 1) * np.where(bounded, 1.0, np.sqrt((count + 1) / (count - 1)))
    found = value + _tails(np.sort(shift / total, axis=0), stats.norm.cdf(-student))
    # Where all is 0 or 1, that value itself belongs to the interval, as is usual with Jeffreys'.
    return np.stack([np.minimum(found[0], value), np.maximum(found[1], value)])


@lru_cache(maxsize=2)
def resample_weights(problems: int) -> NDArray[np.float32]:
    """[R, P] unnormalised weights of the Bayesian bootstrap; the same ones each time."""
    rng = np.random.default_rng(SEED)
    return rng.standard_exponential((RESAMPLES, problems), dtype=np.float32)


def spread_ratio(variance: float, value: float, low: float, high: float) -> float:
    """The standard deviation over the largest that values with these bounds and this mean could have; 1 for none."""
    largest = (value - low) * (high - value)
    return math.sqrt(min(1.0, variance / largest)) if variance > 0 and largest > 0 else 1.0


def end_weights(ratio: float, number: int) -> Array:
    """[2, R] weights of the `number`-th pair of observations."""
    # A generator of its own, so that a metric's interval does not depend on which others it is computed with. Each pair
    # serves both ways round, so that neither bound is favoured.
    pairs = np.random.default_rng(SEED + 1 + number).gamma(ratio / 2, size=(2, RESAMPLES // 2))
    return np.concatenate([pairs, pairs[::-1]], axis=1)


def _tails(ordered: Array, level: Array) -> Array:
    """[2, M]: quantiles at `level` and 1 - `level` of each sorted column, between neighbours by a straight line."""
    place = level * (len(ordered) - 1)  # [M]
    below, part, column = place.astype(int), place % 1, np.arange(ordered.shape[1])
    lower = (1 - part) * ordered[below, column] + part * ordered[below + 1, column]
    upper = (1 - part) * ordered[-1 - below, column] + part * ordered[-2 - below, column]
    return np.stack([lower, upper])


def sign_flip_p(differences: Sequence[float] | Array, seed: int = SEED) -> float:
    """Two-sided p of paired differences: how often their mean is as far from 0 when each sign is a coin's.

    All 2^n signs where n <= 13 differences are not 0 (a 0 has no sign to flip), else 10,000 seeded draws, of which the
    data count as one more, (1 + hits) / (1 + draws), so that p is never 0 (Phipson and Smyth 2010, arXiv 1603.05766).
    The null: a problem is as likely to favour the first as the second, by as much.
    """
    moved = np.asarray(differences, dtype=np.float64)
    moved = moved[moved != 0]
    if len(moved) == 0:
        return 1.0
    # Sums of the same numbers in another order differ in the last digits: those count as equal.
    bar = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()
    if len(moved) <= MOST_EXACT:
        signs = 2.0 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1) - 1.0
        return float(np.mean(np.abs(signs @ moved) >= bar))
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(10):  # in parts, to bound the memory with thousands of problems
        signs = 2.0 * rng.integers(0, 2, (FLIPS // 10, len(moved)), dtype=np.int8) - 1.0
        hits += int(np.sum(np.abs(signs @ moved) >= bar))
    return (1 + hits) / (1 + FLIPS)


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the order given: Holm 1979 (Scand. J. Statist. 6, 65-70).

    The i-th smallest of m times m - i + 1, never below a smaller one's, at most 1. Bounds the chance of any false find.
    """
    corrected, so_far = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        so_far = max(so_far, min(1.0, ps[place] * (len(ps) - rank)))
        corrected[place] = so_far
    return corrected
