"""Solutions that are chains of equations: the answer of `19*07=133;133*12=01596` is the number behind the last sign."""

import re

_ANSWER = re.compile(r"=([0-9]+)\Z")


def final_answer(completion: str) -> str | None:
    """The number that `completion` ends in, without leading zeros; None if there is none."""
    match = _ANSWER.search(completion)
    return None if match is None else match[1].lstrip("0") or "0"


def is_correct(answer: str, completion: str) -> bool:
    """Whether `completion` ends in `answer`, a number without leading zeros."""
    return final_answer(completion) == answer
