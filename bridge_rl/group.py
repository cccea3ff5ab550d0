"""The group contract: which rows think together, and where each of them is alive.

Shapes: G groups, N width, B = G*N rows, T tokens (columns).

Rows of a group are contiguous and in order: row b belongs to group b // N. Nothing outside this file computes that.
A layout of groups is one bool tensor `alive` of shape [G, N, T]: row n of group g holds a token at column t that its
siblings may see. Padding is not alive. A row's EOS column is alive, the columns after it are not: siblings see the EOS
once, in generation as in training. While groups are sampled their rows leave one by one: one step's layout is then the
matrix of `sibling_bias`, [R, R] over the R rows that are left.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def split_rows(x: Tensor, width: int) -> Tensor:
    """[B, ...] -> [G, N, ...] as a view. Raises ValueError unless whole groups are given."""
    if x.shape[0] % width != 0:
        raise ValueError(f"{x.shape[0]} rows are not whole groups of width {width}: pass a multiple of the width.")
    return x.unflatten(0, (-1, width))


def merge_rows(x: Tensor) -> Tensor:
    """[G, N, ...] -> [B, ...], the inverse of `split_rows`."""
    return x.flatten(0, 1)


def alive_from_mask(attention_mask: Tensor, width: int) -> Tensor:
    """The layout [G, N, T] of a full-sequence forward whose 2-D `attention_mask` [B, T] is 0 on padding."""
    return split_rows(attention_mask.bool(), width)


def sibling_bias(circle_of_row: Tensor, alive: Tensor) -> Tensor:
    """The layout of one step over ragged groups, to add to attention scores: fp32 [R, R].

    0 where row r (first dimension) sees row s: itself, and the rows of its circle that are `alive` (bool [R]); else
    -inf. `circle_of_row`: int64 [R], equal for rows that hear each other, which are those of a group unless siblings
    are exchanged (`exchanged_circles`).
    """
    same = circle_of_row[:, None] == circle_of_row[None, :]
    itself = torch.eye(len(alive), dtype=torch.bool, device=alive.device)
    bias = torch.zeros(same.shape, dtype=torch.float32, device=alive.device)
    return bias.masked_fill_(~((same & alive) | itself), float("-inf"))


def exchanged_circles(places: Sequence[int]) -> list[list[int]]:
    """Circles of N groups of N rows that exchange their siblings: one list of N circles a group.

    Each circle has one row of every group, so that all that a row hears is of other groups. It bears the number of one
    of the groups' `places`, and a row hears as many rows as at home.
    """
    width = len(places)
    return [[places[(row - group) % width] for row in range(width)] for group in range(width)]


def repeat_for_rows(per_group: Sequence[Item], width: int) -> list[Item]:
    """One item a group -> one item a row."""
    return [item for item in per_group for _ in range(width)]


def groups_of(rows: Sequence[Item], width: int) -> list[list[Item]]:
    """One item a row -> one list of N items a group. Raises ValueError unless whole groups are given."""
    if len(rows) % width != 0:
        raise ValueError(f"{len(rows)} rows are not whole groups of width {width}: pass a multiple of the width.")
    return [list(rows[start : start + width]) for start in range(0, len(rows), width)]


def prompts_of_groups(rows: Sequence[Item], width: int) -> list[Item]:
    """The prompt of each group, from one prompt a row. Raises ValueError if a group would mix prompts."""
    groups = groups_of(rows, width)
    for index, group in enumerate(groups):
        if any(prompt != group[0] for prompt in group):
            raise ValueError(f"Rows of group {index} do not share one prompt: the sampler has split a group.")
    return [group[0] for group in groups]


def rows_of_groups(groups: Tensor, width: int) -> Tensor:
    """int64 [B']: the rows of some groups, given by their indices, in their order."""
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()


def pad_left(rows: Sequence[Sequence[int]], value: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids, mask), both [B, T] int64, padded on the left."""
    length = max(len(row) for row in rows)
    ids = [[value] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return _int64(ids, device), _int64(mask, device)


def pad_right(rows: Sequence[Sequence[int]], value: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids, mask), both [B, T] int64, padded on the right."""
    length = max(len(row) for row in rows)
    ids = [list(row) + [value] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return _int64(ids, device), _int64(mask, device)


def _int64(rows: list[list[int]], device: torch.device | str) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=device)  # rows that are all empty would be floats
