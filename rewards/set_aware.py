"""A bonus for what the siblings lack: rows that think together agree more, and cover fewer problems between them."""

from collections import Counter
from typing import Any

from bridge_rl.verify import verify_answers
from bridge_rl.verify.answer import completion_text


def sole_solver(
    completions: list[Any], answer: list[str], group_index: list[int], timeout_s: float = 5.0, **kwargs: Any
) -> list[float]:
    """1.0 for a row that is the only right one of its group, else 0.0.

    group_index: the group of each row; the rollout hands it on. Give it a weight beside `rewards/answer.py:correct`.
    """
    verdicts = verify_answers([completion_text(completion) for completion in completions], answer, timeout_s)
    solvers = Counter(group for group, verdict in zip(group_index, verdicts, strict=True) if verdict.correct)
    return [
        float(verdict.correct and solvers[group] == 1) for group, verdict in zip(group_index, verdicts, strict=True)
    ]
