"""1.0 for a right final answer, by math-verify in processes that can be killed."""

from collections.abc import Callable
from typing import Any

from bridge_rl.verify import verify_answers
from bridge_rl.verify.answer import comparable_answer, completion_text


def correct(
    completions: list[Any],
    answer: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    timeout_s: float = 5.0,
    **kwargs: Any,
) -> list[float]:
    """1.0 or 0.0 a completion. What could not be judged gets 0.0 and is logged as a rate: timeout, error, unparsed."""
    verdicts = verify_answers([completion_text(completion) for completion in completions], answer, timeout_s)
    if log_metric is not None and verdicts:
        for status in ("timeout", "error", "unparsed"):
            rate = sum(verdict.status == status for verdict in verdicts) / len(verdicts)
            log_metric(f"verify/{status}", rate)
    if log_extra is not None:
        log_extra("verdict", [verdict.status for verdict in verdicts])
    return [float(verdict.correct) for verdict in verdicts]


def final_answer(completion: str) -> str | None:
    """For majority votes: the marked answer in a form in which `1/2` and `0.5` are equal; None if none is marked."""
    return comparable_answer(completion)
