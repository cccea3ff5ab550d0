"""The key-value cache of rows that come and go: a prompt is held once a group, and nothing is held beyond a page.

Shapes: R rows running, G their groups, M pages in use, C columns of a page, H key-value heads, Q query heads of each,
K head size, N rows of the widest group, S owners of pages (rows or groups).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from bridge_rl.rollout.pages import Pages, PageTable

MASKED = -1e30  # finite, so that a page of which nothing is seen gives no NaN


@dataclass
class Layout:
    """Which rows run in a step, and how they share prompts. It changes when rows come, go, or need a page.

    group_of_row: int64 [R], slot of its group; circle_of_row: int64 [R], equal for rows that hear each other;
    rows_of_group: int64 [G, N], those that are left, padded with the first; place_of_row: int64 [R], where it stands in
    `rows_of_group`, flattened; prompt_lengths: int64 [G].
    """

    group_of_row: Tensor
    circle_of_row: Tensor
    place_of_row: Tensor
    rows_of_group: Tensor
    prompt_lengths: Tensor
    rows: PageTable
    prompts: PageTable


class PrefillCache(DynamicCache):
    """Keys and values of prompts until they are in pages, in the dtype of the values.

    Under autocast to bf16 the keys of an fp32 model are fp32, since rotary embeddings are added in fp32, and its
    attention casts them. transformers' cache would keep the values in the dtype of the keys.
    """

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return super().update(keys.to(values.dtype), values, layer_idx, *args, **kwargs)


class PagedCache(Cache):
    """What a model's decode steps write their keys and values to, and attend to.

    The rows of a group are in lockstep: all that are left have equally many columns of their own, after one prompt.
    """

    def __init__(self, rows: Pages, prompts: Pages) -> None:
        super().__init__(layers=[])
        self.rows, self.prompts = rows, prompts

    def begin_step(self, layout: Layout, columns: Tensor, pages: Tensor) -> None:
        """`columns`: int64 [R], the own column that each row writes in this step; `pages`: the page that it is in."""
        self.layout, self.columns, self.pages = layout, columns, pages
        self.offsets = columns % self.rows.columns
        self.biases: dict[int | None, tuple[Tensor, Tensor]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with this step's [R, H, 1, K]: written down, and returned as they are."""
        data = self.rows.data[layer_idx]
        states = [x[:, :, 0].to(data.dtype) for x in (keys, values)]
        data[:, self.pages, :, self.offsets] = torch.stack(states, dim=1)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not 0, so that a model takes the step for a step."""
        return 1

    def bias(self, window: int | None) -> tuple[Tensor, Tensor]:
        """What is seen of the rows' pages and of the prompts', [M, 1, 1, C] each; `window`: the latest so many."""
        if window not in self.biases:
            layout = self.layout
            last = self.columns[layout.rows.owner][:, None]
            row_columns = layout.rows.column
            seen = row_columns <= last
            lengths = layout.prompt_lengths[layout.prompts.owner][:, None]
            prompt_seen = layout.prompts.column < lengths
            if window is not None:
                seen &= row_columns > last - window
                group_last = self.columns[layout.rows_of_group[:, 0]][layout.prompts.owner][:, None]
                prompt_seen &= layout.prompts.column > lengths + group_last - window
            self.biases[window] = (_as_bias(seen), _as_bias(prompt_seen))
        return self.biases[window]

    def attend(self, q: Tensor, layer: int, window: int | None) -> Tensor:
        """Scaled queries [R, H, Q, K] -> what each row sees of its prompt and of itself, [R, H, Q, K]."""
        layout = self.layout
        row_bias, prompt_bias = self.bias(window)
        own = attend_pages(q, self.rows.data[layer, :, : len(layout.rows.owner)], row_bias, layout.rows)
        # All rows of a group ask the same pages: one product for them.
        groups, width = layout.rows_of_group.shape
        asked = q.index_select(0, layout.rows_of_group.flatten()).unflatten(0, (groups, width))
        together = asked.transpose(1, 2).flatten(2, 3)  # [G, H, N*Q, K]
        shared = attend_pages(
            together, self.prompts.data[layer, :, : len(layout.prompts.owner)], prompt_bias, layout.prompts
        )
        by_row = (x.unflatten(2, (width, -1)).transpose(1, 2).flatten(0, 1) for x in shared)  # [G*N, H, Q, ...]
        return join(own, Part(*(x.index_select(0, layout.place_of_row) for x in by_row))).to(q.dtype)


class Part(NamedTuple):
    """Attention over some of the columns: what is left to do is to divide by the sum of the weights of all.

    mixed: sum of weighted values [S, H, Q, K]; largest: score, which the weights are relative to, [S, H, Q]; total: sum
    of weights [S, H, Q]. All fp32.
    """

    mixed: Tensor
    largest: Tensor
    total: Tensor


def attend_pages(q: Tensor, data: Tensor, bias: Tensor, table: PageTable) -> Part:
    """Attention of each owner's queries over its own pages.

    `q` [S, H, Q, K] scaled, of S owners; `data` keys and values [2, M, H, C, K]; `bias` [M, 1, 1, C], 0 or MASKED.
    """
    keys, values = data
    scores = (q.index_select(0, table.owner) @ keys.transpose(-1, -2)).float().add_(bias)  # [M, H, Q, C]
    index = table.owner[:, None, None].expand(scores.shape[:3])
    largest = scores.new_full(q.shape[:3], MASKED).scatter_reduce_(0, index, scores.amax(-1), "amax")
    weights = scores.sub_(largest.index_select(0, table.owner)[..., None]).exp_()
    mixed = (weights.to(values.dtype) @ values).float()
    return Part(_sum_by_owner(mixed, table, len(q)), largest, _sum_by_owner(weights.sum(-1), table, len(q)))


def _sum_by_owner(x: Tensor, table: PageTable, num_owners: int) -> Tensor:
    """[M, ...] -> [S, ...]. Not `index_add_`, which on CUDA adds in an order that changes from run to run."""
    return F.embedding_bag(table.order, x.flatten(1), table.starts, mode="sum").view(num_owners, *x.shape[1:])


def _as_bias(seen: Tensor) -> Tensor:
    bias = torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill_(~seen, MASKED)
    return bias[:, None, None, :]


def join(first: Part, second: Part) -> Tensor:
    """One softmax over two disjoint sets of columns, [S, H, Q, K]."""
    largest = torch.maximum(first.largest, second.largest)
    scale_1, scale_2 = (first.largest - largest).exp_(), (second.largest - largest).exp_()
    total = first.total * scale_1 + second.total * scale_2
    return first.mixed * (scale_1 / total)[..., None] + second.mixed * (scale_2 / total)[..., None]


def lockstep_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    rollout_cache: PagedCache,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """A transformers attention function for one step: `query` [R, H*Q, 1, K] -> [R, 1, H*Q, K]."""
    grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1)) * scaling
    return rollout_cache.attend(grouped, module.layer_idx, sliding_window).flatten(1, 2)[:, None], None
