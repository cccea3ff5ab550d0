"""Metrics against numbers worked out by hand, brute force, and an independent package."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats
from synthetic import make_group

import bridge_rl as br
from bridge_rl.errors import UserError
from bridge_rl.evaluation.metrics import (
    best_row,
    bounds,
    group_metrics,
    least_right,
    mg_pass_at_k,
    mixed_metrics,
    mixed_right,
    pooled_metrics,
)

SMALL = [(n, c, k) for n in range(1, 9) for c in range(n + 1) for k in range(1, n + 1)]


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - C(2,2)/C(4,2) = 1 - 1/6
        (4, 0, 4, 0.0),
        (4, 4, 1, 1.0),
        (10, 3, 5, 1 - 21 / 252),  # C(7,5)/C(10,5)
    ],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert br.pass_at_k(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("n", "c", "k", "tau", "expected"),
    [
        (4, 2, 2, 1.0, 1 / 6),  # both of two right: C(2,2)/C(4,2)
        (4, 2, 2, 0.5, 5 / 6),  # at least one
        (4, 2, 2, 0.0, 5 / 6),  # tau 0 still needs one
        (8, 8, 8, 1.0, 1.0),
        (8, 7, 8, 1.0, 0.0),
        (6, 3, 4, 0.75, 3 / 15),  # three of four: C(3,3) C(3,1) / C(6,4)
    ],
)
def test_g_pass_at_k_by_hand(n, c, k, tau, expected):
    assert br.g_pass_at_k(n, c, k, tau) == pytest.approx(expected)


def test_g_pass_at_k_is_pass_at_k_when_one_is_enough():
    for c in range(9):
        assert br.g_pass_at_k(8, c, 4, 0.25) == pytest.approx(br.pass_at_k(8, c, 4))


def test_tau_times_k_is_not_rounded_up_by_floating_point():
    assert 0.55 * 100 > 55  # the trap
    assert br.g_pass_at_k(100, 55, 100, 0.55) == 1.0


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="need 0 <= c <= n"):
        br.pass_at_k(*arguments)
    with pytest.raises(ValueError, match="need 0 <= c <= n"):
        br.g_pass_at_k(*arguments, 0.5)


@pytest.mark.parametrize(("name", "value"), [("n", 4.0), ("c", float("nan")), ("c", "2"), ("k", None), ("k", True)])
def test_counts_are_whole_numbers(name, value):
    with pytest.raises(UserError, match=f"{name} is {value!r}: it must be a whole number"):
        br.pass_at_k(**{"n": 4, "c": 2, "k": 2, name: value})
    with pytest.raises(UserError, match=f"{name} is {value!r}: it must be a whole number"):
        br.g_pass_at_k(**{"n": 4, "c": 2, "k": 2, "tau": 0.5, name: value})


def test_a_threshold_of_text_is_refused():
    with pytest.raises(UserError, match=r"tau is '0\.5': it must be a number"):
        br.g_pass_at_k(4, 2, 4, "0.5")


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(tau):
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        br.g_pass_at_k(4, 2, 4, tau)


def test_the_majority_wins_and_the_earliest_of_a_tie():
    assert br.majority_vote(["1", "2", "2"]) == "2"
    assert br.majority_vote(["3", "1", "1", "3"]) == "3"
    assert br.majority_vote([None, None, "7"]) == "7"
    assert br.majority_vote([None]) is None
    assert br.majority_vote([]) is None


def test_a_nan_is_no_answer():
    """As pandas writes one that is missing."""
    assert br.majority_vote([np.nan, np.nan, "7"]) == "7"


@pytest.mark.parametrize(
    ("answers", "sentence"), [("aab", "answers is 'aab': it must be a list"), ([[1], [1]], r"An answer is \[1\]: give")]
)
def test_what_cannot_vote_is_refused(answers, sentence):
    with pytest.raises(UserError, match=sentence):
        br.majority_vote(answers)


@pytest.mark.parametrize(("n", "c", "k"), SMALL)
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(n, c, k):
    choices = list(combinations([True] * c + [False] * (n - c), k))
    assert br.pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "c", "k"), SMALL)
def test_g_pass_at_k_is_the_hypergeometric_tail(n, c, k):
    for tau in (0.0, 0.25, 0.5, 0.6, 0.75, 1.0):
        tail = stats.hypergeom.sf(max(1, np.ceil(tau * k)) - 1, n, c, k)
        assert br.g_pass_at_k(n, c, k, tau) == pytest.approx(tail)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 4, 4, 1.0),
        (4, 3, 4, 1 / 2),  # of the thresholds 3/4 and 4/4 the first is met
        (4, 2, 4, 0.0),
        (4, 2, 2, 1 / 6),  # one threshold, 2/2: C(2,2) / C(4,2)
        (6, 4, 4, 1 / 2 * (9 / 15 + 1 / 15)),  # >= 3: (C(4,3) C(2,1) + C(4,4)) / 15; 4: C(4,4) / 15
    ],
)
def test_mg_pass_at_k_by_hand(n, c, k, expected):
    assert mg_pass_at_k(n, c, k) == pytest.approx(expected)


def test_mg_pass_at_k_is_the_mean_tail_above_a_half():
    for n, c, k in SMALL:
        if k % 2 == 0:
            tails = [stats.hypergeom.sf(i - 1, n, c, k) for i in range(k // 2 + 1, k + 1)]
            assert mg_pass_at_k(n, c, k) == pytest.approx(np.mean(tails))


def test_mg_pass_at_k_is_refused_for_odd_k():
    with pytest.raises(ValueError, match="even k only"):
        mg_pass_at_k(5, 5, 3)


def test_metrics_of_a_group_by_hand():
    group = replace(
        make_group(
            [True, False, False, True],
            answers=["4", "5", "5", "4"],
            lengths=[2, 4, 6, 8],
            logprobs=[-2.0, -2.0, -9.0, -8.0],  # a token: -1, -.5, -1.5, -1
        ),
        verdicts=["ok", "timeout", "error", "ok"],
        finish_reasons=["stop", "stop", "stop", "length"],
    )
    assert group_metrics(group) == {
        "pass@1": 0.5,
        "pass@2": pytest.approx(5 / 6),  # 1 - C(2,2) / C(4,2)
        "pass@4": 1.0,
        "any": 1.0,
        "all": 0.0,
        "g-pass_0.25": 1.0,
        "g-pass_0.5": 1.0,
        "g-pass_0.75": 0.0,
        "g-pass_1.0": 0.0,
        "mg-pass": 0.0,
        "maj": 1.0,  # a tie: "4" came first, and is right
        "best": 0.0,  # the second row
        "distinct": 2.0,
        "length": 5.0,
        "truncated": 0.25,
        "unparsed": 0.0,
        "unjudged": 0.5,
    }


def test_three_of_four_right_give_half_of_mg_pass():
    found = group_metrics(make_group([True, True, True, False]))
    assert (found["g-pass_0.75"], found["g-pass_1.0"], found["mg-pass"]) == (1.0, 0.0, 0.5)


def test_a_group_of_odd_width_has_no_mg_pass():
    found = group_metrics(make_group([True, True, False]))
    assert "mg-pass" not in found
    assert found["pass@2"] == pytest.approx(1.0)
    assert "pass@4" not in found


def test_rows_without_an_answer_do_not_vote_and_make_no_answer():
    group = replace(
        make_group([False, False, True], answers=[None, None, "7"]), verdicts=["unparsed", "unparsed", "ok"]
    )
    found = group_metrics(group)
    assert (found["maj"], found["distinct"], found["unparsed"]) == (1.0, 1.0, pytest.approx(2 / 3))
    silent = group_metrics(make_group([False, False], answers=[None, None]))
    assert (silent["maj"], silent["distinct"]) == (0.0, 0.0)


def test_the_first_row_with_the_majority_answer_says_whether_it_is_right():
    group = make_group([False, True, False], answers=["9", "4", "4"])
    assert group_metrics(group)["maj"] == 1.0
    group = make_group([False, False, True], answers=["9", "4", "4"])
    assert group_metrics(group)["maj"] == 0.0


def test_best_is_by_mean_logprob_and_an_empty_row_is_last():
    assert best_row(make_group([True, True], lengths=[1, 10], logprobs=[-1.0, -2.0])) == 1
    assert best_row(make_group([True, True], lengths=[0, 10], logprobs=[0.0, -50.0])) == 1
    assert best_row(make_group([True, True], lengths=[5, 5], logprobs=[-1.0, -1.0])) == 0


def brute_force_mixed(shares, k):
    """Chance of j right rows, over every choice of k groups and every outcome of their rows."""
    found, choices = np.zeros(k + 1), list(combinations(shares, k))
    for chosen in choices:
        for outcome in product([0, 1], repeat=k):
            found[sum(outcome)] += np.prod([p if x else 1 - p for p, x in zip(chosen, outcome, strict=True)])
    return found / len(choices)


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in range(1, 7) for k in range(1, n + 1)])
def test_mixing_rows_of_groups_agrees_with_brute_force(n, k):
    shares = np.random.default_rng(n).choice([0.0, 0.25, 0.5, 0.75, 1.0], size=(3, n))
    expected = [brute_force_mixed(of_problem, k) for of_problem in shares]
    np.testing.assert_allclose(mixed_right(shares, k), expected, atol=1e-12)


def test_mixed_metrics_by_hand():
    # Groups of two, one with both rows right, one with one, one with none. Pairs: (1, 1/2), (1, 0), (1/2, 0).
    found = mixed_metrics(np.array([[1.0, 0.5, 0.0]]), 2)
    assert found["mixed/any"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["mixed/all"] == pytest.approx((0.5 + 0 + 0) / 3)
    assert found["mixed/g-pass_0.5"] == pytest.approx(found["mixed/any"])
    assert found["mixed/g-pass_1.0"] == pytest.approx(found["mixed/all"])


def test_mixing_tells_agreement_from_independence():
    agreeing = np.array([[1.0, 1.0, 0.0, 0.0]])  # groups of two that are all right or all wrong: any = all = 1/2
    found = mixed_metrics(agreeing, 2)
    assert found["mixed/any"] == pytest.approx(5 / 6)
    assert found["mixed/all"] == pytest.approx(1 / 6)


def test_mixing_a_group_of_one_row_each_is_pass_at_k():
    shares = np.array([[1.0, 1.0, 0.0, 0.0, 0.0, 1.0]])
    assert mixed_metrics(shares, 4)["mixed/any"] == pytest.approx(br.pass_at_k(6, 3, 4))


def test_mixing_more_groups_than_there_are_is_refused():
    with pytest.raises(ValueError, match="1 <= k <= n"):
        mixed_right(np.array([[0.5]]), 2)


def test_pooled_metrics_by_hand():
    assert pooled_metrics(5, 1) == {"pooled/pass@2": pytest.approx(2 / 5), "pooled/pass@4": pytest.approx(4 / 5)}


def test_least_right_by_hand():
    assert [least_right(4, tau) for tau in (0.0, 0.25, 0.3, 0.5, 0.75, 1.0)] == [1, 1, 2, 2, 3, 4]


def test_bounds_of_metrics():
    assert bounds("pass@1", 4) == (0.0, 1.0)
    assert bounds("distinct", 4) == (0.0, 4.0)
    assert bounds("length", 4) == (0.0, np.inf)
