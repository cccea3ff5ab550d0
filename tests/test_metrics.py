"""Metrics against numbers worked out by hand."""

import math

import pytest

import bridge_rl as br
from bridge_rl.evaluation.metrics import over_problems, set_metrics


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


def test_the_majority_wins_and_the_earliest_of_a_tie():
    assert br.majority_vote(["1", "2", "2"]) == "2"
    assert br.majority_vote(["3", "1", "1", "3"]) == "3"
    assert br.majority_vote([None, None, "7"]) == "7"
    assert br.majority_vote([None]) is None
    assert br.majority_vote([]) is None


def test_set_metrics_by_hand():
    correct = [[[True, False], [True, True]], [[False, False], [False, False]]]
    found = set_metrics(correct)
    assert found["pass@1"].value == pytest.approx((0.75 + 0.0) / 2)
    assert found["any"].value == pytest.approx((1.0 + 0.0) / 2)
    assert found["all"].value == pytest.approx((0.5 + 0.0) / 2)
    # Standard error over the two problems: stdev(0.75, 0) / sqrt(2) = 0.5303 / 1.4142
    assert found["pass@1"].standard_error == pytest.approx(0.375)


def test_the_error_of_one_problem_is_unknown():
    assert math.isnan(over_problems([[1.0, 0.0]]).standard_error)
