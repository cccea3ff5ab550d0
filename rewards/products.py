"""The task of three factors: 1.0 if the completion ends in their product."""

from typing import Any

from bridge_rl.tiny.products import final_answer, is_correct
from bridge_rl.verify.answer import completion_text

__all__ = ["correct", "final_answer"]  # `final_answer`: for majority votes


def correct(completions: list[Any], problem: list[str], **kwargs: Any) -> list[float]:
    """1.0 or 0.0 a completion."""
    return [float(is_correct(p, completion_text(c))) for p, c in zip(problem, completions, strict=True)]
