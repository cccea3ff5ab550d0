"""Lockstep generation against the full-sequence oracle, and seeds."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ALL_FAMILIES, make_base, make_bridged

import bridge_rl as br
from bridge_rl.errors import UserError
from bridge_rl.rollout.engine import Rollout
from bridge_rl.rollout.graphs import FilledDecoder, step_in_place, why_not_recorded
from bridge_rl.rollout.reference import generate_groups_slowly

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31]]
# Several ends make rows finish at different steps.
PARAMS = br.SamplingParams(max_new_tokens=20, seed=3, eos_token_id=[2, 4, 5, 6, 7, 8])
EIGHT_ROWS = br.RolloutOptions(max_rows=8)


def worst_difference(model, prompts, groups, temperature=1.0):
    oracle = br.group_logprobs(model, prompts, [group.tokens for group in groups], temperature)
    return max(
        abs(ours - theirs)
        for group, expected in zip(groups, oracle, strict=True)
        for row, expected_row in zip(group.logprobs, expected, strict=True)
        for ours, theirs in zip(row, expected_row, strict=True)
    )


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("width", [1, 3, 4])
def test_lockstep_decode_matches_full_forward(family, width):
    model = make_bridged(family)
    groups = br.generate_groups(model, PROMPTS, width, PARAMS)
    lengths = {len(row) for group in groups for row in group.tokens}
    assert len(lengths) >= 3, "the finishes are not ragged: the test would prove little"
    assert worst_difference(model, PROMPTS, groups) <= 1e-5


@pytest.mark.parametrize("width", [1, 4])
def test_a_relative_bridge_decodes_as_the_full_forward_and_alone_as_the_base(width):
    model = make_bridged("llama", relative=True)
    groups = br.generate_groups(model, PROMPTS, width, PARAMS)
    assert worst_difference(model, PROMPTS, groups) <= 1e-5
    with br.disable_bridge(model):
        base = br.generate_groups(model, PROMPTS, width, PARAMS)
    assert (groups == base) == (width == 1)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_fp32_model_under_autocast_matches_the_full_forward_under_it(family):
    """Rotary embeddings make its keys fp32, while its values are bf16."""
    model = make_bridged(family)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = Rollout(model, PROMPTS, 4, PARAMS)
        groups = rollout.run()
        assert rollout.cache.rows.data.dtype == torch.bfloat16  # or it would take twice what is planned
        assert worst_difference(model, PROMPTS, groups) <= 0.05
    assert worst_difference(model, PROMPTS, groups) > 1e-5, "autocast did nothing: the test would prove little"


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("max_rows", [None, 4, 9])
def test_scheduled_rollout_equals_the_slow_loop(family, max_rows):
    """The same tokens and reasons, whether all groups run at once or are admitted as rows finish."""
    model = make_bridged(family)
    prompts = PROMPTS * 3
    slow = generate_groups_slowly(model, prompts, 4, PARAMS)
    fast = br.generate_groups(model, prompts, 4, PARAMS, options=br.RolloutOptions(max_rows=max_rows))
    assert [group.tokens for group in fast] == [group.tokens for group in slow]
    assert [group.finish_reasons for group in fast] == [group.finish_reasons for group in slow]
    assert worst_difference(model, prompts, fast) <= 1e-5


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("steps_per_visit", [3, 50])
def test_steps_without_a_look_of_the_scheduler_change_nothing(family, steps_per_visit):
    """As on CUDA, where rows that have ended run on until the host looks."""
    model = make_bridged(family)
    slow = generate_groups_slowly(model, PROMPTS * 3, 4, PARAMS)
    options = br.RolloutOptions(max_rows=9, steps_per_visit=steps_per_visit)
    fast = br.generate_groups(model, PROMPTS * 3, 4, PARAMS, options=options)
    assert [group.tokens for group in fast] == [group.tokens for group in slow]
    assert [group.finish_reasons for group in fast] == [group.finish_reasons for group in slow]
    assert worst_difference(model, PROMPTS * 3, fast) <= 1e-5


class InPlaceDecoder(FilledDecoder):
    """Does to memory what replaying a CUDA graph does."""

    def filled_steps(self, rows, inputs, uniforms, pages, layout, cache):
        made = []
        for of_step in zip(uniforms, pages, strict=True):
            inputs.uniforms.copy_(of_step[0])
            inputs.pages.copy_(of_step[1])
            made.append(step_in_place(self, rows, inputs, layout, cache))
        return made


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("steps_per_visit", [1, 6])
@pytest.mark.parametrize("decoder", [FilledDecoder, InPlaceDecoder])
def test_rows_and_pages_that_fill_up_a_step_change_nothing(family, steps_per_visit, decoder, monkeypatch):
    """As in steps recorded for CUDA graphs, whose sizes are few."""
    monkeypatch.setattr("bridge_rl.rollout.engine.Decoder", decoder)
    model = make_bridged(family)
    prompts = PROMPTS * 6
    options = br.RolloutOptions(max_rows=70, steps_per_visit=steps_per_visit)
    groups = br.generate_groups(model, prompts, 4, PARAMS, options=options)
    assert [group.tokens for group in groups] == [
        group.tokens for group in generate_groups_slowly(model, prompts, 4, PARAMS)
    ]
    assert worst_difference(model, prompts, groups) <= 1e-5


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_prompt_prefilled_in_chunks_samples_the_same(family):
    model = make_bridged(family)
    rollout = Rollout(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(prefill_tokens=2))
    chunked = rollout.run()
    assert rollout.stats.forwards - rollout.stats.steps == 2 + 3 + 1 + 1
    assert [group.tokens for group in chunked] == [g.tokens for g in br.generate_groups(model, PROMPTS, 4, PARAMS)]
    assert worst_difference(model, PROMPTS, chunked) <= 1e-5


def test_groups_of_several_widths_run_together(bridged):
    widths = [1, 4, 2, 7]
    together = br.generate_groups(bridged, PROMPTS, widths, PARAMS, options=EIGHT_ROWS)
    for index, width in enumerate(widths):
        [alone] = br.generate_groups(bridged, [PROMPTS[index]], width, PARAMS, indices=[index])
        assert together[index].tokens == alone.tokens


def test_prompts_longer_than_a_page_match_the_full_forward(bridged):
    prompts = [list(range(3, 40)), [7], list(range(10, 45)), list(range(3, 37))]
    groups = br.generate_groups(
        bridged, prompts, 3, br.SamplingParams(40, seed=2, eos_token_id=[2]), options=EIGHT_ROWS
    )
    assert max(len(row) for group in groups for row in group.tokens) > 32  # rows of several pages
    assert worst_difference(bridged, prompts, groups) <= 1e-5


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "phi3", "qwen3_moe"])
def test_a_sliding_window_is_kept(family):
    model = make_bridged(family, sliding_window=4)
    groups = br.generate_groups(model, PROMPTS, 4, PARAMS, options=EIGHT_ROWS)
    assert max(len(row) for group in groups for row in group.tokens) > 8
    assert worst_difference(model, PROMPTS, groups) <= 1e-5


def test_rows_with_limits_of_their_own_match_the_full_forward(bridged):
    """A row at its limit is seen once more, at its last token, as its mask says in the full forward."""
    limits = [[3, 9, 1, 6], [2, 2, 2, 2], [12, 1, 1, 5], [4, 8, 12, 2]]
    params = br.SamplingParams(12, seed=3, eos_token_id=[])
    groups = br.generate_groups(bridged, PROMPTS, 4, params, options=EIGHT_ROWS, limits=limits)
    assert [[len(row) for row in group.tokens] for group in groups] == limits
    assert worst_difference(bridged, PROMPTS, groups) <= 1e-5


def test_no_prompts_give_no_groups(bridged):
    assert br.generate_groups(bridged, [], 4, PARAMS) == []
    assert br.group_logprobs(bridged, [], []) == []


def test_the_full_forward_has_no_dropout_either():
    model = make_bridged("llama", attention_dropout=0.5).train()
    groups = br.generate_groups(model, PROMPTS, 4, PARAMS)
    assert worst_difference(model, PROMPTS, groups) <= 1e-5
    assert model.training


def test_rows_that_were_never_begun_have_no_log_probs(bridged):
    options = br.RolloutOptions(cancelled=lambda: True)
    groups = br.generate_groups(bridged, PROMPTS[:1], 2, PARAMS, options=options)
    assert br.group_logprobs(bridged, PROMPTS[:1], [group.tokens for group in groups]) == [[[], []]]


def test_a_width_may_be_any_integer(bridged):
    [group] = br.generate_groups(bridged, PROMPTS[:1], np.int64(3), PARAMS)
    assert group == br.generate_groups(bridged, PROMPTS[:1], 3, PARAMS)[0]


def test_a_family_that_is_not_served_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model family 'gpt2'"):
        br.generate_groups(model, [[1]], 2, PARAMS)


def test_eager_attention_samples_the_same(family):
    prompts = PROMPTS * 2
    groups = [
        br.generate_groups(
            make_bridged(family, attn_implementation=attention),
            prompts,
            4,
            PARAMS,
            options=EIGHT_ROWS,
        )
        for attention in ("sdpa", "eager")
    ]
    assert [group.tokens for group in groups[0]] == [group.tokens for group in groups[1]]


def test_the_order_of_admission_changes_no_token(bridged):
    order = [2, 0, 3, 1]
    expected = br.generate_groups(bridged, PROMPTS, 4, PARAMS)
    found = br.generate_groups(
        bridged, [PROMPTS[n] for n in order], 4, PARAMS, indices=order, options=br.RolloutOptions(max_rows=4)
    )
    assert [group.tokens for group in found] == [expected[n].tokens for n in order]


def test_a_finished_row_costs_nothing_more(bridged):
    """Rows fed to the model, counted: at most one a token, and never more than may run."""
    fed = []
    hook = bridged.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    long_prompts = [prompt * 2 for prompt in PROMPTS]  # so that one column is a step and no prefill
    groups = br.generate_groups(bridged, long_prompts, 4, PARAMS, options=EIGHT_ROWS)
    hook.remove()
    steps = [rows for rows, columns in fed if columns == 1]
    tokens = sum(len(row) for group in groups for row in group.tokens)
    assert max(steps) <= 8
    assert sum(steps) <= tokens


def test_without_a_bridge_no_last_token_is_fed():
    model = make_bridged("llama")
    with br.disable_bridge(model):
        rollout = Rollout(model, PROMPTS, 4, PARAMS)
        groups = rollout.run()
        assert worst_difference(model, PROMPTS, groups) <= 1e-5
    lengths = [len(row) for group in groups for row in group.tokens]
    assert rollout.stats.row_steps == sum(lengths) - len(lengths)


def test_rows_cut_at_the_limit_match_too(bridged):
    params = br.SamplingParams(max_new_tokens=6, seed=1, eos_token_id=[4, 5])
    groups = br.generate_groups(bridged, PROMPTS, 4, params)
    reasons = {reason for group in groups for reason in group.finish_reasons}
    assert reasons == {"stop", "length"}
    assert worst_difference(bridged, PROMPTS, groups) <= 1e-5


def test_temperature_reaches_the_logprobs(bridged):
    params = br.SamplingParams(max_new_tokens=8, temperature=0.7, seed=1, eos_token_id=[4, 5])
    groups = br.generate_groups(bridged, PROMPTS, 2, params)
    assert worst_difference(bridged, PROMPTS, groups, temperature=0.7) <= 1e-5


def test_a_row_ends_at_its_first_eos_and_says_why(bridged):
    for group in br.generate_groups(bridged, PROMPTS, 4, PARAMS):
        for row, logprobs, reason in zip(group.tokens, group.logprobs, group.finish_reasons, strict=True):
            ends = [n for n, token in enumerate(row) if token in PARAMS.eos_token_id]
            assert ends == ([len(row) - 1] if reason == "stop" else [])
            assert len(logprobs) == len(row)


def test_tokens_do_not_depend_on_the_rest_of_the_batch(bridged):
    together = br.generate_groups(bridged, PROMPTS, 4, PARAMS)
    for index, prompt in enumerate(PROMPTS):
        [alone] = br.generate_groups(bridged, [prompt], 4, PARAMS, indices=[index])
        assert alone.tokens == together[index].tokens
    limited = br.generate_groups(bridged, PROMPTS, 4, PARAMS, options=EIGHT_ROWS)
    assert [group.tokens for group in limited] == [group.tokens for group in together]


def test_tokens_depend_on_seed_and_index(bridged):
    same_prompt = [PROMPTS[0]] * 2
    first, second = br.generate_groups(bridged, same_prompt, 4, PARAMS)
    assert first.tokens != second.tokens
    other = br.generate_groups(bridged, same_prompt, 4, br.SamplingParams(20, seed=4, eos_token_id=[2]))
    assert other[0].tokens != first.tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_do_not_depend_on_torchs_default_dtype(dtype):
    model = make_bridged("llama")
    expected = br.generate_groups(model, PROMPTS, 3, PARAMS)
    torch.set_default_dtype(dtype)
    try:
        assert br.generate_groups(model, PROMPTS, 3, PARAMS) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_siblings_change_what_a_row_says(bridged):
    """At equal draws, a row's tokens differ with the Bridge on and off."""
    linked = br.generate_groups(bridged, PROMPTS, 4, PARAMS)
    with br.disable_bridge(bridged):
        alone = br.generate_groups(bridged, PROMPTS, 4, PARAMS)
    assert [group.tokens for group in linked] != [group.tokens for group in alone]


def test_a_model_without_a_bridge_samples_independent_rows():
    model = make_base("llama")
    groups = br.generate_groups(model, PROMPTS, 4, PARAMS)
    assert worst_difference(model, PROMPTS, groups) <= 1e-5


def test_sampled_frequencies_follow_the_model():
    model = make_base("llama")
    groups = br.generate_groups(model, [[5, 6]], 4000, br.SamplingParams(1, seed=0, eos_token_id=[]))
    counts = torch.bincount(torch.tensor([row[0] for row in groups[0].tokens]), minlength=50) / 4000
    with torch.no_grad():
        probs = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    # Four standard errors of a share at 4000 draws.
    assert ((counts - probs).abs() <= 4 * (probs * (1 - probs) / 4000).sqrt() + 1e-6).all()


def test_greedy_takes_the_most_likely_token(bridged):
    [group] = br.generate_groups(bridged, [[5, 6]], 1, br.SamplingParams(1, temperature=0))
    with torch.no_grad():
        expected = bridged(torch.tensor([[5, 6]])).logits[0, -1].argmax().item()
    assert group.tokens == [[expected]]


@pytest.mark.parametrize(("options", "allowed"), [({"top_k": 2}, 2), ({"top_p": 1e-6}, 1)])
def test_truncated_sampling_stays_inside_its_set(options, allowed):
    model = make_base("llama")
    [group] = br.generate_groups(model, [[5, 6]], 64, br.SamplingParams(1, seed=0, eos_token_id=[], **options))
    with torch.no_grad():
        best = model(torch.tensor([[5, 6]])).logits[0, -1].topk(allowed).indices.tolist()
    assert {row[0] for row in group.tokens} <= set(best)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": None}, "temperature is None: it must be a number"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed is True: it must be a whole number"),
        ({"eos_token_id": 2.5}, "eos_token_id is 2.5: it must be a whole number"),
        ({"eos_token_id": "2"}, "eos_token_id is '2': it must be a whole number"),
        ({"eos_token_id": [2, None]}, "eos_token_id is None: it must be a whole number"),
    ],
)
def test_bad_sampling_params_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        br.SamplingParams(**{"max_new_tokens": 4, **options})


@pytest.mark.parametrize("convert", [np.int64, lambda eos: [np.int32(eos)], lambda eos: np.array([eos])])
def test_an_eos_may_be_a_number_of_numpys(convert):
    model = make_bridged("llama")
    [[first, *_]] = br.generate_groups(model, [[5]], 1, PARAMS)[0].tokens
    [group] = br.generate_groups(model, [[5]], 1, replace(PARAMS, eos_token_id=convert(first)))
    assert (group.tokens, group.finish_reasons) == ([[first]], ["stop"])


def test_an_empty_prompt_is_refused(bridged):
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        br.generate_groups(bridged, [[5], []], 2, PARAMS)
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        br.group_logprobs(bridged, [[5], []], [[[6]], [[7]]])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([5, 6, 7], "Prompt 0 is 5: give each as a list of token ids"),
        (["What is 2 + 2?"], "Prompt 0 is 'What is 2"),
        (torch.tensor([5, 6]), "Prompt 0 is tensor(5): give each as a list of token ids"),
        ([[[5, 6]]], "Prompt 0 is [[5, 6]]: give each as a list of token ids"),
        ([[5], [6, 50]], "Prompt 1 has tokens from 6 to 50, and the model knows 0 to 49"),
        ([[5], [-1, 6]], "Prompt 1 has tokens from -1 to 6"),
        ([[5], [6.0]], "Prompt 1 is [6.0]: give each as a list of token ids"),
        ([["5"]], "Prompt 0 is ['5']: give each as a list of token ids"),
        ([{5, 6}], "Prompt 0 is {5, 6}: give each as a list of token ids"),
        ("5", "prompt_ids is '5': it must be a list"),
        (None, "prompt_ids is None: it must be a list"),
    ],
)
def test_prompts_that_are_no_token_ids_of_the_model_are_refused(prompts, message):
    model = make_base("llama")
    with pytest.raises(UserError, match=re.escape(message)):
        br.generate_groups(model, prompts, 2, PARAMS)
    with pytest.raises(UserError, match=re.escape(message)):
        br.group_logprobs(model, prompts, [[[6]], [[7]]])


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([[[6], [50]]], "Completion 1 of prompt 0 has tokens from 50 to 50, and the model knows 0 to 49"),
        ([[[6], [7, -1]]], "Completion 1 of prompt 0 has tokens from -1 to 7"),
        ([[[6.5]]], "Completion 0 of prompt 0 is [6.5]: give each as a list of token ids"),
        ([[6, 7]], "Completion 0 of prompt 0 is 6: give each as a list of token ids"),
        ([[[[6]]]], "Completion 0 of prompt 0 is [[6]]: give each as a list of token ids"),
        ([6], "completions is [6]: give a list of groups"),
        (None, "completions is None: give a list of groups"),
        ([[]], "1 prompts and groups of widths [0]"),
        ([], "1 prompts and groups of widths []"),
        ([[[6]], [[7]]], "1 prompts and groups of widths [1]"),
    ],
)
def test_completions_that_are_no_rows_of_token_ids_are_refused(completions, message):
    with pytest.raises(UserError, match=re.escape(message)):
        br.group_logprobs(make_bridged("llama"), [[5]], completions)


@pytest.mark.parametrize("temperature", [-1, float("nan"), float("inf"), 1e-40, "1", None])
def test_the_full_forward_knows_the_temperatures_of_sampling_only(temperature):
    model = make_bridged("llama")
    with pytest.raises(UserError, match=f"temperature is {temperature!r}: it must be"):
        br.group_logprobs(model, [[5]], [[[6]]], temperature)
    assert br.group_logprobs(model, [[5]], [[[6]]], 0) == br.group_logprobs(model, [[5]], [[[6]]], 1.0)


@pytest.mark.parametrize("model", ["runs/demo", None])
def test_a_path_is_no_model(model):
    for call in (
        lambda: br.generate_groups(model, [[5]], 2, PARAMS),
        lambda: br.group_logprobs(model, [[5]], [[[6]]]),
        lambda: br.attach_bridge(model, br.BridgeConfig()),
        lambda: list(br.bridge_parameters(model)),
        lambda: br.save_bridge(model, "nowhere"),
    ):
        with pytest.raises(UserError, match=f"The model is {model!r}: load it first"):
            call()


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_prompts_and_completions_may_be_arrays(kind):
    model, prompts, completions = make_bridged("llama"), [[5, 6], [7, 8]], [[[3], [4]], [[5], [6]]]
    expected = br.group_logprobs(model, prompts, completions)
    assert br.group_logprobs(model, kind(prompts), kind(completions)) == expected
    assert br.generate_groups(model, kind(prompts), 2, PARAMS) == br.generate_groups(model, prompts, 2, PARAMS)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logits_that_are_not_finite_are_said_to_be(temperature):
    model = make_bridged("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        br.generate_groups(model, PROMPTS, 2, br.SamplingParams(5, temperature=temperature))
    with pytest.raises(UserError, match="logits are not finite"):
        br.group_logprobs(model, [[5]], [[[6]]], temperature)


LONG_ROPE = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "partial_rotary_factor": 1.0}


CHANGING_POSITIONS = pytest.mark.parametrize(
    ("family", "rope", "overrides"),
    [
        ("phi3", {"rope_type": "longrope", **LONG_ROPE}, {"original_max_position_embeddings": 32}),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, {"max_position_embeddings": 32}),
    ],
)


@CHANGING_POSITIONS
def test_a_row_may_not_be_so_long_that_it_changes_the_positions_of_others(family, rope, overrides):
    model = make_bridged(family, rope_parameters={"rope_theta": 10000.0, **rope}, **overrides)
    groups = br.generate_groups(model, [[5, 6], [7] * 12], 3, br.SamplingParams(20, eos_token_id=[]))
    assert worst_difference(model, [[5, 6], [7] * 12], groups) <= 1e-5
    with pytest.raises(UserError, match=r"Prompt 1 and its completion may take 33 tokens\. Beyond 32 "):
        br.generate_groups(model, [[5, 6], [7] * 13], 3, br.SamplingParams(20, eos_token_id=[]))


@CHANGING_POSITIONS
def test_a_row_that_runs_on_behind_its_limit_changes_no_positions_of_others(family, rope, overrides):
    model = make_bridged(family, rope_parameters={"rope_theta": 10000.0, **rope}, **overrides)
    prompts, limits = [[7] * 20, [5, 6, 8]], [[12, 9], [28, 28]]
    options = br.RolloutOptions(steps_per_visit=8)
    groups = br.generate_groups(model, prompts, 2, br.SamplingParams(28, eos_token_id=[]), None, limits, options)
    assert worst_difference(model, prompts, groups) <= 1e-5


@pytest.mark.parametrize(
    ("family", "changed", "capability", "why"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, (9, 0), "dynamic"),
        ("qwen3_moe", {}, (9, 0), r"experts are computed one by one in torch\.float32"),
        ("qwen3_moe", {"dtype": torch.bfloat16}, (8, 0), r"on compute capability \(8, 0\)"),
        ("qwen3_moe", {"dtype": torch.bfloat16}, (9, 0), None),
        *((family, {}, (8, 0), None) for family in ALL_FAMILIES if family != "qwen3_moe"),
    ],
)
def test_steps_that_wait_for_the_host_are_not_recorded(family, changed, capability, why):
    options = {name: value for name, value in changed.items() if name != "dtype"}
    model = make_bridged(family, **options).to(changed.get("dtype", torch.float32))
    found = why_not_recorded(model, capability)
    assert found is None if why is None else re.search(why, found)


def test_prompts_in_chunks_do_without_the_load_balance_of_experts():
    model = make_bridged("qwen3_moe", output_router_logits=True)
    groups = br.generate_groups(model, PROMPTS, 3, PARAMS, options=br.RolloutOptions(prefill_tokens=2))
    assert model.config.output_router_logits is True
    assert [group.tokens for group in groups] == [
        group.tokens for group in br.generate_groups(make_bridged("qwen3_moe"), PROMPTS, 3, PARAMS)
    ]


def test_a_stream_that_is_closed_early_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_ELEMENTS", 0)
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_SIDE", 1)
    model = make_bridged("llama").train()
    model.model.layers[1].eval()  # as some training keeps a part of it
    before = [module.training for module in model.modules()]
    stream = Rollout(model, PROMPTS, 2, PARAMS).stream()
    next(stream)
    assert any("forward" in vars(module) for module in model.modules())
    stream.close()
    assert not any("forward" in vars(module) for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_a_rollout_gives_word_after_every_pass_and_each_group_once():
    """So that whoever keeps groups can write them in time while the others go on."""
    model = make_bridged("llama")
    rollout = Rollout(model, PROMPTS, 2, PARAMS)
    passes = list(rollout.passes())
    assert len(passes) == rollout.stats.forwards + 1
    assert [] in passes[:-1]
    given = [group for ended in passes for group in ended]
    assert given == list(Rollout(model, PROMPTS, 2, PARAMS).stream())
    assert sorted(place for place, _ in given) == list(range(len(PROMPTS)))
