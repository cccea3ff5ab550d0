"""The embedded task: 1.0 if the completion ends in a pair that makes the problem's sum."""

import re
from typing import Any

from bridge_rl.tiny.task import is_correct
from bridge_rl.verify.answer import completion_text

_PAIR = re.compile(r"!(\d\d)\+(\d\d)$")


def correct(completions: list[Any], problem: list[str], **kwargs: Any) -> list[float]:
    """1.0 or 0.0 a completion."""
    return [float(is_correct(p, completion_text(c))) for p, c in zip(problem, completions, strict=True)]


def final_answer(completion: str) -> str | None:
    """For majority votes: the pair at the end, smaller number first; None if there is none."""
    match = _PAIR.search(completion)
    return None if match is None else "+".join(sorted(match.groups()))
