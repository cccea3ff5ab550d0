"""Rewards in TRL's signature, loaded by file as a recipe loads them."""

import pytest

from bridge_rl.config import RewardSection
from bridge_rl.models import load_reward


def load(function: str, **kwargs):
    return load_reward(RewardSection(function=function, kwargs=kwargs), 0)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_answers_of_both_kinds_of_completion_are_judged_and_their_failures_logged():
    logged: dict[str, float] = {}
    score = load("rewards/answer.py:correct")
    completions = [r"so \boxed{2\sqrt{3}}", chat(r"\boxed{2}"), chat(r"\boxed{\sqrt{12}}"), "who knows?"]
    rewards = score(
        completions=completions,
        answer=[r"2\sqrt{3}"] * 4,
        log_metric=logged.__setitem__,
        prompts=["p"] * 4,
        completion_ids=[[1]] * 4,
    )
    assert rewards == [1.0, 0.0, 1.0, 0.0]
    assert logged == {"verify/timeout": 0.0, "verify/error": 0.0, "verify/unparsed": 0.25}


def test_timeouts_and_bad_gold_are_logged_by_name():
    logged: dict[str, float] = {}
    score = load("rewards/answer.py:correct", timeout_s=1.0)
    rewards = score(
        completions=[r"\boxed{x+9^{9^{9^9}}}", "1"], answer=["x", r"\frac{1}{"], log_metric=logged.__setitem__
    )
    assert rewards == [0.0, 0.0]
    assert logged == {"verify/timeout": 0.5, "verify/error": 0.5, "verify/unparsed": 0.0}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"so \boxed{4}", 1.0),
        (r"<think>hm \boxed{3}</think> \boxed{4}", 1.0),
        (r"hm</think> \boxed{4}", 1.0),  # the prompt ended in <think>
        (r"<think>hm \boxed{4}", 0.0),
        (r"<think>hm \boxed{4}</think> it is 4", 0.0),
        (r"<think>a</think><think>b</think>\boxed{4}", 0.0),
        (r"</think><think>\boxed{4}", 0.0),
        (r"\boxed{4} or \boxed{5}", 0.0),
        (r"\boxed{4", 0.0),
        (r"\boxed{}", 0.0),
        ("4", 0.0),
    ],
)
def test_format_wants_one_closed_box_after_closed_thinking(text, reward):
    boxed = load("rewards/format.py:boxed")
    assert boxed(completions=[text, chat(text)], answer=["4", "4"]) == [reward, reward]


def test_soft_overlong_falls_from_zero_to_minus_one():
    soft = load("rewards/length.py:soft_overlong", max_completion_len=100, soft_punish_cache=20)
    ids = [[1] * length for length in (10, 80, 90, 100, 101)]
    assert soft(completions=["x"] * 5, completion_ids=ids) == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="soft_punish_cache"):
        load("rewards/length.py:soft_overlong", max_completion_len=10, soft_punish_cache=20)(completion_ids=ids)


def test_two_tries_reads_the_problem():
    score = load("rewards/two_tries.py:correct")
    problem = "12,35,27,19,31,22:49"
    completions = ["12+35=47;27+22=49:!27+22", chat("12+35=47;27+22=49:!12+35")]
    assert score(completions=completions, problem=[problem] * 2, answer=["49"] * 2) == [1.0, 0.0]


def test_only_the_sole_solver_of_a_group_gets_the_bonus():
    score = load("rewards/set_aware.py:sole_solver")
    completions = ["4", "5", "4", "4", "5", "5", "5", chat("4")]
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    assert score(completions=completions, answer=["4"] * 8, group_index=groups) == [1.0, 0, 0, 0, 0, 0, 0, 1.0]


def test_an_async_reward_stays_async_for_trl_to_await(tmp_path):
    import asyncio

    from bridge_rl.config import RewardSection
    from bridge_rl.models import load_reward

    source = "async def score(completions, scale, **kwargs):\n    return [scale] * len(completions)\n"
    (tmp_path / "judge.py").write_text(source)
    reward = load_reward(RewardSection(f"{tmp_path / 'judge.py'}:score", kwargs={"scale": 2.0}), 0)
    assert asyncio.run(reward(completions=["a", "b"])) == [2.0, 2.0]
