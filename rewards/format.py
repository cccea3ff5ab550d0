r"""1.0 for a completion that reads like an answer: thinking closed, then one box."""

from typing import Any

from bridge_rl.verify.answer import completion_text, count_boxes


def boxed(completions: list[Any], **kwargs: Any) -> list[float]:
    r"""1.0 if the final part holds exactly one `\boxed{}` that is closed and not empty, else 0.0.

    The final part is what follows `</think>`, or the whole completion if no thinking was opened. Thinking that was
    opened and not closed, or closed twice, has no final part; boxes inside the thinking do not count.
    A prompt may end in `<think>`, so a lone `</think>` is fine.
    """
    return [float(_is_well_formed(completion_text(completion))) for completion in completions]


def _is_well_formed(text: str) -> bool:
    thinking, _, final = text.rpartition("</think>")
    if "<think>" in final or "</think>" in thinking or thinking.count("<think>") > 1:
        return False
    return count_boxes(final) == 1
