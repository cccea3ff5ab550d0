"""Keys and values in pages: allocated once, and used from the first on without gaps.

The last pages move into the holes that leaving rows make: a layer's keys and values are thus one slice, read without
gathering, however ragged the rows are.

Shapes: M pages in use, C columns of a page, B prompts or rows, T tokens, H key-value heads, K head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class Pages:
    """Pages of keys and values, of owners that are told apart by a number."""

    def __init__(self, num_pages: int, columns: int, like: Sequence[Tensor], spare: int = 0) -> None:
        """Room for `num_pages`. `like`: values [B, H, T, K] of each layer, which give dtype, device and shape.

        `spare`: pages at the end that have no owner, for rows that only fill up a step (`graphs`).
        """
        self.columns, self.num_pages, self.spare = columns, num_pages, spare
        _, self.num_heads, _, head_dim = like[0].shape
        shape = (len(like), 2, num_pages + spare, self.num_heads, columns, head_dim)
        self.data = _zeros(shape, like[0])  # of each layer keys, then values
        self.used = 0
        self.owner = np.zeros(num_pages, dtype=np.int64)
        self.place = np.zeros(num_pages, dtype=np.int64)  # of the page among its owner's
        self.of: dict[int, list[int]] = {}  # an owner's pages, in order

    def grow(self, owner: int, columns: int) -> None:
        """Let `owner` have pages for `columns`."""
        pages = self.of.setdefault(owner, [])
        while len(pages) * self.columns < columns:
            self.owner[self.used], self.place[self.used] = owner, len(pages)
            pages.append(self.used)
            self.used += 1

    @property
    def free(self) -> int:
        return self.num_pages - self.used

    def missing(self, owner: int, columns: int) -> int:
        """How many pages `owner` lacks for `columns`."""
        return max(0, pages_for(columns, self.columns) - len(self.of.get(owner, ())))

    def heads(self, layer: int, num_pages: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first pages in a layer, [M*H, C, K] each."""
        keys, values = self.data[layer, :, :num_pages].flatten(1, 2)
        return keys, values

    def cells_at(self, pages: Tensor, columns: Tensor) -> Tensor:
        """Where [2, R, H] keys and values go, as places in [2, M, H, C].

        Those of row r go into `pages[r]`, for its column `columns[r]`.
        """
        heads = torch.arange(self.num_heads, device=pages.device)
        keys = (pages[:, None] * self.num_heads + heads) * self.columns + columns[:, None] % self.columns
        return torch.stack([keys, keys + self.data[0, 0, ..., 0].numel()]).flatten()

    def write(self, owner: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fill the pages of a new owner with keys and values [H, T, K] of each layer."""
        columns = layers[0][0].shape[1]
        self.grow(owner, columns)
        whole = columns // self.columns * self.columns
        pages = self.of[owner]
        filled = torch.tensor(pages[: whole // self.columns], dtype=torch.long, device=self.data.device)
        for layer, tensors in enumerate(layers):
            for part, tensor in enumerate(tensors):
                target = self.data[layer, part]
                states = tensor.to(target.dtype)
                target[filled] = states[:, :whole].unflatten(1, (-1, self.columns)).transpose(0, 1)
                if whole < columns:
                    target[pages[-1], :, : columns - whole] = states[:, whole:]

    def release(self, owners: Sequence[int]) -> None:
        """Take the pages of `owners` back, and move the last pages in use into the holes."""
        freed = {page for owner in owners for page in self.of.pop(owner, ())}
        kept = self.used - len(freed)
        holes = [page for page in freed if page < kept]
        movers = [page for page in range(kept, self.used) if page not in freed]
        if movers:
            self.data[:, :, holes] = self.data[:, :, movers]
        for hole, mover in zip(holes, movers, strict=True):
            self.owner[hole], self.place[hole] = self.owner[mover], self.place[mover]
            self.of[self.owner[hole]][self.place[hole]] = hole
        self.used = kept


def pages_for(columns: int, page: int) -> int:
    """How many pages of `page` columns hold `columns`."""
    return -(-columns // page)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, since what a page holds beyond its owner's columns is read (and masked): it must not be NaN.

    On CPU they are numpy's: the system gives their memory when it is first written, so that the cache takes what its
    pages in use take.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = like.element_size() * int(np.prod(shape))
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(shape)


@dataclass(frozen=True)
class PageTable:
    """The pages in use for one step, and whose they are.

    owner: int64 [M], slot of each page's owner; column: int64 [M, C], of each of a page's columns among its owner's.
    """

    owner: Tensor
    column: Tensor

    @classmethod
    def of(cls, pages: Pages, owners: Sequence[int], device: torch.device) -> "PageTable":
        """`owners`: of all pages in use, in the order of their slots."""
        slot_of_owner = np.zeros(max(owners) + 1, dtype=np.int64)
        slot_of_owner[list(owners)] = np.arange(len(owners))
        slots = slot_of_owner[pages.owner[: pages.used]]
        columns = pages.place[: pages.used, None] * pages.columns + np.arange(pages.columns)
        return cls(torch.from_numpy(slots).to(device), torch.from_numpy(columns).to(device))
