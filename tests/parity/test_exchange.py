"""Rows that hear other prompts' rows instead of their siblings, against a full-sequence forward of their circles."""

import pytest
import torch
from conftest import CORE_FAMILIES, make_bridged
from hypothesis import given
from hypothesis import strategies as st

import bridge_rl as br
from bridge_rl.group import exchanged_circles, pad_left, pad_right
from bridge_rl.rollout import Rollout
from bridge_rl.rollout.sampling import scaled_logprobs

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31], [5, 9], [14, 15, 16, 17], [22, 23], [24]]
PARAMS = br.SamplingParams(max_new_tokens=20, seed=3, eos_token_id=[2, 4, 5, 6, 7, 8])
BLOCKS = [[0, 5, 2, 7], [4, 1, 6, 3]]


def circle_logprobs(model, prompts, completions):
    """Log-probs of one circle's rows: on its prompt each is alone, from then on they hear each other."""
    prompt, prompt_mask = pad_left(prompts, 0, "cpu")
    completion, completion_mask = pad_right(completions, 0, "cpu")
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    alive = torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1)[None].bool()
    logits = model(
        input_ids=torch.cat([prompt, completion], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        bridge_alive=alive,
    ).logits
    logprobs = scaled_logprobs(logits[:, prompt.shape[1] - 1 : -1], 1.0)
    chosen = logprobs.gather(-1, completion[:, :, None])[:, :, 0].tolist()
    return [values[: len(row)] for values, row in zip(chosen, completions, strict=True)]


@torch.no_grad()
def worst_difference(model, groups):
    worst = 0.0
    for block in BLOCKS:
        for circle in block:
            rows = [
                (place, row)
                for place, circles in zip(block, exchanged_circles(block), strict=True)
                for row, of in enumerate(circles)
                if of == circle
            ]
            expected = circle_logprobs(model, [PROMPTS[p] for p, _ in rows], [groups[p].tokens[r] for p, r in rows])
            for (place, row), values in zip(rows, expected, strict=True):
                for ours, theirs in zip(groups[place].logprobs[row], values, strict=True):
                    worst = max(worst, abs(ours - theirs))
    return worst


@pytest.mark.parametrize("family", CORE_FAMILIES)
@pytest.mark.parametrize("options", [{}, {"max_rows": 16}, {"max_cache_tokens": 800}, {"steps_per_visit": 3}])
def test_exchanged_rows_match_a_full_forward_of_their_circles(family, options):
    model = make_bridged(family)
    rollout = Rollout(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(**options), exchange=BLOCKS)
    groups = rollout.run()
    assert worst_difference(model, groups) <= 1e-5
    assert len({len(row) for group in groups for row in group.tokens}) >= 3, "not ragged: the test would prove little"
    at_home = br.generate_groups(model, PROMPTS, 4, PARAMS)
    assert sum(a.tokens != b.tokens for a, b in zip(groups, at_home, strict=True)) >= 4, "siblings do not matter"


def test_a_full_cache_starts_whole_blocks_again_and_changes_no_token():
    model = make_bridged("llama")
    params = br.SamplingParams(40, seed=3, eos_token_id=[])
    limits = [[5 if place == 1 else 40] * 4 for place in range(8)]  # one group ends before its block has to start again
    expected = br.generate_groups(model, PROMPTS, 4, params, limits=limits, exchange=BLOCKS)
    options = br.RolloutOptions(max_cache_tokens=1000)
    rollout = Rollout(model, PROMPTS, 4, params, limits=limits, options=options, exchange=BLOCKS)
    given_out = list(rollout.stream())
    assert given_out[0][0] == 1
    assert rollout.stats.preempted > 0
    assert sorted(place for place, _ in given_out) == list(range(8))  # none twice
    assert [dict(given_out)[place].tokens for place in range(8)] == [group.tokens for group in expected]


def test_groups_are_given_out_as_they_end():
    model = make_bridged("llama")
    rollout = Rollout(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(max_rows=8))
    stream = rollout.stream()
    next(stream)
    assert rollout.has_work(0.0), "the first group came only when all had ended"
    assert len(list(stream)) == 7


def test_without_a_bridge_exchanging_siblings_changes_nothing():
    model = make_bridged("qwen2")
    with br.disable_bridge(model):
        expected = br.generate_groups(model, PROMPTS, 4, PARAMS)
        found = br.generate_groups(model, PROMPTS, 4, PARAMS, exchange=BLOCKS)
    assert [group.tokens for group in found] == [group.tokens for group in expected]


@pytest.mark.parametrize(
    ("exchange", "complaint"),
    [([[0, 1], [2]], "of the 4 prompts once"), ([[0, 1, 2, 3], [0]], "once"), ([[0, 1], [2, 3]], "block of 2 groups")],
)
def test_blocks_that_are_no_exchange_are_refused(exchange, complaint):
    with pytest.raises(ValueError, match=complaint):
        br.generate_groups(make_bridged("llama"), PROMPTS[:4], 4, PARAMS, exchange=exchange)


@given(st.integers(1, 9))
def test_a_circle_has_one_row_of_every_group(width):
    places = list(range(100, 100 + width))
    circles = exchanged_circles(places)
    for circle in places:
        assert [row.count(circle) for row in circles] == [1] * width
