"""Metrics of sets of answers: plain numbers in, plain numbers out.

Three kinds, told apart by name. Plain names (`pass@2`, `any`, `maj`) are of rows of one group: its rows may depend on
each other, and k of them are a random part of one group. `mixed/...` takes one row from each of w groups of a problem:
what the same rows would give if they did not depend on each other. `pooled/...` takes any k of all of a problem's rows,
which is valid only where rows are independent.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence, Sized
from functools import lru_cache
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from bridge_rl.errors import UserError, check_kind
from bridge_rl.evaluation.samples import SampledGroup

RIGHT = 0.5  # a completion is right when its first reward is above this
TAUS = (0.25, 0.5, 0.75, 1.0)
Array = NDArray[np.float64]


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
    check_kind("tau", tau, Real)
    if not 0 <= tau <= 1:
        raise UserError(f"tau is {tau}: it must be between 0 and 1.")
    return _at_least(n, c, k, least_right(k, tau))


def mg_pass_at_k(n: int, c: int, k: int) -> float:
    """Mean of G-Pass@k_tau over tau from 0.5 (left out) to 1: (2/k) sum_{i = k/2 + 1 .. k} G-Pass@k_{i/k}.

    Source: Liu et al. 2024 (arXiv 2412.13147). For odd k its sum has (k-1)/2 terms, so that even a perfect model
    would stay below 1: raises ValueError for those, and for counts as `pass_at_k` does.
    """
    _check_counts(n, c, k)
    if k % 2 != 0:
        raise ValueError(f"k = {k}: mG-Pass@k is for even k only.")
    return 2 / k * sum(_at_least(n, c, k, i) for i in range(k // 2 + 1, k + 1))


def least_right(k: int, tau: float) -> int:
    """Right samples of k that tau asks for: ceil(tau k), and never none."""
    # Rounding guards against tau * k landing just above a whole number (0.55 * 100 = 55.00000000000001).
    return max(1, math.ceil(round(tau * k, 9)))


def _at_least(n: int, c: int, k: int, least: int) -> float:
    ways = sum(math.comb(c, j) * math.comb(n - c, k - j) for j in range(least, min(c, k) + 1))
    return ways / math.comb(n, k)


def _check_counts(n: int, c: int, k: int) -> None:
    for name, count in {"n": n, "c": c, "k": k}.items():
        check_kind(name, count, Integral)
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UserError(f"n = {n}, c = {c}, k = {k}: need 0 <= c <= n and 1 <= k <= n.")


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The most frequent answer; the earliest of those tied; None (no answer, as is NaN) if there is nothing else."""
    check_kind("answers", answers, Sized)
    for answer in answers:
        if not isinstance(answer, Hashable):
            raise UserError(f"An answer is {answer!r:.60}: give texts, numbers or None, which can be counted.")
    counts = Counter(answer for answer in answers if answer is not None and answer == answer)
    return counts.most_common(1)[0][0] if counts else None


def majority_row(group: SampledGroup) -> int | None:
    """The first row that gave the majority's answer; None where no row has an answer."""
    winner = majority_vote(group.answers)
    return None if winner is None else group.answers.index(str(winner))


def best_row(group: SampledGroup) -> int:
    """The row with the highest mean log-prob a token; the earliest of those tied, an empty one last."""
    lengths = map(len, group.tokens)
    means = [total / n if n else -math.inf for total, n in zip(group.logprobs, lengths, strict=True)]
    return means.index(max(means))


def group_metrics(group: SampledGroup) -> dict[str, float]:
    """Metrics of the rows of one group, n = w of them.

    Those of `count_metrics`, and: maj: the majority's answer is right, as the first row that gave it was judged
    (maj@w; Wang et al. 2022, arXiv 2203.11171). best: the row of highest mean log-prob a token is right (best of w).
    distinct: number of different answers. length: mean tokens a row. truncated: share of rows cut at the token limit.
    unparsed: share without a readable answer. unjudged: share that could not be judged (timeout, error).
    """
    width, majority = len(group.correct), majority_row(group)
    return {
        **count_metrics(width, sum(group.correct)),
        "maj": float(majority is not None and group.correct[majority]),
        "best": float(group.correct[best_row(group)]),
        "distinct": float(len(set(group.answers) - {None})),
        "length": sum(map(len, group.tokens)) / width,
        "truncated": group.finish_reasons.count("length") / width,
        "unparsed": group.verdicts.count("unparsed") / width,
        "unjudged": (group.verdicts.count("timeout") + group.verdicts.count("error")) / width,
    }


@lru_cache(maxsize=4096)
def count_metrics(width: int, right: int) -> dict[str, float]:
    """Metrics of one group that has `right` right rows of `width`; the result is shared, so do not write to it.

    pass@1 (mean@w): share of right rows, c/w. pass@k for k = 2, 4, 8 .. w: `pass_at_k(w, c, k)`, k random rows of this
    group. any (coverage): c >= 1. all: c = w. g-pass_tau: `g_pass_at_k(w, c, w, tau)`, which is c >= ceil(tau w).
    mg-pass: `mg_pass_at_k(w, c, w)`, even w only.
    """
    found = {"pass@1": right / width}
    found |= {f"pass@{k}": pass_at_k(width, right, k) for k in powers_of_two(width)}
    found |= {"any": float(right >= 1), "all": float(right == width)}
    found |= {f"g-pass_{tau}": g_pass_at_k(width, right, width, tau) for tau in TAUS}
    if width % 2 == 0:
        found["mg-pass"] = mg_pass_at_k(width, right, width)
    return found


def pooled_metrics(n: int, c: int) -> dict[str, float]:
    """pooled/pass@k for k = 2, 4, 8 .. n: any k of all n rows of a problem, c right, all of them independent."""
    return {f"pooled/pass@{k}": pass_at_k(n, c, k) for k in powers_of_two(n)}


def powers_of_two(most: int) -> list[int]:
    """2, 4, 8, .. up to `most`."""
    return [2**i for i in range(1, most.bit_length()) if 2**i <= most]


def mixed_metrics(shares: Array, width: int) -> dict[str, Array]:
    """mixed/any, mixed/all, mixed/g-pass_tau of problems: one row from each of `width` of a problem's groups.

    shares: [P, n], right rows of each of n >= width groups as a share. Returns [P] by name. Groups are independent of
    each other, so these are what any, all and g-pass would be if rows had their chances but no dependence.
    """
    right = mixed_right(shares, width)
    found = {"mixed/any": 1.0 - right[:, 0], "mixed/all": right[:, width]}
    return found | {f"mixed/g-pass_{tau}": right[:, least_right(width, tau) :].sum(axis=1) for tau in TAUS}


def mixed_right(shares: Array, k: int) -> Array:
    """Chance of j right rows, j = 0..k, when one row is drawn from each of k of n groups, all choices equally likely.

    The coefficient of y^k x^j in prod_g (1 + y (q_g + p_g x)), over C(n, k), with p_g = shares[:, g] and q = 1 - p.
    shares: [P, n]. Returns [P, k + 1]. Raises ValueError unless 1 <= k <= n.
    """
    problems, n = shares.shape
    _check_counts(n, 0, k)
    ways = np.zeros((problems, k + 1, k + 1))  # [P, rows drawn, of them right]
    ways[:, 0, 0] = 1.0
    for p in shares.T[:, :, None, None]:  # [P, 1, 1]
        drawn = (1.0 - p) * ways[:, :-1]
        drawn[:, :, 1:] += p * ways[:, :-1, :-1]
        ways[:, 1:] += drawn
    return ways[:, k] / math.comb(n, k)


def bounds(metric: str, width: int) -> tuple[float, float]:
    """The least and the greatest value that a metric can have at a width."""
    return (0.0, {"length": math.inf, "distinct": float(width)}.get(metric, 1.0))
