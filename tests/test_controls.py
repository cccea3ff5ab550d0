"""The verdicts of the controls on made-up policies, of which it is known whether siblings help."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic import made_groups, policy, renamed

from bridge_rl.evaluation import controls
from bridge_rl.evaluation.controls import (
    Tested,
    at_equal_cost,
    decimal,
    fell,
    gain_is_elsewhere,
    judge_controls,
)
from bridge_rl.evaluation.results import Comparison, Estimate


def outcomes(copy, seeds):
    return [judge_controls(policy(seed, copy, alone=4)).by_width[0].outcome for seed in seeds]


def test_a_planted_effect_is_found_in_19_of_20_seeds():
    assert outcomes(0.3, range(20)).count("helps") >= 19


def test_a_planted_null_is_not_found_in_19_of_20_seeds():
    assert outcomes(0.0, range(20)).count("no difference found") >= 19


@pytest.fixture(scope="module")
def helped():
    return judge_controls(policy(0, 0.3))


@pytest.fixture(scope="module")
def ignored():
    return judge_controls(policy(0, 0.0))


def test_helpful_siblings_are_said_to_help_with_the_numbers(helped):
    first = helped.verdicts[0]
    assert first.startswith("At width 4 siblings help: pass@1 .")
    assert "with shuffled siblings (difference ." in first
    assert "at width 1 (difference ." in first
    assert "with the Bridge disabled (difference ." in first
    assert "95 % interval ." in first
    assert first.count(", p .0003)") == 3  # the least there is, 1 / 10,001, times three
    assert helped.by_width[0].by_control == {"shuffled": "helps", "width 1": "helps", "disabled": "helps"}


def test_where_nothing_helps_equality_is_not_claimed(ignored):
    first = ignored.verdicts[0]
    assert "no difference between rows together and alone was found" in first
    assert "own siblings are not shown to do better than shuffled ones" in first
    assert "one as large as the interval's ends is still possible" in first
    assert ignored.by_width[0].outcome == "no difference found"


def test_the_correction_for_many_comparisons_is_said(helped):
    assert helped.verdicts[-1] == (
        "p values are corrected (Holm) for 3 comparisons of pass@1, 2 comparisons of majority votes; intervals are not."
    )


def test_every_question_is_among_the_comparisons(helped):
    found = [(c.name, c.metric, c.second) for c in helped.comparisons]
    assert found[:4] == [
        ("siblings", "pass@1", "shuffled, width 4"),
        ("siblings", "pass@1", "model, width 1"),
        ("siblings", "pass@1", "disabled, width 1"),
        ("coverage", "any", "model, width 1, 4 rows"),
    ]
    assert [name for name, _, _ in found[4:]] == ["majority vote at equal tokens"] * 2
    assert all(c.first.startswith("model, width 4") and c.problems == 200 for c in helped.comparisons)


def test_few_problems_are_not_enough_to_say_that_shuffled_siblings_do_as_well():
    found = judge_controls(policy(0, 0.0, problems=20))
    assert "do as well" not in found.verdicts[0]
    assert "own siblings are not shown to do better than shuffled ones" in found.verdicts[0]


def test_gain_that_shuffled_siblings_bring_too_is_not_put_down_to_siblings():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(1.5, 1.5, 200)
    lifted = difficulty + 0.2 * (1 - difficulty)  # the Bridge helps, whoever the siblings are
    groups = [
        *made_groups(rng, lifted, "model", 4, 4),
        *made_groups(rng, lifted, "shuffled", 4, 4),
        *made_groups(rng, difficulty, "disabled", 4, 4),
    ]
    found = judge_controls(groups)
    assert found.by_width[0].outcome == "no difference found"
    assert found.by_width[0].by_control == {"shuffled": "no difference found", "disabled": "helps"}
    assert found.verdicts[0].startswith(
        "At width 4 rows do better together than alone; shuffled siblings do as well, so what siblings say is not what "
    )


def test_shuffled_siblings_that_only_distract_do_not_make_own_ones_help():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(1.5, 1.5, 200)
    groups = [
        *made_groups(rng, difficulty, "model", 4, 4),
        *made_groups(rng, difficulty, "model", 1, 16),
        *made_groups(rng, 0.7 * difficulty, "shuffled", 4, 4),
    ]
    found = judge_controls(groups)
    assert found.by_width[0].outcome == "no difference found"
    assert found.verdicts[0].startswith(
        "At width 4 no difference between rows together and alone was found; own siblings do better than shuffled ones"
    )


def test_harmful_siblings_are_said_to_hurt():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(1.5, 1.5, 200)
    groups = [
        *made_groups(rng, 0.7 * difficulty, "model", 4, 4),
        *made_groups(rng, difficulty, "model", 1, 16),
        *made_groups(rng, difficulty, "shuffled", 4, 4),
    ]
    found = judge_controls(groups)
    assert found.by_width[0].outcome == "hurts"
    assert found.verdicts[0].startswith(
        "At width 4 rows do worse together than alone; own siblings do worse than shuffled ones"
    )


def test_coverage_that_falls_while_accuracy_rises_is_said():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(1.5, 1.5, 200)
    one = made_groups(rng, difficulty + 0.15 * (1 - difficulty), "model", 1, 4)
    agreeing = [_repeated(group, 4) for group in renamed(one, width=4)]  # four rows that always agree
    found = judge_controls([*agreeing, *made_groups(rng, difficulty, "model", 1, 16)])
    assert found.by_width[0].by_control["width 1"] == "helps"
    [sentence] = [s for s in found.verdicts if "coverage fell" in s]
    assert sentence.startswith("At width 4 coverage fell while pass@1 rose: some row is right in .")
    assert not any("coverage fell" in s for s in judge_controls(policy(0, 0.3)).verdicts)


def _repeated(group, times):
    names = ("completions", "tokens", "answers", "correct", "verdicts", "finish_reasons", "logprobs")
    return replace(group, **{name: getattr(group, name) * times for name in names})


def test_without_shuffled_siblings_the_reason_stays_open():
    groups = [g for g in policy(0, 0.3) if g.condition == "model"]
    found = judge_controls(groups)
    assert found.by_width[0].outcome == "helps"
    assert "it is open whether what siblings say is the reason" in found.verdicts[0]


def test_every_width_gets_a_verdict_and_all_are_corrected_together():
    groups = policy(0, 0.3)
    rng = np.random.default_rng(100)
    groups += made_groups(rng, rng.beta(1.5, 1.5, 200), "shuffled", 2, 8)
    groups += made_groups(rng, rng.beta(1.5, 1.5, 200), "model", 2, 8)
    found = judge_controls(groups)
    assert [verdict.width for verdict in found.by_width] == [2, 4]
    assert "6 comparisons of pass@1" in found.verdicts[-1]
    assert "4 comparisons of majority votes" in found.verdicts[-1]
    assert found.verdicts[1].count(", p .0006)") == 3


def made_test(control, value, high=1.0, p=0.01, uncorrected=0.01):
    found = Comparison("", "pass@1", "", "", Estimate(value, value - 0.01, high), uncorrected, 10)
    return Tested(4, control, found, 0.5, 0.5, p)


def test_an_effect_is_one_by_the_corrected_p():
    assert made_test("disabled", 0.1, p=0.06, uncorrected=0.03).outcome == "no difference found"
    assert [made_test("disabled", value).outcome for value in (0.1, -0.1)] == ["helps", "hurts"]


@pytest.mark.parametrize(("high", "elsewhere"), [(0.04, True), (0.06, False)])
def test_shuffled_siblings_do_as_well_where_less_than_half_of_the_smallest_gain_may_be_lost(high, elsewhere):
    tests = [made_test("shuffled", 0.01, high, p=0.5), made_test("width 1", 0.1), made_test("disabled", 0.2)]
    assert gain_is_elsewhere(tests) is elsewhere


def test_coverage_fell_only_where_accuracy_rose_against_the_same_rows():
    lost = made_test("width 1", -0.1)
    assert fell(lost, [made_test("width 1", 0.1)])
    assert not fell(lost, [made_test("disabled", 0.1), made_test("width 1", 0.1, p=0.5)])


def test_a_control_is_compared_on_the_problems_that_both_have():
    found = controls.tested(4, "disabled", "", "pass@1", {0: 0.5, 1: 0.75, 2: 0.0}, {0: 0.25, 1: 0.5, 3: 1.0}, "a", "b")
    assert (found.first, found.second) == (0.625, 0.375)
    assert found.comparison.difference.value == pytest.approx(0.25)


def test_shuffled_siblings_alone_do_not_show_that_siblings_help():
    """They may distract."""
    found = judge_controls([g for g in policy(0, 0.3) if g.width == 4])
    assert found.verdicts[0].startswith("At width 4 own siblings do better than shuffled ones: pass@1 ")


def test_of_disabled_rows_of_another_width_those_of_the_most_are_taken():
    rng = np.random.default_rng(0)
    difficulty = np.full(20, 0.5)
    groups = [
        *made_groups(rng, difficulty, "model", 4, 2),
        *made_groups(rng, difficulty, "disabled", 1, 4),
        *made_groups(rng, difficulty, "disabled", 2, 4),
    ]
    assert judge_controls(groups).comparisons[0].second == "disabled, width 2"
    groups += made_groups(rng, difficulty, "disabled", 4, 1)
    assert judge_controls(groups).comparisons[0].second == "disabled, width 4"


def test_without_controls_there_is_nothing_to_say():
    found = judge_controls([g for g in policy(0, 0.3, problems=5) if (g.condition, g.width) == ("model", 4)])
    assert (found.comparisons, found.verdicts, found.by_width) == ([], [], [])


def test_too_few_independent_rows_are_not_called_equal_cost():
    rng = np.random.default_rng(0)
    groups = made_groups(rng, np.full(20, 0.5), "model", 4, 1) + made_groups(rng, np.full(20, 0.5), "model", 1, 2)
    found = judge_controls(groups)
    assert found.comparisons[-1].name == "majority vote against fewer tokens"
    assert "at lower cost (too few were sampled for equal tokens)" in " ".join(found.verdicts)
    assert not any(c.name == "coverage" for c in found.comparisons)  # nor are there four rows to compare with


def test_methods_stand_beside_independent_rows_of_equal_cost():
    found = at_equal_cost(policy(0, 0.3))
    majority = {(a.condition, a.width, a.samples): a for a in found if a.method == "majority"}
    assert list(majority) == [("model", 1, 1), ("disabled", 1, 1), ("model", 4, 4), ("model", 1, 4), ("disabled", 1, 4)]
    per_row = majority["model", 1, 1].tokens
    for aggregated in majority.values():
        if aggregated.samples == 4:
            assert abs(aggregated.tokens - majority["model", 4, 4].tokens) < per_row
    assert majority["model", 4, 4].accuracy.value > majority["disabled", 1, 4].accuracy.value
    assert len(found) == 10


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5229, ".523"), (-0.041, "-.041"), (1.0, "1.000"), (-0.0001, ".000"), (0.0, ".000"), (10.5, "10.500")],
)
def test_numbers_as_papers_write_them(value, text):
    assert decimal(value) == text
