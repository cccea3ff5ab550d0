"""Sample groups in lockstep: all rows of a group are at the same token step, so that they can attend to each other.

Shapes: G groups, N width, B = G*N rows, P prompt columns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bridge_rl.errors import UserError
from bridge_rl.group import groups_of, pad_left, split_rows
from bridge_rl.rollout.sampling import SamplingParams, draw_tokens, group_uniforms


@dataclass(frozen=True)
class Group:
    """The completions of one prompt that were sampled together, each a list over the N rows.

    tokens: ids, with the EOS where one was drawn. logprobs: of each token at the sampling temperature.
    finish_reasons: `stop` at an EOS, `length` at the limit.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]


@torch.no_grad()
def generate_groups(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    width: int,
    params: SamplingParams,
    indices: Sequence[int] | None = None,
    max_rows: int | None = None,
) -> list[Group]:
    """One group of `width` interdependent completions for each prompt, in the order of the prompts.

    A group's tokens depend on its prompt, `params.seed`, its index and the width, not on what else is in the batch.
    `indices`: the index of each group, by default its place in `prompt_ids`. `max_rows`: how many rows run at once
    (whole groups, at least one), by default all. Without Bridge blocks the rows are independent samples.
    """
    if width < 1:
        raise UserError(f"width is {width}: it must be at least 1.")
    for place, prompt in enumerate(prompt_ids):
        if not len(prompt):
            raise UserError(f"Prompt {place} has no tokens: give every group at least one.")
    indices = range(len(prompt_ids)) if indices is None else indices
    size = len(prompt_ids) if max_rows is None else max(1, max_rows // width)
    eos = _eos_ids(model, params)
    groups: list[Group] = []
    with _evaluating(model):
        for start in range(0, len(prompt_ids), size):
            stop = start + size
            groups += _generate_batch(model, prompt_ids[start:stop], width, params, indices[start:stop], eos)
    return groups


def _generate_batch(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    width: int,
    params: SamplingParams,
    indices: Sequence[int],
    eos: Tensor,
) -> list[Group]:
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
        **_alive(model, mask[:, None, :].bool()),
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
            **_alive(model, split_rows(seen[:, None], width)),
        )
        logits, position = output.logits[:, -1], position + 1
    return _collect(torch.stack(tokens, 1), torch.stack(logprobs, 1), eos, width)


def _alive(model: PreTrainedModel, alive: Tensor) -> dict[str, Tensor]:
    """The layout as a keyword; models without blocks do not take it."""
    return {"bridge_alive": alive} if getattr(model.config, "bridge", None) else {}


def _collect(tokens: Tensor, logprobs: Tensor, eos: Tensor, width: int) -> list[Group]:
    """[B, T] tokens and log-probs, cut after each row's first EOS."""
    is_eos = torch.isin(tokens, eos)
    stopped = is_eos.any(dim=1).tolist()
    lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, tokens.shape[1]).tolist()
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths, stopped, strict=True)
    cut = [(row[:n], logprob[:n], "stop" if stop else "length") for row, logprob, n, stop in rows]
    return [Group(*map(list, zip(*group, strict=True))) for group in groups_of(cut, width)]


def _eos_ids(model: PreTrainedModel, params: SamplingParams) -> Tensor:
    eos = params.eos_token_id
    if eos is None:
        eos = model.generation_config.eos_token_id
    if eos is None:
        eos = []  # every row runs to its limit
    return torch.tensor([eos] if isinstance(eos, int) else list(eos), device=model.device, dtype=torch.long)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode: no dropout, and no gradient checkpointing, which would switch the cache off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
