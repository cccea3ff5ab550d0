"""Which rows run in a step, whose pages they see, and in which parts their attention over these is computed.

Shapes: R rows running, G their groups, N rows of the widest group, M pages in use, C columns of a page, H key-value
heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge_rl.rollout.pages import Pages, PageTable
from bridge_rl.rollout.request import Row


@dataclass(frozen=True)
class Parts:
    """What one head of one row sees of one page is a part: of the rows' pages first, [M, H], then of the prompts'.

    All rows of a group ask its prompt's pages, so that those have [M, H, N] parts.

    asking: int64 [M*H*N], of the prompts' parts the row and head that asks, as row * H + head; owner: int64 [parts],
    the same of all parts, but R*H of those that are there twice; order: int64 [parts], parts by owner; starts: int64
    [R*H + 1], where in `order` an owner's begin.
    """

    asking: Tensor
    owner: Tensor
    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, rows: PageTable, prompts: PageTable, rows_of_group: Tensor, num_rows: int, num_heads: int) -> "Parts":
        """Plain work on the tensors' device, which need not be waited for."""
        heads = torch.arange(num_heads, device=rows.owner.device)
        members = rows_of_group[prompts.owner]  # [M, N]
        asking = members[:, None] * num_heads + heads[:, None]  # [M, H, N]
        twice = F.pad(members[:, 1:] == members[:, :1], (1, 0))[:, None]
        nobody = num_rows * num_heads
        own = rows.owner[:, None] * num_heads + heads
        owner = torch.cat([own.flatten(), asking.masked_fill(twice, nobody).flatten()])
        ordered, order = owner.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(nobody + 1, device=owner.device))
        return cls(asking.flatten(), owner, order, starts)

    def largest(self, x: Tensor) -> Tensor:
        """Of each part's `x` [parts, Q] the largest of its owner, [parts, Q]."""
        index = self.owner[:, None].expand(x.shape)
        largest = x.new_full((len(self.starts), x.shape[1]), -torch.inf).scatter_reduce_(0, index, x, "amax")
        return largest.index_select(0, self.owner)

    def sum(self, x: Tensor) -> Tensor:
        """[parts, ...] -> [R*H, ...]. Not `index_add_`, which on CUDA adds in an order that changes from run to run."""
        sums = F.embedding_bag(self.order, x.flatten(1), self.starts, mode="sum")
        return sums[:-1].view(-1, *x.shape[1:])


@dataclass
class Layout:
    """It changes when rows come, go, or need a page.

    group_of_row: int64 [R], slot of its group; circle_of_row: int64 [R], equal for rows that hear each other;
    rows_of_group: int64 [G, N], those that are left, padded with the first; prompt_lengths: int64 [G]; num_heads: H.
    """

    group_of_row: Tensor
    circle_of_row: Tensor
    rows_of_group: Tensor
    prompt_lengths: Tensor
    rows: PageTable
    prompts: PageTable
    num_heads: int
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = Parts.of(self.rows, self.prompts, self.rows_of_group, len(self.group_of_row), self.num_heads)

    @classmethod
    def of(
        cls,
        running: Sequence[Row],
        prompt_lengths: Sequence[int],
        rows: Pages,
        prompts: Pages,
        device: torch.device,
    ) -> "Layout":
        """Of the rows that run. `prompt_lengths`: by place of the prompt; `rows`, `prompts`: their pages."""
        places = list(dict.fromkeys(row.group for row in running))
        slot_of_group = {place: slot for slot, place in enumerate(places)}
        members: list[list[int]] = [[] for _ in places]  # slots of each group's rows
        for slot, row in enumerate(running):
            members[slot_of_group[row.group]].append(slot)
        widest = max(map(len, members))
        return cls(
            group_of_row=torch.tensor([slot_of_group[row.group] for row in running], device=device),
            circle_of_row=torch.tensor([row.circle for row in running], device=device),
            rows_of_group=torch.tensor([slots + slots[:1] * (widest - len(slots)) for slots in members], device=device),
            prompt_lengths=torch.tensor([prompt_lengths[place] for place in places], device=device),
            rows=PageTable.of(rows, [row.number for row in running], device),
            prompts=PageTable.of(prompts, places, device),
            num_heads=rows.num_heads,
        )
