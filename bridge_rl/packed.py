"""Whole groups as one sequence without padding, in which a prompt that several rows share is there once.

Shapes: G groups, N width, B = G*N rows, C columns of the completions, P tokens of all different prompts, L tokens of
the completions, T = P + L, S columns of all groups.

On the tokens of a prompt all rows of a group are equal, and so is what the blocks add to them: attention over equal
rows gives the value of one. A prompt's keys, values and hidden states are therefore computed once, whoever continues
it, and the gradients of all its readers meet there. This is exact, forward and backward, unless there is dropout.

The sequence [1, T] holds the prompts, then the completions row after row. Positions go on from the row's own prompt.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bridge_rl.group import split_rows


@dataclass(frozen=True)
class PackedGroups:
    """Whole groups as one sequence, see the module.

    ids, positions: int64 [1, T]. labels: the completions' tokens, int64 [1, L]. scored: int64 [L], the token from whose
    hidden state each of them is predicted. counts: fp32 [1, 1, 1, T], rows that a token stands for.
    prompts, rows: (start, end) of each prompt and of each completion that is not empty; prompt_of_row: which prompt it
    continues.
    masks: those of attention, as they were needed.
    Columns of a group are the time steps of its completions: tokens [N, S] int64 is which token of the sequence row n
    holds there, alive bool [1, N, S] whether it holds one, places int64 [L] where each token is in `tokens`, flattened.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    scored: Tensor
    counts: Tensor
    prompts: list[tuple[int, int]]
    rows: list[tuple[int, int]]
    prompt_of_row: list[int]
    tokens: Tensor
    alive: Tensor
    places: Tensor
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompts[-1][1]


def pack_groups(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor, width: int
) -> PackedGroups:
    """From prompts padded on the left and completions padded on the right, all [B, columns].

    Equal prompts are one, in whatever groups. A row whose completion is empty is nowhere. Raises ValueError if the rows
    of a group do not share one prompt, and unless whole groups are given.
    """
    if (split_rows(prompt_ids, width) != split_rows(prompt_ids, width)[:, :1]).any():
        raise ValueError("The rows of a group do not share one prompt: groups were split.")
    device, mask = completion_ids.device, completion_mask.bool()
    own = [ids[kept] for ids, kept in zip(prompt_ids.cpu(), prompt_mask.bool().cpu(), strict=True)]
    numbers: dict[tuple[int, ...], int] = {}
    prompt_of_row = [numbers.setdefault(tuple(ids.tolist()), len(numbers)) for ids in own]
    prompts = _spans([len(prompt) for prompt in numbers])
    lengths = mask.sum(1).tolist()
    prompt_of_row = [number for number, length in zip(prompt_of_row, lengths, strict=True) if length]
    lengths = [length for length in lengths if length]
    rows = _spans(lengths, start=prompts[-1][1])
    starts = [prompts[n][1] - prompts[n][0] for n in prompt_of_row]  # position of each row's first token
    positions = [torch.arange(end - start) for start, end in prompts]
    positions += [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    # A row's first token is predicted from the end of its prompt, every other from the token before it.
    scored = torch.cat([torch.arange(start - 1, end - 1) for start, end in rows])
    scored[[start - prompts[-1][1] for start, _ in rows]] = torch.tensor([prompts[n][1] - 1 for n in prompt_of_row])
    labels = completion_ids[mask]
    readers = torch.bincount(torch.tensor(prompt_of_row), minlength=len(prompts))
    counts = readers.repeat_interleave(torch.tensor([end - start for start, end in prompts]))
    return PackedGroups(
        ids=torch.cat([torch.tensor([t for prompt in numbers for t in prompt], device=device), labels])[None],
        positions=torch.cat(positions).to(device)[None],
        labels=labels[None],
        scored=scored.to(device),
        counts=torch.cat([counts.float(), torch.ones(len(scored))]).to(device)[None, None, None],
        prompts=prompts,
        rows=rows,
        prompt_of_row=prompt_of_row,
        **_columns(mask, width, prompts[-1][1]),
    )


def _spans(lengths: list[int], start: int = 0) -> list[tuple[int, int]]:
    """(start, end) of stretches that follow one another."""
    ends = (torch.tensor(lengths).cumsum(0) + start).tolist()
    return list(zip([start, *ends[:-1]], ends, strict=True))


def _columns(mask: Tensor, width: int, num_prompt_tokens: int) -> dict[str, Tensor]:
    """`mask` bool [B, C] -> tokens, alive and places of `PackedGroups`, over the columns that a group uses."""
    numbers = (mask.flatten().cumsum(0) - 1).view_as(mask)  # [B, C], of the tokens, by row
    used = split_rows(mask, width).any(1)  # [G, C]
    alive = split_rows(mask, width).transpose(0, 1)[:, used]  # [N, S]
    numbers = split_rows(numbers, width).transpose(0, 1)[:, used]
    slots = torch.arange(alive.numel(), device=mask.device).view_as(alive)
    places = torch.empty(int(mask.sum()), dtype=torch.long, device=mask.device)
    places[numbers[alive]] = slots[alive]
    return {"tokens": (numbers + num_prompt_tokens) * alive, "alive": alive[None], "places": places}
