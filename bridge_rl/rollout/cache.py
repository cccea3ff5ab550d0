"""The key-value cache of rows that come and go: a prompt is held once a group, and nothing is held beyond a page.

Shapes: R rows running, N rows of the widest group, M pages in use and C columns of a page, of the rows' or the
prompts', H key-value heads, Q query heads of each, K head size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from bridge_rl.rollout.layout import Layout
from bridge_rl.rollout.pages import Pages


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
        self.layout, self.columns = layout, columns
        self.cells = self.rows.cells_at(pages, columns)
        self.biases: dict[int | None, tuple[Tensor, Tensor]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with this step's [R, H, 1, K]: written down, and returned as they are."""
        cells = self.rows.data[layer_idx].flatten(0, -2)
        states = torch.cat([x.reshape(-1, x.shape[-1]) for x in (keys, values)])
        cells.index_copy_(0, self.cells, states.to(cells.dtype))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not 0, so that a model takes the step for a step."""
        return 1

    def bias(self, window: int | None) -> tuple[Tensor, Tensor]:
        """What is seen of the rows' pages and of the prompts', [M*H, 1, C] each; `window`: the latest so many."""
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
            self.biases[window] = (self._as_bias(seen), self._as_bias(prompt_seen))
        return self.biases[window]

    def _as_bias(self, seen: Tensor) -> Tensor:
        """bool [M, C] -> [M*H, 1, C]."""
        data = self.rows.data
        bias = torch.zeros(seen.shape, dtype=data.dtype, device=data.device)
        # Finite with any score added, so that a row that only fills up a step, which sees nothing, has no NaN.
        bias.masked_fill_(~seen, torch.finfo(data.dtype).min / 2)
        return bias[:, None].expand(-1, self.rows.num_heads, -1).flatten(0, 1)[:, None]

    def asked(self, q: Tensor) -> Iterator[Tensor]:
        """Queries [R, H, Q, K] as they ask the rows' pages, [M*H, Q, K], and the prompts', [M*H, N*Q, K].

        One after the other, since they are as large as what they ask for.
        """
        layout = self.layout
        yield q.index_select(0, layout.rows.owner).flatten(0, 1)
        of_groups = q.flatten(0, 1).index_select(0, layout.parts.asking)
        yield of_groups.unflatten(0, (-1, layout.rows_of_group.shape[1])).flatten(1, 2)

    def attend(self, query: Tensor, layer: int, scaling: float, window: int | None) -> Tensor:
        """Queries [R, H, Q, K] -> what each row sees of its prompt and of itself, [R, H, Q, K].

        One softmax over all parts (`layout.Parts`), in as few operations as there are kinds of work: of few rows, and
        on CUDA, a step costs what its operations cost to start.
        """
        layout, parts, (*_, num_queries, head_size) = self.layout, self.layout.parts, query.shape
        q = query.to(self.rows.data.dtype)
        stored = (self.rows.heads(layer, len(layout.rows.owner)), self.prompts.heads(layer, len(layout.prompts.owner)))

        scores = [
            torch.baddbmm(bias, x, keys.transpose(1, 2), alpha=scaling).float().view(-1, num_queries, keys.shape[1])
            for x, (keys, _), bias in zip(self.asked(q), stored, self.bias(window), strict=True)
        ]
        num_parts = list(map(len, scores))
        largest = parts.largest(torch.cat([x.amax(-1) for x in scores]))[..., None]
        weights = [x.sub_(most).exp_() for x, most in zip(scores, largest.split(num_parts), strict=True)]
        total = parts.sum(torch.cat([x.sum(-1) for x in weights]))

        mixed = q.new_empty(sum(num_parts), num_queries, head_size)
        for out, weight, (_, values) in zip(mixed.split(num_parts), weights, stored, strict=True):
            by_page = (len(values), -1)
            torch.bmm(weight.view(*by_page, values.shape[1]).to(q.dtype), values, out=out.view(*by_page, head_size))
        return (parts.sum(mixed.float()) / total[..., None]).view(query.shape).to(query.dtype)


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
    grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
    return rollout_cache.attend(grouped, module.layer_idx, scaling, sliding_window).flatten(1, 2)[:, None], None
