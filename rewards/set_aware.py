"""A bonus for what the siblings lack: rows that think together agree more, and cover fewer problems between them."""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from bridge_rl.config import RewardSection
from bridge_rl.reward_functions import counted
from bridge_rl.user_code import load_function


@lru_cache
def _judge(named: str) -> Callable[..., list[float | None]]:
    return counted(load_function(named, "rewards.kwargs.judge"), RewardSection(named))


def sole_solver(
    completions: list[Any], group_index: list[int], judge: str = "rewards/answer.py:correct", **columns: Any
) -> list[float]:
    """1.0 for a row that is the only right one of its group, else 0.0. Give it a weight beside the reward itself.

    group_index: the group of each row; the rollout hands it on. judge: the reward that says what is right, above 0.5
    (None is not); it sees the same columns, and logs nothing a second time.
    """
    seen = {name: column for name, column in columns.items() if name not in ("log_metric", "log_extra")}
    right = [reward is not None and reward > 0.5 for reward in _judge(judge)(completions=completions, **seen)]
    solvers = Counter(group for group, solved in zip(group_index, right, strict=True) if solved)
    return [float(solved and solvers[group] == 1) for group, solved in zip(group_index, right, strict=True)]
