"""What bounds a rollout: memory, time, stop strings. None of it changes a token that is returned."""

import logging
from itertools import count
from pkgutil import resolve_name

import pytest
import torch
from conftest import make_bridged, switch_on

import bridge_rl as br
from bridge_rl.config import ModelSection
from bridge_rl.errors import UserError
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.rollout.engine import Rollout
from bridge_rl.rollout.pages import Pages

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31]]
PARAMS = br.SamplingParams(max_new_tokens=40, seed=3, eos_token_id=[2, 4, 5])


@pytest.fixture(scope="module")
def model():
    return make_bridged("llama")


@pytest.fixture(scope="module")
def expected(model):
    return br.generate_groups(model, PROMPTS, 4, PARAMS)


def texts(groups):
    return [group.tokens for group in groups]


@pytest.mark.parametrize("steps_per_visit", [1, 5])
def test_a_small_cache_makes_groups_wait_and_start_again_but_changes_no_token(model, steps_per_visit):
    params = br.SamplingParams(40, seed=3, eos_token_id=[2])
    options = br.RolloutOptions(max_cache_tokens=300, steps_per_visit=steps_per_visit)
    rollout = Rollout(model, PROMPTS, 4, params, options=options)
    assert texts(rollout.run()) == texts(br.generate_groups(model, PROMPTS, 4, params))
    assert rollout.stats.preempted > 0
    assert rollout.stats.peak_cache_tokens <= 300


def test_a_cache_too_small_for_one_group_is_refused_before_sampling(model):
    with pytest.raises(ValueError, match="room for 100 tokens, and one group with its prompt can need 200"):
        br.generate_groups(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(max_cache_tokens=100))


def test_prompts_are_held_once_and_pages_follow_the_tokens(model):
    """Sixteen rows of one prompt of 64 tokens: copies alone would be 1,024 tokens."""
    rollout = Rollout(model, [list(range(3, 35)) * 2], 16, br.SamplingParams(16, eos_token_id=[]))
    rollout.run()
    stats = rollout.stats
    assert stats.peak_cache_tokens == 64 + 16 * 16
    assert stats.held_tokens_at_peak in range(64 + 16, 64 + 16 * 16 + 1)


def run_out_of_memory(model, calls):
    """Let the model's forward passes of these numbers fail as torch fails for want of memory."""
    number = count()

    def fail(*args):
        if next(number) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    return model.base_model.register_forward_pre_hook(fail)


@pytest.mark.parametrize("calls", [{0}, {4}, {4, 9, 15}])
def test_out_of_memory_shrinks_the_rollout_and_changes_no_token(model, expected, calls, caplog):
    hook = run_out_of_memory(model, calls)
    try:
        rollout = Rollout(model, PROMPTS, 4, PARAMS)
        with caplog.at_level(logging.WARNING):
            groups = rollout.run()
    finally:
        hook.remove()
    assert texts(groups) == texts(expected)
    assert rollout.stats.shrunk == len(calls)
    assert "Out of memory" in caplog.text
    assert "at most" in caplog.text


@pytest.mark.parametrize(
    "failing",
    [
        "engine.pad_left",
        "engine.draw_tokens",
        "layout.Layout.of",
        "engine.Rollout.let_go",
        "budget.CacheBudget.make_cache",
        "pages.Pages.write",
        "pages.Pages.grow",
        "pages.Pages.release",
    ],
)
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_wherever_memory_runs_out_no_group_is_lost(model, expected, failing, call, error, monkeypatch):
    number, whole = count(), resolve_name(f"bridge_rl.rollout.{failing}")

    def fail_once(*args, **kwargs):
        if next(number) == call:
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(f"bridge_rl.rollout.{failing}", fail_once)
    rollout = Rollout(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(max_rows=8))
    assert texts(rollout.run()) == texts(expected)
    assert rollout.stats.shrunk == (next(number) > call)


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_memory_that_runs_out_while_a_group_is_taken_back_loses_no_group(model, call, monkeypatch):
    params = br.SamplingParams(40, seed=3, eos_token_id=[2])
    rollout = Rollout(model, PROMPTS, 4, params, options=br.RolloutOptions(max_cache_tokens=300))
    number, release, preempt = count(), Pages.release, Rollout.preempt_youngest

    def fail_once(*args):
        if next(number) == call:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        release(*args)

    def preempt_with_little_memory(rollout):
        with monkeypatch.context() as patch:
            patch.setattr(Pages, "release", fail_once)
            preempt(rollout)

    monkeypatch.setattr(Rollout, "preempt_youngest", preempt_with_little_memory)
    groups = rollout.run()
    assert rollout.stats.shrunk == (next(number) > call)
    monkeypatch.undo()
    assert texts(groups) == texts(br.generate_groups(model, PROMPTS, 4, params))


def test_a_cache_that_can_still_shrink_is_halved_before_one_group_is_refused(model, expected):
    hook = run_out_of_memory(model, {5})
    try:
        rollout = Rollout(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(max_rows=4, prefill_tokens=1))
        assert texts(rollout.run()) == texts(expected)
    finally:
        hook.remove()
    assert rollout.stats.shrunk == 1


def test_out_of_memory_without_end_is_said_in_one_sentence(model):
    hook = run_out_of_memory(model, range(1000))
    try:
        with pytest.raises(ValueError, match="Out of memory with one group of 4 rows"):
            br.generate_groups(model, PROMPTS, 4, PARAMS)
    finally:
        hook.remove()


def test_other_errors_are_not_taken_for_want_of_memory(model):
    hook = model.base_model.register_forward_pre_hook(lambda *args: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            br.generate_groups(model, PROMPTS, 4, PARAMS)
    finally:
        hook.remove()


def test_a_cancelled_rollout_returns_what_is_done(model, expected):
    looks = count()
    options = br.RolloutOptions(max_rows=8, cancelled=lambda: next(looks) > 15)
    groups = br.generate_groups(model, PROMPTS, 4, PARAMS, options=options)
    reasons = [reason for group in groups for reason in group.finish_reasons]
    assert {"abort"} < set(reasons)
    for group, whole in zip(groups, expected, strict=True):
        for row, reason, all_of_it in zip(group.tokens, group.finish_reasons, whole.tokens, strict=True):
            assert row == (all_of_it[: len(row)] if reason == "abort" else all_of_it)
    assert groups[3].tokens == [[], [], [], []], "the last group was begun: the test says little"


def test_a_deadline_cuts_every_row_that_has_not_ended(model):
    groups = br.generate_groups(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(deadline_s=1e-9))
    assert {reason for group in groups for reason in group.finish_reasons} == {"abort"}
    assert texts(groups) == [[[], [], [], []]] * 4


def test_the_longest_expected_groups_are_begun_first(model, expected):
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        options = br.RolloutOptions(max_rows=4)
        groups = br.generate_groups(model, PROMPTS, 4, PARAMS, options=options, expected_lengths=[3, 1, 4, 2])
    finally:
        hook.remove()
    assert texts(groups) == texts(expected)
    order = [PROMPTS.index(ids) for ids in seen if ids in PROMPTS and len(ids) > 1]
    assert seen[0] == PROMPTS[2]
    assert order == [0, 3, 1]


@pytest.mark.parametrize("key", ["max_rows", "max_cache_tokens", "deadline_s", "steps_per_visit", "prefill_tokens"])
def test_options_that_mean_nothing_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} is 0: it must be above 0"):
        br.RolloutOptions(**{key: 0})


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("max_rows", 2.5, "a whole number"),
        ("max_cache_tokens", "many", "a whole number"),
        ("prefill_tokens", None, "a whole number"),
        ("steps_per_visit", True, "a whole number"),
        ("deadline_s", "5", "a number"),
        ("cuda_graphs", "off", "true or false"),
    ],
)
def test_options_of_another_kind_are_refused(key, value, wanted):
    with pytest.raises(UserError, match=f"{key} is {value!r}: it must be {wanted}"):
        br.RolloutOptions(**{key: value})


def test_what_asks_whether_to_stop_is_a_function():
    with pytest.raises(UserError, match="cancelled is True: give a function"):
        br.RolloutOptions(cancelled=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without one")
def test_graphs_without_a_cuda_device_are_refused(model):
    with pytest.raises(ValueError, match="cuda_graphs needs a whole model on a CUDA device"):
        br.generate_groups(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(cuda_graphs=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": [4, 4]}, "width has 2 entries for 4 prompts"),
        ({"width": [4, 0, 4, 4]}, "width is 0 for prompt 1"),
        ({"width": 2, "limits": [[1]] * 4}, "limits must give each row"),
        ({"width": 2, "limits": [[0, 1]] * 4}, "limits must give each row"),
        ({"width": 2, "limits": [[41, 1]] * 4}, "limits must give each row"),
        ({"width": 2, "indices": [1]}, "indices has 1 entries for 4 prompts"),
        ({"width": 2, "expected_lengths": [1.0]}, "expected_lengths has 1 entries for 4 prompts"),
        ({"width": "4"}, "width is '4': it must be a whole number"),
        ({"width": 2.5}, "width is 2.5: it must be a whole number"),
        ({"width": [4, 2.5, 4, 4]}, "width of prompt 1 is 2.5: it must be a whole number"),
        ({"width": 1, "limits": [[1.5]] * 4}, "limits must give each row"),
        ({"width": 1, "limits": [1] * 4}, "limits must give each row"),
        ({"width": 1, "limits": 4}, "limits must give each row"),
        ({"width": 1, "indices": [0, 1, 2, -1]}, "indices of prompt 3 is -1: it must not be negative"),
        ({"width": 1, "indices": [0, 1, 2.0, 3]}, "indices of prompt 2 is 2.0: it must be a whole number"),
        ({"width": 1, "indices": "0123"}, "indices is '0123': it must be a list"),
        ({"width": 1, "expected_lengths": ["long"] * 4}, "expected_lengths of prompt 0 is 'long': it must be a number"),
        ({"width": 1, "exchange": [0, 1, 2, 3]}, "exchange must name each of the 4 prompts once"),
        ({"width": 1, "exchange": [[0.0], [1], [2], [3]]}, "exchange must name each of the 4 prompts once"),
        ({"width": 1, "params": 32}, "params is 32: give bridge_rl.SamplingParams"),
        ({"width": 1, "options": {"max_rows": 4}}, "options is {'max_rows': 4}: give bridge_rl.RolloutOptions"),
    ],
)
def test_a_request_that_does_not_fit_its_prompts_is_refused(model, arguments, message):
    with pytest.raises(UserError, match=message):
        br.generate_groups(model, PROMPTS, **{"params": PARAMS, **arguments})


class TestStopStrings:
    """On the embedded base, whose tokens are characters."""

    @pytest.fixture(scope="class")
    def tiny(self):
        section = ModelSection("package://bridge_rl/tiny/model")
        model = switch_on(br.attach_bridge(load_model(section), br.BridgeConfig(num_heads=2, head_dim=8)))
        with torch.no_grad():
            for _, parameter in br.bridge_parameters(model):
                parameter.mul_(0.3)  # so that siblings matter, and the model still writes its tries
        return model.eval(), load_tokenizer(section)

    def test_a_row_ends_with_the_token_that_completes_one(self, tiny):
        model, tokenizer = tiny
        prompts = [tokenizer("12,35,27,19,31,22:49=").input_ids]
        without = br.generate_groups(model, prompts, 8, br.SamplingParams(26, seed=1))
        params = br.SamplingParams(26, seed=1, stop_strings=["7;", "=50"])
        [group] = br.generate_groups(model, prompts, 8, params, tokenizer=tokenizer)
        ended = 0
        for row, reason in zip(group.tokens, group.finish_reasons, strict=True):
            text = tokenizer.decode(row)
            found = [stop for stop in params.stop_strings if stop in text]
            if found:
                ended += 1
                assert reason == "stop"
                assert text.endswith(found[0])
                assert not any(stop in text[:-1] for stop in params.stop_strings)
        assert ended >= 2
        assert without[0].tokens != group.tokens

    def test_siblings_see_the_last_token_once(self, tiny):
        model, tokenizer = tiny
        prompts = [tokenizer("12,35,27,19,31,22:49=").input_ids]
        params = br.SamplingParams(26, seed=1, stop_strings=["2"], eos_token_id=[])
        [group] = br.generate_groups(model, prompts, 8, params, tokenizer=tokenizer)
        [oracle] = br.group_logprobs(model, prompts, [group.tokens])
        for row, expected in zip(group.logprobs, oracle, strict=True):
            assert row == pytest.approx(expected, abs=1e-5)

    def test_they_need_a_tokenizer(self, tiny):
        with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
            br.generate_groups(tiny[0], [[5]], 2, br.SamplingParams(4, stop_strings=["a"]))
        with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
            br.generate_groups(tiny[0], [[5]], 2, br.SamplingParams(4, stop_strings=["a"]), tokenizer="gpt2")

    @pytest.mark.parametrize("stop_strings", ["a", [""], [5], None])
    def test_they_are_a_list_of_strings(self, stop_strings):
        with pytest.raises(ValueError, match="stop_strings is"):
            br.SamplingParams(4, stop_strings=stop_strings)


@pytest.mark.parametrize("options", [{"max_new_tokens": 4.0}, {"top_k": 2.5}, {"seed": "3"}])
def test_counts_and_seeds_are_whole_numbers(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is .*: it must be a whole number"):
        br.SamplingParams(**{"max_new_tokens": 4, **options})
