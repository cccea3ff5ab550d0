"""1.0 if the completion, a chain of equations, ends in the number that `answer` asks for."""

from typing import Any

from bridge_rl.tiny.equations import final_answer, is_correct
from bridge_rl.verify.answer import completion_text

__all__ = ["correct", "final_answer"]  # `final_answer`: for majority votes


def correct(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 or 0.0 a completion."""
    return [float(is_correct(a, completion_text(c))) for a, c in zip(answer, completions, strict=True)]
