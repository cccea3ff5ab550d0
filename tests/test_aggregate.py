"""Summaries, comparisons, voted answers and length curves, against numbers worked out by hand."""

import math
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from synthetic import made_groups, make_group, policy, renamed

from bridge_rl.errors import UserError
from bridge_rl.evaluation.aggregate import (
    aggregate_answers,
    compare,
    length_curve,
    regroup,
    samples_at_equal_cost,
    summarize,
)
from bridge_rl.evaluation.intervals import estimate, paired_estimates
from bridge_rl.evaluation.results import Results, read_results, write_results


def test_a_summary_by_hand():
    groups = [
        make_group([True, False], problem=0, group=0),
        make_group([True, True], problem=0, group=1),
        make_group([False, False], problem=1, group=0),
        make_group([False, False], problem=1, group=1),
    ]
    [found] = summarize(groups)
    assert (found.condition, found.width, found.problems, found.groups_per_problem) == ("model", 2, 2, 2)
    values = {name: found.metrics[name].value for name in ("pass@1", "any", "all", "mixed/any", "mixed/all")}
    # Problem 0: rows .75, any 1, all .5; one row of each group: any 1 (the second is right), all .5. Problem 1: all 0.
    assert values == pytest.approx({"pass@1": 0.375, "any": 0.5, "all": 0.25, "mixed/any": 0.5, "mixed/all": 0.25})
    assert "pooled/pass@2" not in found.metrics


def test_summaries_are_one_a_condition_and_width_the_model_first():
    found = summarize(list(reversed(policy(0, 0.3, problems=5))))
    assert [(s.condition, s.width) for s in found] == [("model", 1), ("model", 4), ("shuffled", 4), ("disabled", 1)]
    assert [s.groups_per_problem for s in found] == [16, 4, 4, 16]


def test_mixed_metrics_need_as_many_groups_as_rows():
    groups = [make_group([True, False, True, False], problem=0, group=g) for g in range(4)]
    groups += [make_group([True, True, True, True], problem=1, group=g) for g in range(3)]
    [found] = summarize(groups)
    assert found.metrics["mixed/any"].value == pytest.approx(1 - 0.5**4)  # of problem 0 alone
    assert found.metrics["any"].value == 1.0
    assert found.groups_per_problem == 3
    [few] = summarize(groups[4:])
    assert not any(name.startswith("mixed/") for name in few.metrics)


def test_rows_of_width_one_are_not_mixed_but_pooled():
    [found] = summarize([make_group([g == 0], group=g) for g in range(4)])
    assert found.metrics["pooled/pass@2"].value == pytest.approx(0.5)
    assert not any(name.startswith("mixed/") for name in found.metrics)


def test_pooling_is_for_independent_rows_only():
    groups = [
        make_group([True, False], condition="disabled"),
        make_group([False, False], condition="disabled", group=1),
    ]
    [found] = summarize(groups)
    assert found.metrics["pooled/pass@4"].value == 1.0
    assert found.metrics["pooled/pass@2"].value == pytest.approx(0.5)  # 1 - C(3,2) / C(4,2)
    for condition in ("model", "shuffled"):
        [found] = summarize(renamed(groups, condition=condition))
        assert not any(name.startswith("pooled/") for name in found.metrics)


def test_within_a_group_and_mixed_differ_where_rows_agree():
    agreeing = [make_group([g % 2 == 0] * 2, group=g) for g in range(4)]
    [found] = summarize(agreeing)
    assert (found.metrics["any"].value, found.metrics["all"].value) == (0.5, 0.5)
    assert found.metrics["mixed/any"].value == pytest.approx(5 / 6)  # of 6 pairs one is wrong twice
    assert found.metrics["mixed/all"].value == pytest.approx(1 / 6)


def test_summaries_survive_the_results_file(tmp_path):
    summaries = summarize(policy(0, 0.3, problems=3))
    write_results(Results({}, summaries), tmp_path / "results.json")
    assert read_results(tmp_path / "results.json").summaries == summaries


def test_a_comparison_by_hand():
    first = [make_group([True, True], problem=p) for p in range(3)] + [make_group([True, True], problem=9)]
    second = [make_group([p == 0, False], condition="shuffled", problem=p) for p in range(3)]
    found = compare(first, second, "pass@1", "siblings")
    assert found.difference.value == pytest.approx((0.5 + 1 + 1) / 3)
    assert found.p == pytest.approx(2 / 8)  # all three favour the first
    assert found.difference == paired_estimates(np.array([[0.5], [1.0], [1.0]]), [1.0])[0]
    assert (found.problems, found.first, found.second) == (3, "model, width 2", "shuffled, width 2")
    assert compare(second, first, "pass@1", "siblings", "a", "b").difference.value == pytest.approx(-2.5 / 3)


def test_the_interval_of_a_paired_difference_is_narrower_than_that_of_either_side():
    groups = policy(1, 0.3)
    model = [g for g in groups if (g.condition, g.width) == ("model", 4)]
    shuffled = [g for g in groups if g.condition == "shuffled"]
    difference = compare(model, shuffled, "pass@1", "siblings").difference
    [side] = summarize(model)
    value = side.metrics["pass@1"]
    assert difference.high - difference.low < value.high - value.low


def test_a_difference_in_distinct_answers_may_be_as_large_as_the_width():
    first = [make_group([False] * 4, problem=p) for p in range(3)]  # four answers each
    second = [make_group([True] * 4, problem=p) for p in range(3)]
    found = compare(first, second, "distinct", "siblings")
    assert found.difference == paired_estimates(np.full((3, 1), 3.0), [4.0])[0]


def test_lengths_can_be_compared():
    first = [make_group([True], lengths=[10 + p], problem=p) for p in range(4)]
    second = [make_group([True], lengths=[5], problem=p) for p in range(4)]
    found = compare(first, second, "length", "length")
    assert found.difference.value == pytest.approx(6.5)  # 5, 6, 7, 8
    assert 3 < found.difference.low < 6.5 < found.difference.high < 10
    same = compare(first, first, "length", "length")  # no bound says how large a difference could be
    assert (same.difference.value, same.difference.low, same.p) == (0.0, None, 1.0)


def test_runs_without_a_common_problem_or_metric_are_refused():
    first, second = [make_group([True, True], problem=0)], [make_group([True, True], problem=1)]
    with pytest.raises(UserError, match="no problem in common"):
        compare(first, second, "pass@1", "runs")
    with pytest.raises(UserError, match=r"has no metric pass@8: it has pass@1, pass@2"):
        compare(first, first, "pass@8", "runs")


def test_regrouping_keeps_every_row_and_its_order():
    groups = [make_group([g % 2 == 0], lengths=[g + 1], group=g) for g in range(7)]
    groups = [replace(group, correct_at={8: [True]}, logprobs=[-float(n)]) for n, group in enumerate(groups)]
    found = regroup(groups, 3)
    assert [g.correct for g in found] == [[True, False, True], [False, True, False]]  # the seventh fills no group
    assert [[len(t) for t in g.tokens] for g in found] == [[1, 2, 3], [4, 5, 6]]
    assert [g.logprobs for g in found] == [[-0.0, -1.0, -2.0], [-3.0, -4.0, -5.0]]
    assert [g.correct_at for g in found] == [{8: [True] * 3}] * 2
    assert [(g.width, g.group) for g in found] == [(3, 0), (3, 1)]
    assert len(regroup([make_group([True] * 4, condition="disabled")], 2)) == 2
    groups[1] = replace(groups[1], correct_at={})  # a limit that not all rows of the problem were judged at
    assert [g.correct_at for g in regroup(groups, 3)] == [{}, {}]


@pytest.mark.parametrize("condition", ["model", "shuffled"])
def test_rows_that_heard_each_other_are_not_regrouped(condition):
    with pytest.raises(ValueError, match="cannot be regrouped"):
        regroup([make_group([True, False], condition=condition)], 1)


def test_majority_and_best_of_n_by_hand():
    groups = [
        make_group([True, True, False], problem=0, logprobs=[-9.0, -8.0, -1.0]),  # majority right, best wrong
        make_group([False, False, True], answers=["5", "6", "4"], problem=1, logprobs=[-9.0, -8.0, -1.0]),  # tie: "5"
    ]
    majority, best = aggregate_answers(groups, "majority"), aggregate_answers(groups, "best-of-n")
    assert (majority.accuracy, best.accuracy) == (estimate([[1.0], [0.0]]), estimate([[0.0], [1.0]]))
    assert (majority.method, majority.condition, majority.width, majority.samples) == ("majority", "model", 3, 3)
    assert majority.tokens == 12.0


def test_a_users_function_chooses_a_row_or_an_answer():
    seen = []

    def longest(rows):
        seen.append(rows)
        return max(range(len(rows)), key=lambda i: rows[i]["tokens"])

    group = make_group([False, True], lengths=[2, 9], logprobs=[-1.0, -3.0])
    found = aggregate_answers([group], longest)
    assert (found.method, found.accuracy.value) == ("longest", 1.0)
    assert seen == [
        [
            {"completion": "text 0", "answer": "w0", "logprob": -1.0, "tokens": 2},
            {"completion": "text 1", "answer": "r", "logprob": -3.0, "tokens": 9},
        ]
    ]
    assert aggregate_answers([group], lambda rows: "r").accuracy.value == 1.0
    assert aggregate_answers([group], lambda rows: np.int64(0)).accuracy.value == 0.0
    assert aggregate_answers([group], lambda rows: None).accuracy.value == 0.0


@pytest.mark.parametrize("choice", [2, -1, "43", 0.5, True])
def test_a_users_function_that_chooses_no_row_is_refused(choice):
    def wild(rows):
        return choice

    with pytest.raises(UserError, match=r"wild chose .* of problem 0: give the index of a row, from 0 to 1"):
        aggregate_answers([make_group([True, False])], wild)


def test_an_unknown_way_to_aggregate_is_refused():
    with pytest.raises(UserError, match="named 'mean'"):
        aggregate_answers([make_group([True])], "mean")


def test_independent_rows_vote_in_sets_of_any_size():
    groups = [make_group([right], group=g) for g, right in enumerate([True, False, True, False, False, False])]
    found = aggregate_answers(groups, "majority", 3)
    assert (found.width, found.samples, found.tokens) == (1, 3, 12.0)
    assert found.accuracy.value == 0.5  # r, w, r against w, w, w
    assert aggregate_answers(groups, "majority").samples == 1


def test_a_bridges_groups_vote_only_as_they_were_sampled():
    with pytest.raises(ValueError, match="cannot be regrouped"):
        aggregate_answers([make_group([True, False])], "majority", 4)


def test_equal_cost_is_equal_tokens_to_within_half_a_row():
    rng = np.random.default_rng(0)
    bridge = made_groups(rng, np.full(50, 0.5), "model", 4, 2)
    alone = made_groups(rng, np.full(50, 0.5), "disabled", 1, 12)
    bridge = [replace(g, tokens=[t * 2 for t in g.tokens]) for g in bridge]  # a Bridge that writes twice as much
    k = samples_at_equal_cost(bridge, alone)
    assert k == 8
    cost, spent = (aggregate_answers(*arguments).tokens for arguments in ((bridge, "majority"), (alone, "majority", k)))
    per_row = aggregate_answers(alone, "majority", 1).tokens
    assert abs(cost - spent) < per_row


def test_equal_cost_ends_at_what_was_sampled():
    bridge = [make_group([True] * 4, lengths=[10] * 4)]
    alone = [make_group([True], lengths=[4], group=g) for g in range(5)]
    assert samples_at_equal_cost(bridge, alone) == 5  # ten would cost as much
    bridge += [make_group([True] * 4, problem=1, lengths=[10] * 4)]
    alone += [make_group([True], problem=1, lengths=[4], group=g) for g in range(7)]
    assert samples_at_equal_cost(bridge, alone) == 5  # as every problem has
    assert samples_at_equal_cost([make_group([True] * 2, lengths=[0, 1])], alone) == 1


def test_what_a_group_costs_is_a_mean_over_problems():
    """Of 2 tokens in each of three groups of one problem, and of 10 in the one group of another."""
    groups = [make_group([True], lengths=[2], group=g) for g in range(3)] + [
        make_group([True], problem=1, lengths=[10])
    ]
    assert aggregate_answers(groups).tokens == 6.0


def test_a_length_curve_by_hand():
    cut = {2: [False, False], 4: [True, False], 8: [True, True]}
    group = replace(
        make_group([True, True], lengths=[4, 8]), correct_at=cut, finish_reasons=["stop", "length"], condition="model"
    )
    other = replace(
        make_group([False, False], problem=1, lengths=[1, 1]), correct_at={n: [False] * 2 for n in (2, 4, 8)}
    )
    # The second problem has one group more, and weighs the same.
    found = length_curve([group, other, replace(other, group=1)])
    assert [point.limit for point in found] == [2, 4, 8]
    assert [point.accuracy for point in found] == [estimate([[right], [0.0, 0.0]]) for right in (0.0, 0.5, 1.0)]
    # At 2 both rows of the first problem are longer, at 4 the second (the first ends there), at 8 sampling itself
    # stopped there.
    assert [point.truncated for point in found] == [0.5, 0.25, 0.25]


def test_a_length_curve_has_the_limits_that_all_groups_have():
    first = replace(make_group([True]), correct_at={4: [True], 8: [True]})
    second = replace(make_group([True], problem=1), correct_at={8: [True]})
    assert [point.limit for point in length_curve([first, second])] == [8]
    assert length_curve([make_group([True])]) == []


def test_coverage_grows_with_k_and_g_pass_falls_with_tau():
    for summary in summarize(policy(2, 0.3, problems=30)):
        values = {name: estimate.value for name, estimate in summary.metrics.items()}
        by_k = [values[name] for name in ("pass@1", "pass@2", "pass@4", "pass@8") if name in values]
        by_tau = [values[f"g-pass_{tau}"] for tau in (0.25, 0.5, 0.75, 1.0)]
        assert all(a <= b + 1e-12 for a, b in pairwise(by_k))
        assert all(a >= b - 1e-12 for a, b in pairwise(by_tau))
        assert math.isclose(by_tau[-1], values["all"])


def test_summaries_of_512_problems_at_four_widths_are_quick():
    rng = np.random.default_rng(0)
    difficulty = rng.random(512)
    groups = [g for width in (1, 2, 4, 8) for g in made_groups(rng, difficulty, "model", width, 8 // width)]
    start = time.process_time()
    summarize(groups)
    assert time.process_time() - start < 3.0
