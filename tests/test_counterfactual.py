"""A row among siblings whose words are given, against the rollout and the full-sequence oracle; and the bookkeeping."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ALL_FAMILIES, make_bridged

import bridge_rl as br
from bridge_rl.errors import UserError
from bridge_rl.evaluation.counterfactual import (
    KINDS,
    Outcome,
    SampledRow,
    choose_trials,
    compare,
    run_counterfactuals,
    summarize,
)
from bridge_rl.evaluation.forced import ForcedGroup, in_batches, sample_free_rows, score_free_rows
from bridge_rl.evaluation.judge import Judged
from bridge_rl.evaluation.probes import probe_blocks, run_probes
from bridge_rl.evaluation.samples import SampledGroup
from bridge_rl.surgery import find_state

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31]]
# Several ends make rows finish at different steps.
PARAMS = br.SamplingParams(max_new_tokens=20, seed=3, eos_token_id=[2, 4, 5, 6, 7, 8])
WIDTH = 3


def forced_rows(groups, prompts=PROMPTS):
    """Every row of every group once as the free one, its own siblings beside it."""
    return [
        (ForcedGroup([prompt] * WIDTH, group.tokens, place, index), group.tokens[place], group.logprobs[place])
        for index, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for place in range(WIDTH)
    ]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_beside_its_own_siblings_a_row_says_what_it_said(family):
    """All rows of four prompts of different lengths in one batch: the same tokens, reasons and log-probs."""
    model = make_bridged(family)
    groups = br.generate_groups(model, PROMPTS, WIDTH, PARAMS)
    assert len({len(row) for group in groups for row in group.tokens}) >= 3, "the finishes are not ragged"
    forced = forced_rows(groups)
    rows = sample_free_rows(model, [of for of, _, _ in forced], PARAMS)
    assert [row.tokens for row in rows] == [tokens for _, tokens, _ in forced]
    assert [row.finish_reason for row in rows] == [reason for group in groups for reason in group.finish_reasons]
    for row, (_, _, logprobs) in zip(rows, forced, strict=True):
        assert row.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_scores_beside_own_siblings_equal_the_oracle(family, max_tokens):
    model = make_bridged(family)
    groups = br.generate_groups(model, PROMPTS, WIDTH, PARAMS)
    oracle = [row for group in br.group_logprobs(model, PROMPTS, [group.tokens for group in groups]) for row in group]
    scores = score_free_rows(model, [of for of, _, _ in forced_rows(groups)], max_tokens=max_tokens)
    for ours, theirs in zip(scores, oracle, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_sampling_and_scoring_agree_beside_strangers_with_their_own_prompts(family):
    """A row, between one of another problem that outlasts it and one that does not; then scored on what it said."""
    model = make_bridged(family)
    groups = br.generate_groups(model, PROMPTS, WIDTH, PARAMS)
    longest = max(groups, key=lambda group: max(map(len, group.tokens)))
    stranger = max(longest.tokens, key=len)
    for index, group in enumerate(groups):
        prompts = [PROMPTS[groups.index(longest)], PROMPTS[index], [40, 41, 42]]
        beside = ForcedGroup(prompts, [stranger, group.tokens[1], [43, 2]], 1, index)
        [row] = sample_free_rows(model, [beside], PARAMS)
        said = ForcedGroup(prompts, [stranger, row.tokens, [43, 2]], 1, index)
        [scores] = score_free_rows(model, [said])
        assert row.logprobs == pytest.approx(scores, abs=1e-5)


def test_siblings_that_say_something_else_are_heard(family):
    model = make_bridged(family)
    groups = br.generate_groups(model, PROMPTS, WIDTH, PARAMS)
    own = ForcedGroup([PROMPTS[0]] * 3, groups[0].tokens, 0, 0)
    other_words = ForcedGroup([PROMPTS[0]] * 3, [groups[0].tokens[0], *groups[1].tokens[1:]], 0, 0)
    other_prompt = ForcedGroup([PROMPTS[0], PROMPTS[1], PROMPTS[1]], other_words.completions, 0, 0)
    scores = torch.tensor(score_free_rows(model, [own, other_words, other_prompt]))
    # The first token is predicted at the prompt's last column, where each row is alone.
    torch.testing.assert_close(scores[:, 0], scores[0, 0].expand(3), atol=1e-5, rtol=0)
    assert (scores[0, 1:] - scores[1, 1:]).abs().max() > 1e-2
    assert (scores[1, 1:] - scores[2, 1:]).abs().max() > 1e-3, "the siblings' own prompts made no difference"


def test_a_sibling_is_gone_after_its_last_token():
    """What pads a sibling that has ended is not heard: the row says what it says in a batch without padding."""
    model = make_bridged("llama")
    short = ForcedGroup([[5, 6]] * 2, [[9] * 12, [10, 2]], 0, 0)
    long = ForcedGroup([[5, 6]] * 2, [[9] * 12, [11] * 20], 0, 1)
    params = br.SamplingParams(max_new_tokens=20, seed=3, eos_token_id=49)
    alone, _ = sample_free_rows(model, [short], params), sample_free_rows(model, [long], params)
    together = sample_free_rows(model, [short, long], params)
    assert alone[0].tokens == together[0].tokens
    assert alone[0].logprobs == pytest.approx(together[0].logprobs, abs=1e-5)


def test_a_row_sampled_anew_uses_the_draws_of_its_group_and_place():
    """Equal prompts, words and siblings: only the index and the place tell rows apart."""
    model = make_bridged("llama")
    words = [[20, 21, 22]] * 3
    groups = [ForcedGroup([[5, 6]] * 3, words, place, index) for index in (0, 1) for place in (0, 1)]
    rows = sample_free_rows(model, [*groups, groups[0]], PARAMS)
    said = [tuple(row.tokens) for row in rows]
    assert len(set(said[:4])) == 4
    assert said[4] == said[0]


def test_batches_hold_what_fits_and_at_least_one():
    # 2 rows each; a prompt and a completion of 4 and 6, 1 and 9 need 2 * 2 * (4 + 9) = 52 together.
    shapes = [(2, 4, 6), (2, 1, 9), (2, 1, 1)]
    assert list(in_batches(shapes, lambda shape: shape, 52)) == [shapes[:2], shapes[2:]]
    assert list(in_batches(shapes, lambda shape: shape, 51)) == [shapes[:1], shapes[1:]]
    assert list(in_batches(shapes, lambda shape: shape, 39)) == [[shape] for shape in shapes]
    assert list(in_batches(shapes, lambda shape: shape, 1)) == [[shape] for shape in shapes]


# -- bookkeeping ----------------------------------------------------------------------------------------------------


def sampled(problem, group, correct, verdicts=None, width=3):
    """A group whose rows say their problem, group and place."""
    return SampledGroup(
        condition="model",
        width=width,
        problem=problem,
        group=group,
        completions=[""] * width,
        tokens=[[10 + problem, 20 + group, 30 + place, 2] for place in range(width)],
        answers=[f"{problem}/{group}/{place}" for place in range(width)],
        correct=correct,
        verdicts=verdicts or ["ok"] * width,
        finish_reasons=["stop"] * width,
        logprobs=[-1.0] * width,
    )


def names(rows):
    return [row.answer for row in rows]


def test_rows_are_tried_only_where_every_kind_of_sibling_exists():
    groups = [
        sampled(0, 0, [True, False, False]),
        sampled(1, 0, [False, False, False]),  # no right one
        sampled(2, 0, [True, True, False]),  # no other wrong one
        sampled(3, 0, [True, False, False], ["ok", "timeout", "ok"]),  # no other that was judged
        sampled(4, 0, [True, False, False], ["ok", "unparsed", "ok"]),
    ]
    assert names(trial.row for trial in choose_trials(groups, 64, 0)) == ["0/0/1", "0/0/2", "4/0/1", "4/0/2"]
    assert choose_trials(groups[:1], 64, 0) == [], "there is no other problem"


def test_siblings_are_of_their_kind_and_of_other_groups_first():
    groups = [
        sampled(0, 0, [True, False, True]),
        sampled(0, 1, [False, True, False]),
        sampled(1, 0, [True, True, True]),
        sampled(2, 0, [True, True, True]),
    ]
    trials = {trial.row.answer: trial.siblings for trial in choose_trials(groups, 64, 0)}
    assert sorted(trials) == ["0/0/1", "0/1/0", "0/1/2"]
    siblings = trials["0/0/1"]
    assert names(siblings["own"]) == ["0/0/0", "0/0/2"]
    assert sorted(names(siblings["wrong"])) == ["0/1/0", "0/1/2"]
    assert names(siblings["right"])[0] == "0/1/1", "the right row of the other group comes first"
    assert names(siblings["right"])[1] in ("0/0/0", "0/0/2")
    assert {row.problem for row in siblings["other_prompt"]} == {1, 2}, "strangers are of different problems"
    # One wrong row in the other group, and one other in its own.
    assert names(trials["0/1/0"]["wrong"]) == ["0/0/1", "0/1/2"]


def test_too_few_siblings_of_a_kind_are_put_in_twice():
    [first, *_] = choose_trials([sampled(0, 0, [True, False, False]), sampled(1, 0, [True] * 3)], 64, 0)
    assert names(first.siblings["right"]) == ["0/0/0", "0/0/0"]
    assert names(first.siblings["wrong"]) == ["0/0/2", "0/0/2"]


def test_the_choice_is_seeded_and_a_rows_siblings_do_not_depend_on_it():
    groups = [sampled(problem, group, [True, False, False]) for problem in range(10) for group in range(2)]
    few, again, other = (choose_trials(groups, 8, seed) for seed in (0, 0, 1))
    assert few == again
    assert names(trial.row for trial in few) != names(trial.row for trial in other)
    assert len(few) == 8
    every = {trial.row.answer: trial.siblings for trial in choose_trials(groups, 64, 0)}
    assert len(every) == 40
    assert all(trial.siblings == every[trial.row.answer] for trial in few)


def test_a_forced_group_keeps_the_rows_place_and_gives_strangers_their_prompts():
    groups = [sampled(0, 0, [True, False, False]), sampled(1, 0, [True] * 3), sampled(2, 0, [True] * 3)]
    trial = choose_trials(groups, 64, 0)[0]
    assert trial.row == SampledRow(groups[0], 1)
    forced = trial.forced("other_prompt", [[5], [6, 6], [7, 7, 7]], index=9)
    assert (forced.free, forced.index) == (1, 9)
    assert forced.prompts[1] == [5]
    assert forced.completions[1] == groups[0].tokens[1]
    assert sorted(map(len, forced.prompts)) == [1, 2, 3]
    for prompt, completion in zip(forced.prompts, forced.completions, strict=True):
        assert completion[0] == 10 + len(prompt) - 1, "words and prompt are of different problems"


def test_outcomes_by_hand():
    trials = choose_trials([sampled(0, 0, [True, False, False]), sampled(1, 0, [True] * 3)], 64, 0)
    judged = [Judged(["0/0/1"], [False], ["ok"]), Judged(["else"], [True], ["ok"])]
    found = compare(trials, judged, [-6.0, -2.0], before=[-4.0, -4.0])  # of four tokens each
    assert found == [Outcome(0, False, False, -0.5), Outcome(0, True, True, 0.5)]


def test_every_problem_weighs_the_same():
    """Problem 0: one of two rows changed, none became right. Problem 1: its one row changed and became right."""
    outcomes = [Outcome(0, True, False, -0.2), Outcome(0, False, False, 0.0), Outcome(1, True, True, 0.5)]
    # Beside wrong siblings the second row of problem 0 became right, and that of problem 1 did not.
    beside_wrong = [Outcome(0, False, False, 0.0), Outcome(0, True, True, 0.0), Outcome(1, False, False, 0.0)]
    # Beside another prompt's the first row of problem 0 and that of problem 1 became right.
    beside_others = [Outcome(0, True, True, 0.0), Outcome(0, False, False, 0.0), Outcome(1, True, True, 0.0)]
    beside: dict = {"right": outcomes, "wrong": beside_wrong, "other_prompt": beside_others}
    found = summarize("right", beside)
    assert (found.siblings, found.rows) == ("right", 3)
    assert found.changed.value == pytest.approx(0.75)
    assert found.became_right.value == pytest.approx(0.5)
    assert found.logprob.value == pytest.approx(0.2)
    assert found.over_wrong.value == pytest.approx((-0.5 + 1) / 2)
    assert found.over_other_prompt.value == pytest.approx((-0.5 + 0) / 2)
    assert found.over_other_prompt.low < -0.25 < found.over_other_prompt.high
    assert summarize("wrong", beside).over_wrong is None
    assert summarize("wrong", beside).over_other_prompt.value == pytest.approx((0.0 - 1) / 2)
    assert summarize("other_prompt", beside).over_other_prompt is None
    assert 0 <= found.changed.low < 0.75 < found.changed.high <= 1
    assert found.logprob.low < 0.2 < found.logprob.high


class Tokenizer:
    """Writes ids as numbers."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]

    def __call__(self, prompts):
        return {"input_ids": [list(map(int, prompt.split())) for prompt in prompts]}


ROWS = [{"prompt": " ".join(map(str, prompt)), "problem": str(n), "answer": ""} for n, prompt in enumerate(PROMPTS)]


def judge(rows, completions, tokens):
    """The answer is the sum of the ids, and right where it is even."""
    judged = []
    for row, texts, ids in zip(rows, completions, tokens, strict=True):
        assert row in ROWS
        answers = [str(sum(map(int, text.split()))) for text in texts]
        assert answers == [str(sum(row)) for row in ids]
        judged.append(Judged(answers, [int(answer) % 2 == 0 for answer in answers], ["ok"] * len(texts)))
    return judged


def sample_two_groups_a_problem(model, params=PARAMS, width=WIDTH):
    """Groups as an evaluation leaves them; their index is 2 * problem + group."""
    pairs = [(problem, group) for problem in range(len(PROMPTS)) for group in range(2)]
    indices = [index_of_pair(*pair) for pair in pairs]
    made = br.generate_groups(model, [PROMPTS[problem] for problem, _ in pairs], width, params, indices)
    texts = [Tokenizer().batch_decode(group.tokens, True) for group in made]
    judged = judge([ROWS[problem] for problem, _ in pairs], texts, [group.tokens for group in made])
    return [
        SampledGroup(
            "model",
            width,
            *pair,
            text,
            group.tokens,
            verdict.answers,
            verdict.correct,
            verdict.verdicts,
            group.finish_reasons,
            [sum(row) for row in group.logprobs],
        )
        for pair, text, group, verdict in zip(pairs, texts, made, judged, strict=True)
    ]


def index_of_pair(problem, group):
    return 2 * problem + group


def index_of(group):
    return index_of_pair(group.problem, group.group)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_own_siblings_change_nothing_and_others_do(temperature):
    model = make_bridged("llama")
    params = br.SamplingParams(20, temperature, seed=3, eos_token_id=[2, 4, 5, 6, 7, 8])
    groups = sample_two_groups_a_problem(model, params)
    told = []
    found = run_counterfactuals(
        model,
        Tokenizer(),
        ROWS,
        PROMPTS,
        groups,
        params,
        index_of,
        judge,
        rows_at_once=6,
        progress=lambda done, total: told.append((done, total)),
    )
    assert tuple(result.siblings for result in found) == KINDS
    own, *others = found
    assert own.rows == len(choose_trials(groups, 64, 0)) >= 5
    assert (own.changed.value, own.became_right.value) == (0, 0)
    assert own.logprob.value == pytest.approx(0, abs=1e-5)
    for other in others:
        assert other.rows == own.rows
        assert other.changed.value > 0.3, "these blocks' weights are large: other words must be heard"
        assert 0 < other.became_right.value <= other.changed.value, "wrong rows that became right have changed"
        assert abs(other.logprob.value) > 1e-3
    assert told[-1] == (4 * own.rows, 4 * own.rows)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) == 4 * math.ceil(own.rows / 2)  # two groups of three rows at once


def test_draws_of_another_seed_show_in_the_noise_floor():
    """The check with own siblings must then fail, or it would check nothing."""
    model = make_bridged("llama")
    groups = sample_two_groups_a_problem(model)
    wrong_seed = br.SamplingParams(20, seed=4, eos_token_id=[2, 4, 5, 6, 7, 8])
    own, *_ = run_counterfactuals(model, Tokenizer(), ROWS, PROMPTS, groups, wrong_seed, index_of, judge)
    assert own.changed.value > 0.3


def test_rows_that_cannot_hear_each_other_are_not_tried():
    model = make_bridged("llama", kind="pmatch")
    groups = sample_two_groups_a_problem(model)
    assert run_counterfactuals(model, Tokenizer(), ROWS, PROMPTS, groups, PARAMS, index_of, judge) == []
    model = make_bridged("llama")
    groups = sample_two_groups_a_problem(model, width=1)
    assert run_counterfactuals(model, Tokenizer(), ROWS, PROMPTS, groups, PARAMS, index_of, judge) == []


def test_probes_of_an_evaluation_take_one_width_of_the_model_as_it_is(monkeypatch):
    """And watch the blocks on so many groups at most: here on the first of each problem."""
    monkeypatch.setattr("bridge_rl.evaluation.probes.WATCHED", len(PROMPTS))
    model = make_bridged("llama")
    groups = sample_two_groups_a_problem(model)
    others = [*sample_two_groups_a_problem(model, width=2), replace(groups[0], condition="shuffled")]
    first = probe_blocks(model, PROMPTS, [group.tokens for group in groups if group.group == 0])
    state = find_state(model)
    state.width, state.enabled = 2, False
    model.train()
    found = run_probes(model, Tokenizer(), ROWS, [*others, *groups], WIDTH, PARAMS, index_of, judge, max_rows=4)
    assert (state.width, state.enabled, model.training) == (2, False, True)
    assert replace(found, counterfactuals=first.counterfactuals) == first
    assert (found.width, found.groups, found.layers) == (3, 4, [0, 1, 2])
    assert [result.rows for result in found.counterfactuals] == [4] * 4
    assert all(math.isfinite(result.changed.value) for result in found.counterfactuals)
    with pytest.raises(UserError, match="no groups of width 8"):
        run_probes(model, Tokenizer(), ROWS, groups, 8, PARAMS, index_of, judge)
