"""What an update computes at once: whole groups in parts of a bounded number of tokens, without needless padding.

Shapes: G groups, N width, B = G*N rows, C columns of the completions.

However a micro-batch is cut, its loss and gradients are those of the whole: the weights of `share_of_loss` undo TRL's
division by what it is given.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import PreTrainedConfig

from bridge_rl.config import UpdateSection
from bridge_rl.group import rows_of_groups, split_rows
from bridge_rl.report import names


def part_conflicts(training: Mapping[str, Any], config: PreTrainedConfig, options: UpdateSection) -> Iterator[str]:
    """Options whose loss is not a sum over groups, and so cannot be computed in parts. `config`: the model's."""
    if options.token_budget is None:
        return
    text = config.get_text_config()
    router, of_router = "router_aux_loss_coef", training.get("router_aux_loss_coef")
    if of_router is None:
        of_router = getattr(text, "router_aux_loss_coef", 0.0)  # as TRL does
        router += " (of the model's config; 0 turns it off)"
    whole = {
        "entropy_coef": training.get("entropy_coef", 0.0) != 0.0,
        "use_adaptive_entropy": training.get("use_adaptive_entropy", False),
        "top_entropy_quantile": training.get("top_entropy_quantile", 1.0) < 1.0,
        router: hasattr(text, "output_router_logits") and of_router != 0.0,
    }
    for key, is_on in whole.items():
        if is_on:
            yield (
                f"update.token_budget is set with training.{key}, which is computed over a whole micro-batch: leave "
                "one of them out, and use training.gradient_accumulation_steps against memory."
            )


def parts_of(
    inputs: dict[str, Any], width: int, options: UpdateSection, accelerator: Accelerator
) -> list[dict[str, Any]]:
    """A micro-batch [B, ...] in parts of whole groups within the token budget, each trimmed to its own longest row."""
    rows = rows_of_parts(inputs["prompt_mask"], inputs["completion_mask"], width, options, accelerator)
    parts = [take_rows(inputs, part) for part in rows] if len(rows) > 1 else [inputs]
    return [trim(part) for part in parts] if options.trim else parts


def rows_of_parts(
    prompt_mask: Tensor, completion_mask: Tensor, width: int, options: UpdateSection, accelerator: Accelerator
) -> list[Tensor]:
    """The rows of each part: the groups sorted by their length and cut at the budget, as many in a part on every rank.

    Ranks that share a model run each pass together, and TRL gathers metrics of the rows that it is given.
    """
    if options.token_budget is None:
        return [torch.arange(len(prompt_mask), device=prompt_mask.device)]
    sizes = sizes_of_groups(prompt_mask, completion_mask, width)
    order = sizes[:, 2 if options.share_prompt else 1].argsort(descending=True, stable=True)
    of_ranks = accelerator.gather(sizes[order][None]).tolist()  # [ranks, G, 3]
    counts = cut_groups(of_ranks, width, options.token_budget, options.share_prompt)
    return [rows_of_groups(part, width) for part in order.split(counts)]


def trim(inputs: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch of TRL's, [B, columns] each, without the columns in which no row holds a token."""
    masks = inputs["prompt_mask"], inputs["completion_mask"]
    columns = inputs["completion_mask"].shape[1]
    prompt, longest = torch.stack([mask.sum(1).max() for mask in masks]).tolist()  # a GPU is waited for once
    trimmed = dict(inputs)
    for key, x in inputs.items():
        if key.startswith("prompt_"):
            trimmed[key] = x[:, x.shape[1] - prompt :]
        elif isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == columns:
            trimmed[key] = x[:, :longest]
    return trimmed


def sizes_of_groups(prompt_mask: Tensor, completion_mask: Tensor, width: int) -> Tensor:
    """int64 [G, 3]: tokens of a group's prompt, of its longest completion, and of all its completions."""
    prompts = split_rows(prompt_mask, width).sum(-1)[:, 0]
    lengths = split_rows(completion_mask, width).sum(-1)  # [G, N]
    return torch.stack([prompts, lengths.amax(1), lengths.sum(1)], dim=1)


def cut_groups(sizes: list[list[list[int]]], width: int, budget: int, packed: bool) -> list[int]:
    """How many groups each part has, of those of `sizes_of_groups` on every rank: within `budget` tokens on all of
    them, or one.

    What counts are the tokens computed: all that a part holds if it is `packed`, else its rows at the longest's length.
    """

    def cost(part: list[list[int]]) -> int:
        prompts, longest, total = zip(*part, strict=True)
        return sum(prompts) + sum(total) if packed else width * len(part) * (max(prompts) + max(longest))

    counts: list[int] = []
    for place in range(len(sizes[0])):
        if counts and max(cost(rank[place - counts[-1] : place + 1]) for rank in sizes) <= budget:
            counts[-1] += 1
        else:
            counts.append(1)
    return counts


def take_rows(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of a micro-batch; what is not per row stays."""
    return {key: x[rows] if isinstance(x, Tensor) and x.dim() > 0 else x for key, x in inputs.items()}


def share_of_loss(loss_type: str, part: dict[str, Any], whole: dict[str, Any]) -> float | Tensor:
    """By what a part's loss is weighted so that the parts add up to the whole micro-batch's.

    TRL divides by the rows that it is given (`grpo`, `sapo`, `dr_grpo`, `luspo`), by the tokens that it is given
    (`bnpo`), or by the tokens of the generation batch, which every part carries along (`dapo`, `cispo`, `vespo`).
    """
    if loss_type == "bnpo":
        tokens, of_all = (counted_mask(inputs).sum() for inputs in (part, whole))
        return tokens / of_all.clamp(min=1)
    if loss_type in ("dapo", "cispo", "vespo"):
        return 1.0
    return len(part["completion_mask"]) / len(whole["completion_mask"])


def join_metrics(
    logged: dict[str, list[float]],
    before: Mapping[str, int],
    parts: list[dict[str, Any]],
    importance_sampling_level: str,
    accelerator: Accelerator,
) -> None:
    """Put one entry, what would be logged of the whole micro-batch, in the place of one for each part.

    before: how many entries each metric had. Parts are sorted by length: their plain mean would count the tokens of
    short completions more. TRL's means are over the tokens that the loss counts, or over rows where a row has one
    value; ours are over all tokens of completions.
    """
    own = [[part["completion_mask"].sum(), counted_mask(part).sum(), len(part["completion_mask"])] for part in parts]
    sizes = accelerator.reduce(torch.tensor(own, device=accelerator.device, dtype=torch.float32), reduction="sum")
    tokens, counted, rows = sizes.double().T.cpu()
    by_row = {"vespo/phi_seq_mean"}
    if importance_sampling_level == "sequence":
        by_row |= {"cispo_clip_ratio", *(f"clip_ratio/{name}_mean" for name in ("low", "high", "region"))}
    for name, values in logged.items():
        start = before.get(name, 0)
        of_parts = torch.tensor(values[start:], dtype=torch.float64)
        if len(of_parts) != len(parts):  # logged once
            continue
        if name.endswith(("_min", "_max")):
            finite = of_parts[~of_parts.isnan()]
            joined = math.nan if len(finite) == 0 else (finite.min() if name.endswith("_min") else finite.max()).item()
        else:
            ours = name == names.RECOMPUTE_KL or name.startswith(names.NORM_RATIO)
            weights = tokens if ours else rows if name in by_row else counted
            joined = (of_parts @ weights / weights.sum().clamp(min=1)).item()
        values[start:] = [joined]


def counted_mask(inputs: dict[str, Any]) -> Tensor:
    """The tokens that the loss counts, [B, C]."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


@contextmanager
def accumulating(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Inside, a backward pass adds to the gradients: no exchange between ranks, no step."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(before)


def loss_of_parts(
    loss_of: Callable[[dict[str, Any]], Tensor], parts: list[dict[str, Any]], model: Any, accelerator: Accelerator
) -> Tensor:
    """The sum of the parts' losses; of all parts but the last the backward pass has then been run already."""
    *before, last = parts
    done = torch.zeros((), device=accelerator.device)
    for part in before:
        with accumulating(accelerator, model):
            loss = loss_of(part)
            backward(accelerator, loss)
        done += loss.detach()
    return loss_of(last) + done


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """As in transformers' training step: DeepSpeed must not divide by the accumulation, TRL has."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
