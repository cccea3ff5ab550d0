"""The slow, obvious oracles: a padded full-sequence forward, and a loop in which every row runs to the end."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bridge_rl.errors import UserError
from bridge_rl.group import groups_of, pad_left, pad_right, repeat_for_rows, split_rows
from bridge_rl.rollout.decode import sampling_mode, siblings
from bridge_rl.rollout.ending import eos_token_ids
from bridge_rl.rollout.request import Group, check_logprob, check_prompts, check_tokens, lengths_of
from bridge_rl.rollout.sampling import SamplingParams, check_temperature, draw_tokens, group_uniforms, scaled_logprobs
from bridge_rl.surgery import check_model, group_width, has_bridge


@torch.no_grad()
def group_logprobs(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    temperature: float = 1.0,
) -> list[list[list[float]]]:
    """Log-prob of every completion token, given the prompt and the siblings: a list over groups, rows, tokens.

    `completions[g]` are the N rows of prompt g, EOS included; all groups have the same width. `temperature`: as in
    SamplingParams. Raises ValueError for other widths, a prompt without tokens, tokens that the model does not have,
    and logits that are not finite. The model is in eval mode meanwhile, as it is while it samples.
    """
    check_model(model)
    check_temperature(temperature)
    check_prompts(model, prompt_ids)
    widths = lengths_of(completions)
    if widths is None:
        raise UserError(f"completions is {completions!r:.60}: give a list of groups, each a list of rows of token ids.")
    if len(prompt_ids) != len(widths) or len(set(widths)) > 1 or 0 in widths:
        raise UserError(
            f"{len(prompt_ids)} prompts and groups of widths {sorted(set(widths))}: one group a prompt, all of one "
            "width, which is at least 1."
        )
    if not widths:
        return []
    for place, group in enumerate(completions):
        for number, row in enumerate(group):
            check_tokens(f"Completion {number} of prompt {place}", row, model)
    width = widths[0]
    rows = [row for group in completions for row in group]
    prompt, prompt_mask = pad_left(repeat_for_rows(prompt_ids, width), 0, model.device)
    completion, completion_mask = pad_right(rows, 0, model.device)
    ids = torch.cat([prompt, completion], dim=1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with sampling_mode(model), group_width(model, width) if has_bridge(model) else nullcontext():
        logits = model(**inputs, use_cache=False).logits
    # The logits at a column predict the token of the next one.
    logprobs = scaled_logprobs(logits[:, prompt.shape[1] - 1 : -1], temperature)
    chosen = logprobs.gather(-1, completion[:, :, None])[:, :, 0].tolist()
    found = [values[: len(row)] for values, row in zip(chosen, rows, strict=True)]
    for logprob in (logprob for values in found for logprob in values):
        check_logprob(logprob)
    return groups_of(found, width)


@torch.no_grad()
def generate_groups_slowly(
    model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], width: int, params: SamplingParams
) -> list[Group]:
    """What `generate_groups` must return: all rows in one padded batch, finished ones too, with stock caches."""
    eos = torch.tensor(eos_token_ids(model, params), device=model.device, dtype=torch.long)
    indices = range(len(prompt_ids))
    device = model.device
    uniforms = group_uniforms(params.seed, indices, width, params.max_new_tokens).to(device)
    # Prefill, one row a group: on prompt tokens all rows are equal, and attention over equal rows gives their value.
    ids, mask = pad_left(prompt_ids, 0, device)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
        **siblings(has_bridge(model), mask[:, None, :].bool()),
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(width)
    mask, logits = (x.repeat_interleave(width, dim=0) for x in (mask, output.logits[:, -1]))
    position = mask.sum(-1, keepdim=True)  # [B, 1], of the token to be fed next

    tokens, logprobs = [], []
    alive = torch.ones(len(mask), dtype=torch.bool, device=device)  # [B], rows still sampling
    for step in range(params.max_new_tokens):
        token, logprob = draw_tokens(logits, uniforms[step], params)
        tokens.append(token)
        logprobs.append(logprob)
        seen = alive  # a row that has just drawn its EOS is seen once more, at the EOS's column
        alive = alive & ~torch.isin(token, eos)
        if step + 1 == params.max_new_tokens or not alive.any():
            break
        mask = torch.cat([mask, seen[:, None].to(mask.dtype)], dim=1)
        output = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            **siblings(has_bridge(model), split_rows(seen[:, None], width)),
        )
        logits, position = output.logits[:, -1], position + 1
    return _collect(torch.stack(tokens, 1), torch.stack(logprobs, 1), eos, width)


def _collect(tokens: Tensor, logprobs: Tensor, eos: Tensor, width: int) -> list[Group]:
    """[B, T] tokens and log-probs, cut after each row's first EOS."""
    is_eos = torch.isin(tokens, eos)
    stopped = is_eos.any(dim=1).tolist()
    lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, tokens.shape[1]).tolist()
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths, stopped, strict=True)
    cut = [(row[:n], logprob[:n], "stop" if stop else "length") for row, logprob, n, stop in rows]
    return [Group(*map(list, zip(*group, strict=True))) for group in groups_of(cut, width)]
