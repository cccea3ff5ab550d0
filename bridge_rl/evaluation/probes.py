"""What the blocks do on sampled groups: how much they add, and where their attention goes.

Shapes: G groups, N width, B = G*N rows, P prompt columns, T completion columns, D model, H heads, S steps (bins).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.block import BridgeBlock
from bridge_rl.data import prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.evaluation.counterfactual import Judging, run_counterfactuals
from bridge_rl.evaluation.forced import MAX_TOKENS, Batch, in_batches, make_batch, observing
from bridge_rl.evaluation.results import Probes
from bridge_rl.evaluation.samples import SampledGroup
from bridge_rl.group import merge_rows
from bridge_rl.meters import find_blocks, record_norm_ratios
from bridge_rl.rollout.sampling import SamplingParams

WATCHED = 256  # groups


def run_probes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    groups: Sequence[SampledGroup],
    width: int,
    params: SamplingParams,
    index_of: Callable[[SampledGroup], int],
    judge: Judging,
    max_rows: int = 64,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Probes:
    """Everything that `Probes` holds, from the groups of condition `model` at `width` among `groups`.

    rows: the problems, with `prompt`, `problem`, `answer`. params, index_of: what the groups were sampled with, and the
    index of each among the draws. judge: an `evaluation.judge.Judge`.
    The blocks are watched on the first WATCHED groups, one a problem before a second of any.
    max_rows: wrong rows tried with other siblings. progress: told of rows sampled anew, and of how many there will be.
    The model's mode, its switch and its width are left as they were. Raises UserError if the model has no Bridge or
    there are no such groups.
    """
    mine = [group for group in groups if group.condition == "model" and group.width == width]
    if not mine:
        raise UserError(f"There are no groups of width {width} to probe: sample that width first.")
    prompt_ids = prompt_tokens(tokenizer, [row["prompt"] for row in rows])
    watched = sorted(mine, key=lambda group: (group.group, group.problem))[:WATCHED]
    found = probe_blocks(model, [prompt_ids[g.problem] for g in watched], [g.tokens for g in watched])
    tried = run_counterfactuals(
        model, tokenizer, rows, prompt_ids, mine, params, index_of, judge, max_rows=max_rows, progress=progress
    )
    return replace(found, counterfactuals=tried)


@torch.no_grad()
def probe_blocks(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    bins: int = 10,
    max_tokens: int = MAX_TOKENS,
) -> Probes:
    """What every block does while whole groups, one a prompt, all of one width, are read from left to right.

    norm_ratio: mean of |what is added to x| / |x| over the tokens of all completions, EOS included; prompts and padding
    are left out. As in training (`meters.record_norm_ratios`).
    sibling_share: attention on other rows, a mean over those of these tokens at whose column another row of the group
    is alive, since a row alone has no choice. A row that attends to all alike has (n - 1) / n where n rows are alive.
    share_by_step: the same, a mean over heads too, in `bins` equal parts of each row's own completion; a token that
    lies in several parts counts in each by its overlap, so that short completions leave no part empty.
    At width 1 the shares are 0; of P-Match blocks, which have no attention, they are empty lists.
    `max_tokens`: of one forward pass, padding included; one group is the least. Raises ValueError for groups of several
    widths, UserError if the model has no Bridge.
    """
    widths = {len(group) for group in completions}
    if len(prompt_ids) != len(completions) or len(widths) != 1:
        raise ValueError(
            f"{len(prompt_ids)} prompts, groups of widths {sorted(widths)}: one a prompt, all of one width."
        )
    width = widths.pop()
    groups = list(zip(prompt_ids, completions, strict=True))
    layers = sorted({layer for layer, _ in find_blocks(model)})
    sums = {layer: Sums(bins) for layer in layers}
    with observing(model):
        for part in in_batches(groups, lambda g: (width, len(g[0]), max(map(len, g[1]))), max_tokens):
            batch = make_batch([[prompt] * width for prompt, _ in part], [rows for _, rows in part], model.device)
            alive = merge_rows(batch.alive)
            with record_norm_ratios(model, alive) as ratios, watching_attention(model, sums, Scene.of(batch, bins)):
                model(**batch.inputs, logits_to_keep=1)
            for layer, ratio in ratios.items():
                sums[layer].tokens += int(alive.sum())
                sums[layer].ratio += ratio.item()
    attends = any(isinstance(block, BridgeBlock) for _, block in find_blocks(model))
    return Probes(
        width=width,
        groups=len(groups),
        layers=layers,
        norm_ratio=[sums[layer].norm_ratio for layer in layers],
        sibling_share=[sums[layer].sibling_share for layer in layers] if attends else [],
        share_by_step=[sums[layer].share_by_step for layer in layers] if attends else [],
    )


class Sums:
    """Sums over tokens of what one layer's block did; means on demand."""

    def __init__(self, bins: int) -> None:
        self.tokens, self.ratio, self.heard = 0, 0.0, 0
        self.share: list[float] = []  # [H]
        self.step_share, self.step_weight = [0.0] * bins, [0.0] * bins

    @property
    def norm_ratio(self) -> float:
        return self.ratio / max(self.tokens, 1)

    @property
    def sibling_share(self) -> list[float]:
        return [share / max(self.heard, 1) for share in self.share]

    @property
    def share_by_step(self) -> list[float]:
        pairs = zip(self.step_share, self.step_weight, strict=True)
        return [share / weight if weight else 0.0 for share, weight in pairs]

    def add_shares(self, shares: Tensor, parts: Tensor) -> None:
        """Of tokens that hear a sibling: shares [tokens, H], and how much of each token is in each part [tokens, S]."""
        self.heard += len(shares)
        self.share = added(self.share or [0.0] * shares.shape[1], shares.sum(0))
        self.step_share = added(self.step_share, shares.mean(1) @ parts)
        self.step_weight = added(self.step_weight, parts.sum(0))


def added(total: list[float], more: Tensor) -> list[float]:
    """Elementwise, in double precision."""
    return [a + b for a, b in zip(total, more.tolist(), strict=True)]


@contextmanager
def watching_attention(model: nn.Module, sums: dict[int, Sums], scene: "Scene") -> Iterator[None]:
    """Inside, a forward pass adds to each layer's sums where its block's attention goes."""
    with ExitStack() as hooks:
        for layer, block in find_blocks(model):
            if isinstance(block, BridgeBlock):
                handle = block.register_forward_hook(partial(watch, sums=sums[layer], scene=scene))
                hooks.callback(handle.remove)
        yield


@dataclass(frozen=True)
class Scene:
    """Which tokens of a batch count for attention.

    prompt_columns: left out. hears: tokens at whose column another row of the group is alive, bool [B, T]. parts: how
    much of each token lies in each bin, [B, T, S].
    """

    prompt_columns: int
    hears: Tensor
    parts: Tensor

    @classmethod
    def of(cls, batch: Batch, bins: int) -> "Scene":
        rows = merge_rows(batch.alive)
        hears = merge_rows(batch.alive & (batch.alive.sum(1, keepdim=True) > 1))
        return cls(batch.prompt_columns, hears, relative_steps(rows.sum(1), rows.shape[1], bins))


def relative_steps(lengths: Tensor, num_tokens: int, bins: int) -> Tensor:
    """How much of token t, which lasts from t / length to (t + 1) / length of its row, is in each bin: [B, T, S].

    Each token of a row adds up to 1.
    """
    length = lengths.clamp(min=1)[:, None, None].float()  # [B, 1, 1]
    token = torch.arange(num_tokens, device=lengths.device)[None, :, None] / length
    edge = torch.arange(bins, device=lengths.device) / bins
    begin, end = torch.maximum(token, edge), torch.minimum(token + 1 / length, edge + 1 / bins)
    return (end - begin).clamp(min=0) * length


def watch(block: BridgeBlock, args: tuple[Tensor, Tensor], output: Tensor, sums: Sums, scene: Scene) -> None:
    """Forward hook of a block that was called with hidden states [B, P + T, D] and the layout [G, N, P + T]."""
    x, alive = args[0][:, scene.prompt_columns :], args[1][..., scene.prompt_columns :]
    itself = block.attention_weights(x, alive).diagonal(dim1=-2, dim2=-1)  # [G, T, H, N]
    shares = merge_rows(1 - itself.permute(0, 3, 1, 2))  # [B, T, H]
    sums.add_shares(shares[scene.hears], scene.parts[scene.hears])
