"""Keys and values of rows that come and go: one preallocated slot a row, nothing concatenated or allocated per step.

Shapes: S slots, R rows in use (always slots 0 to R-1), H key-value heads, K head size, L columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """A cache for a model's decode steps, in which every row has a length of its own.

    A step writes each row's new key and value at the row's length and reads the columns up to the longest row's; the
    attention mask hides what is beyond each row's own. Layers with a sliding window keep all columns, and are masked.
    """

    def __init__(self, num_slots: int, num_columns: int) -> None:
        super().__init__(layers=[])
        self.num_slots, self.num_columns = num_slots, num_columns
        self.keys: list[Tensor] = []  # [S, H, L, K], a layer each
        self.values: list[Tensor] = []
        self.lengths = torch.zeros(0, dtype=torch.long)  # [R]
        self.rows = torch.zeros(0, dtype=torch.long)  # [R] = 0 .. R-1, on the model's device

    def admit(self, prefilled: DynamicCache, pads: Sequence[int], width: int) -> None:
        """Append `width` rows for each prompt of a left-padded prefill; `pads` are their padding columns."""
        first = len(self.lengths)
        if not self.keys:
            self._allocate(prefilled)
        columns = prefilled.layers[0].keys.shape[2]
        for layer, source in enumerate(prefilled.layers):
            for prompt, pad in enumerate(pads):
                slots = slice(first + prompt * width, first + (prompt + 1) * width)
                self.keys[layer][slots, :, : columns - pad] = source.keys[prompt, :, pad:]
                self.values[layer][slots, :, : columns - pad] = source.values[prompt, :, pad:]
        device = self.keys[0].device
        new = torch.tensor([columns - pad for pad in pads], device=device).repeat_interleave(width)
        self._use(torch.cat([self.lengths.to(device), new]))

    def _allocate(self, prefilled: DynamicCache) -> None:
        for source in prefilled.layers:
            shape = (self.num_slots, source.keys.shape[1], self.num_columns)
            self.keys.append(source.keys.new_zeros(*shape, source.keys.shape[3]))
            self.values.append(source.values.new_zeros(*shape, source.values.shape[3]))

    def _use(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.rows = torch.arange(len(lengths), device=lengths.device)

    def move(self, sources: Sequence[int], targets: Sequence[int], num_rows: int) -> None:
        """Copy rows `sources` into slots `targets`, and go on with the first `num_rows` slots."""
        if sources:
            longest = int(self.lengths[list(sources)].max())
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    tensor[list(targets), :, :longest] = tensor[list(sources), :, :longest]
            self.lengths[list(targets)] = self.lengths[list(sources)]
        self._use(self.lengths[:num_rows].clone())

    def begin_step(self) -> None:
        """Make room for one token a row."""
        self.last = self.lengths.clone()  # [R], where this step writes: once, not in every layer
        self.lengths += 1
        self.columns = int(self.lengths.max())

    def mask(self, window: int | None = None) -> Tensor:
        """What each row may see in this step, bool [R, 1, 1, L]; `window`: the latest so many columns only."""
        column = torch.arange(self.columns, device=self.lengths.device)
        seen = column < self.lengths[:, None]
        if window is not None:
            seen &= column >= self.lengths[:, None] - window
        return seen[:, None, None, :]

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with this step's [R, H, 1, K]; returns [R, H, L, K] views."""
        self.keys[layer][self.rows, :, self.last] = keys[:, :, 0]
        self.values[layer][self.rows, :, self.last] = values[:, :, 0]
        num_rows = len(self.rows)
        return self.keys[layer][:num_rows, :, : self.columns], self.values[layer][:num_rows, :, : self.columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held by the longest row."""
        return int(self.lengths.max()) if len(self.lengths) else 0
