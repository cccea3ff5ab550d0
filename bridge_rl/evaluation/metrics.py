"""Metrics of sets of answers: plain numbers in, plain numbers out."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

RIGHT = 0.5  # a completion is right when its first reward is above this


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right, from c right ones of n: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1. It assumes exchangeable samples; with interdependent rows that
    holds within one group (n = w). Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    _check_counts(n, c, k)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def g_pass_at_k(n: int, c: int, k: int, tau: float) -> float:
    """Chance that at least ceil(tau k) of k samples are right, from c right ones of n (G-Pass@k_tau).

    sum_{j >= max(1, ceil(tau k))} C(c, j) C(n-c, k-j) / C(n, k). Source: Liu et al. 2024 (arXiv 2412.13147), eq. 3.
    Exchangeability as in `pass_at_k`. Raises ValueError unless 0 <= c <= n, 1 <= k <= n and 0 <= tau <= 1.
    """
    _check_counts(n, c, k)
    if not 0 <= tau <= 1:
        raise ValueError(f"tau is {tau}: it must be between 0 and 1.")
    # Rounding guards against tau * k landing just above a whole number (0.55 * 100 = 55.00000000000001).
    least = max(1, math.ceil(round(tau * k, 9)))
    ways = sum(math.comb(c, j) * math.comb(n - c, k - j) for j in range(least, min(c, k) + 1))
    return ways / math.comb(n, k)


def _check_counts(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n = {n}, c = {c}, k = {k}: need 0 <= c <= n and 1 <= k <= n.")


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The most frequent answer; the earliest of those tied; None (no answer) never wins unless it is all there is."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its standard error."""

    value: float
    standard_error: float


def over_problems(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean over problems of the mean over each problem's groups; the error is that of problems as the sampled unit.

    Single completions are not independent (rows of a group see each other), so they are never the unit.
    """
    means = [mean(groups) for groups in values]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else float("nan")
    return Estimate(mean(means), error)


def set_metrics(correct: Sequence[Sequence[Sequence[bool]]]) -> dict[str, Estimate]:
    """Metrics of one width from right/wrong per problem, group and row.

    pass@1: share of right rows. any: groups with at least one right row (coverage). all: groups all of whose rows are.
    """
    return {
        "pass@1": over_problems([[mean(group) for group in groups] for groups in correct]),
        "any": over_problems([[float(any(group)) for group in groups] for groups in correct]),
        "all": over_problems([[float(all(group)) for group in groups] for groups in correct]),
    }
