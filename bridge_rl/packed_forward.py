"""A model's forward pass over packed groups (`packed`), and the log-probs of their completions' tokens alone.

Shapes: B rows, C columns of the completions, L tokens of the completions, T tokens of the packed sequence, H key-value
heads, Q query heads, K head size, D model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from bridge_rl.errors import UserError
from bridge_rl.packed import PackedGroups, pack_groups
from bridge_rl.rollout.decode import attention
from bridge_rl.surgery import has_bridge

PACKED = "bridge_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_groups: PackedGroups,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """A transformers attention function: `query` [1, Q, T, K], `key` and `value` [1, H, T, K] -> [1, T, Q, K].

    A prompt attends to itself, a completion to its prompt and to itself, causally; `sliding_window` is the latest so
    many tokens that are seen. One call a prompt and a row: no padding, and nothing of other rows is masked out.
    Raises UserError for a model that caps its scores.
    """
    if kwargs.get("softcap") is not None:
        raise UserError(
            "The model caps attention scores, which packed rows are computed without: set update.share_prompt=false."
        )
    packed = packed_groups
    # Under autocast rotary embeddings leave queries and keys in fp32; torch casts them too, but not beside such masks.
    query, key = query.to(value.dtype), key.to(value.dtype)

    def attend(queries: tuple[int, int], k: Tensor, v: Tensor) -> Tensor:
        start, end = queries
        mask = _causal(packed, end - start, k.shape[2], sliding_window, query.device)
        if type(mask) is Tensor:  # with a mask, CUDA's fused kernels want as many heads of keys as of queries
            k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return scaled_dot_product_attention(
            query[:, :, start:end], k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True,
            is_causal=mask is None,
        )  # fmt: skip

    parts = [attend((start, end), key[:, :, start:end], value[:, :, start:end]) for start, end in packed.prompts]
    for number, (start, end) in zip(packed.prompt_of_row, packed.rows, strict=True):
        first, last = packed.prompts[number]
        k, v = (torch.cat([x[:, :, first:last], x[:, :, start:end]], dim=2) for x in (key, value))
        parts.append(attend((start, end), k, v))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _causal(packed: PackedGroups, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """What the last `queries` of `keys` tokens see: None is plainly causal, else bool [queries, keys] or a bias that
    flash kernels do without."""
    if window is None or window >= keys:
        return None if queries == keys else causal_lower_right(queries, keys)
    if (queries, keys, window) not in packed.masks:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
        packed.masks[queries, keys, window] = seen.tril(keys - queries).triu(keys - queries - window + 1)
    return packed.masks[queries, keys, window]


AttentionInterface.register(PACKED, packed_attention)


def serve_packed(model: PreTrainedModel | PeftModel) -> None:
    """Let the backbone of `model`, called with `packed_groups`, give the hidden states that predict: [1, L, D]."""

    def keep_scored(backbone: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("packed_groups") is not None:
            output.last_hidden_state = output.last_hidden_state.index_select(1, kwargs["packed_groups"].scored)
        return output

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = base.base_model
    if not getattr(backbone, "serves_packed", False):  # by an earlier trainer: twice would pick from what was picked
        backbone.register_forward_hook(keep_scored, with_kwargs=True)
        backbone.serves_packed = True


def packed_inputs(packed: PackedGroups, has_bridge: bool) -> dict[str, Any]:
    """What a model that `serve_packed` prepared is called with; its attention must be `PACKED`.

    The mask has four dimensions, so that the model makes none of its own. It is read for the load balance of experts
    only, which weighs tokens by it.
    """
    inputs = {
        "input_ids": packed.ids,
        "position_ids": packed.positions,
        "attention_mask": packed.counts,
        "packed_groups": packed,
        "use_cache": False,
    }
    return {**inputs, "bridge_alive": packed} if has_bridge else inputs


def packed_logprobs(
    model: Any, module: PreTrainedModel, batch: Sequence[Tensor], width: int, aux_loss: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs and entropies [B, C] (0 on padding) and the load-balancing loss from TRL's fused LM head, which is
    given the hidden states of the completions only and never holds all their logits.

    `model` is called, and may be a wrapper of `module`, the model that `serve_packed` prepared. `batch`: ids and mask
    of the prompts, ids and mask of the completions, of whole groups.
    """
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch
    packed = pack_groups(prompt_ids, prompt_mask, completion_ids, completion_mask, width)
    extra = {"output_router_logits": True} if aux_loss else {}
    with attention(module, PACKED):
        inputs = packed_inputs(packed, has_bridge(module))
        output = model(**inputs, shift_labels=packed.labels, fused_lm_head=True, **extra)
    alive = completion_mask.bool()

    def pad(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(alive.shape).masked_scatter(alive, x)

    logps = pad(output.log_probs)
    assert logps is not None
    return logps, pad(output.entropy), output.aux_loss if aux_loss else None


def packed_logprobs_of_chunks(
    model: Any, module: PreTrainedModel, batch: Sequence[Tensor], width: int, chunks: list[Tensor], aux_loss: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`packed_logprobs` of a batch whose rows are computed in `chunks`, lists of rows that together are all of them."""
    found = [packed_logprobs(model, module, [x[rows] for x in batch], width, aux_loss) for rows in chunks]
    order = torch.cat(chunks).argsort()
    logps = torch.cat([logps for logps, _, _ in found])[order]
    entropies = [entropy for _, entropy, _ in found if entropy is not None]
    aux_losses = [loss for _, _, loss in found if loss is not None]
    return (
        logps,
        torch.cat(entropies)[order] if entropies else None,
        torch.stack(aux_losses).mean() if aux_losses else None,
    )
