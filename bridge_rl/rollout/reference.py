"""The slow, obvious oracle: one padded full-sequence forward over whole groups."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from bridge_rl.group import groups_of, pad_left, pad_right, repeat_for_rows
from bridge_rl.rollout.sampling import scaled_logprobs
from bridge_rl.surgery import group_width, has_bridge


@torch.no_grad()
def group_logprobs(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    temperature: float = 1.0,
) -> list[list[list[float]]]:
    """Log-prob of every completion token, given the prompt and the siblings: a list over groups, rows, tokens.

    `completions[g]` are the N rows of prompt g, EOS included; all groups have the same width. Raises ValueError if not.
    """
    widths = {len(group) for group in completions}
    if len(prompt_ids) != len(completions) or len(widths) != 1:
        raise ValueError(
            f"{len(prompt_ids)} prompts and groups of widths {sorted(widths)}: one group a prompt, all of one width."
        )
    width = widths.pop()
    rows = [row for group in completions for row in group]
    prompt, prompt_mask = pad_left(repeat_for_rows(prompt_ids, width), 0, model.device)
    completion, completion_mask = pad_right(rows, 0, model.device)
    ids = torch.cat([prompt, completion], dim=1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if has_bridge(model):
        with group_width(model, width):
            logits = model(**inputs, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits
    # The logits at a column predict the token of the next one.
    logprobs = scaled_logprobs(logits[:, prompt.shape[1] - 1 : -1], temperature)
    chosen = logprobs.gather(-1, completion[:, :, None])[:, :, 0].tolist()
    return groups_of([values[: len(row)] for values, row in zip(chosen, rows, strict=True)], width)
