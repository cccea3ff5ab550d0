"""A bonus for what the siblings lack: rows that think together agree more, and cover fewer problems between them."""

from collections import Counter
from functools import lru_cache
from typing import Any

from bridge_rl.models import load_function

_judge = lru_cache(load_function)


def sole_solver(
    completions: list[Any], group_index: list[int], judge: str = "rewards/answer.py:correct", **columns: Any
) -> list[float]:
    """1.0 for a row that is the only right one of its group, else 0.0. Give it a weight beside the reward itself.

    group_index: the group of each row; the rollout hands it on. judge: the reward that says what is right, above 0.5;
    it sees the same columns, and logs nothing a second time.
    """
    seen = {name: column for name, column in columns.items() if name not in ("log_metric", "log_extra")}
    rewards = _judge(judge, "rewards.kwargs.judge")(completions=completions, **seen)
    right = [reward > 0.5 for reward in rewards]
    solvers = Counter(group for group, solved in zip(group_index, right, strict=True) if solved)
    return [float(solved and solvers[group] == 1) for group, solved in zip(group_index, right, strict=True)]
