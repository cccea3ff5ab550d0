"""1.0 for an answer to which a reasoning-gym task gives its full score, found in processes that can be killed."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bridge_rl import verify
from bridge_rl.verify.answer import completion_text, last_box
from bridge_rl.verify.pool import Job, VerifierPool

WORKER = Path(verify.__file__).with_name("reasoning_gym_worker.py")
MAX_CHARS = 10_000  # of an answer: boards and partitions are long


@dataclass(frozen=True)
class Question(Job):
    """An answer for a task's own `score_answer`; entry: the row that the task made, as JSON."""

    task: str
    entry: str
    answer: str


def correct(
    completions: list[Any],
    task: list[str],
    entry: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    timeout_s: float = 5.0,
    **kwargs: Any,
) -> list[float]:
    """1.0 or 0.0 a completion. task, entry: columns of the `rg:` suites. Verdicts are logged as in `answer.py`."""
    answers = [_answer(completion_text(completion)) for completion in completions]
    asked = [
        None if text is None else Question(name, row, text)
        for text, name, row in zip(answers, task, entry, strict=True)
    ]
    judged = _pool().judge_all([question for question in asked if question is not None], timeout_s)
    verdicts = [verify.Verdict(False, "unparsed") if question is None else judged[question] for question in asked]
    if log_metric is not None and verdicts:
        for status in ("timeout", "error", "unparsed"):
            log_metric(f"verify/{status}", sum(verdict.status == status for verdict in verdicts) / len(verdicts))
    if log_extra is not None:
        log_extra("verdict", [verdict.status for verdict in verdicts])
    return [float(verdict.correct) for verdict in verdicts]


def final_answer(completion: str) -> str | None:
    """For majority votes: the answer with runs of white space as one blank; None if there is none."""
    answer = _answer(completion)
    return None if answer is None else " ".join(answer.split())


def _answer(text: str) -> str | None:
    r"""In the last `<answer>` tag, else in the last `\boxed{}`, else the whole text if it is one line without tags."""
    final = text.rpartition("</think>")[2].strip()
    # By searches from the end, in linear time: a model may write any number of tags.
    before, closed, _ = final.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if closed and opened:
        answer = tagged.strip()
    elif (boxed := last_box(final)) is not None:
        answer = boxed.strip()
    else:
        answer = "" if "\n" in final or "<" in final or "\\boxed" in final else final
    return answer if 0 < len(answer) <= MAX_CHARS else None


@lru_cache(maxsize=1)
def _pool() -> VerifierPool:
    """Processes start on first use and are shared."""
    return VerifierPool(script=WORKER)


os.register_at_fork(after_in_child=_pool.cache_clear)  # its threads are the parent's
