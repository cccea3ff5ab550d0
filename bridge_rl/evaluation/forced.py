"""Groups of which all rows are given but one: what does that row make of these siblings?

Shapes: G groups, N width, B = G*N rows, P prompt columns, T completion columns, V vocabulary.

Rows of a group may have prompts of their own here: prompts are padded on the left, so that completions line up, and at
the prompts' columns every row is alone. Where all rows share one prompt that is no change: attention over equal rows
gives their value. At the completions' columns a row is alive up to its last token, as everywhere (`group`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.group import merge_rows, pad_left, pad_right, split_rows
from bridge_rl.rollout.decode import sampling_mode
from bridge_rl.rollout.ending import Ending
from bridge_rl.rollout.request import Row
from bridge_rl.rollout.sampling import SamplingParams, draw_tokens, group_uniforms, scaled_logprobs
from bridge_rl.surgery import find_state

Item = TypeVar("Item")
MAX_TOKENS = 16384  # of one forward pass, padding included


@dataclass(frozen=True)
class ForcedGroup:
    """A row that is free to speak, and siblings whose words are given.

    prompts, completions: ids of each of the N rows, EOS included. free: the place of the free row, whose completion is
    what it is scored on; sampling does not read it. index: of the group among the uniform draws (`group_uniforms`), of
    which the free row uses those of its place.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    free: int
    index: int

    @property
    def width(self) -> int:
        return len(self.prompts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, longest prompt, longest completion."""
        return self.width, max(map(len, self.prompts)), max(map(len, self.completions))


@dataclass(frozen=True)
class Batch:
    """Whole groups of one width as a full-sequence forward takes them."""

    inputs: dict[str, Any]
    completion: Tensor  # int64 [B, T], padded on the right
    alive: Tensor  # bool [G, N, T]

    @property
    def prompt_columns(self) -> int:
        return self.inputs["input_ids"].shape[1] - self.completion.shape[1]


def make_batch(
    prompts: Sequence[Sequence[Sequence[int]]], completions: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> Batch:
    """From one list of N prompts and one of N completions a group."""
    width = len(completions[0])
    prompt, prompt_mask = pad_left([row for group in prompts for row in group], 0, device)
    completion, completion_mask = pad_right([row for group in completions for row in group], 0, device)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    alive = split_rows(completion_mask.bool(), width)
    inputs = {
        "input_ids": torch.cat([prompt, completion], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "bridge_alive": F.pad(alive, (prompt.shape[1], 0)),
        "use_cache": False,
    }
    return Batch(inputs, completion, alive)


def in_batches(
    items: Sequence[Item], shape: Callable[[Item], tuple[int, int, int]], max_tokens: int
) -> Iterator[list[Item]]:
    """The items in order, in lists of at most `max_tokens` a forward pass, padding included; one item is the least.

    `shape`: rows of an item, its longest prompt, its longest completion.
    """
    batch: list[Item] = []
    rows, prompt, completion = 0, 0, 0
    for item in items:
        more_rows, *longest = shape(item)
        rows, prompt, completion = rows + more_rows, max(prompt, longest[0]), max(completion, longest[1])
        if batch and rows * (prompt + completion) > max_tokens:
            yield batch
            batch, rows, (prompt, completion) = [], more_rows, longest
        batch.append(item)
    if batch:
        yield batch


@contextmanager
def observing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode and its blocks are on. Raises UserError if it has none."""
    state = find_state(model)
    before, state.enabled = state.enabled, True
    try:
        with sampling_mode(model):
            yield
    finally:
        state.enabled = before


@contextmanager
def logits_of_rows(model: PreTrainedModel, rows: Tensor) -> Iterator[None]:
    """Inside, the output layer sees these rows only: logits of all rows of all groups would be most of the memory."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def places_of_free_rows(groups: Sequence[ForcedGroup], device: torch.device) -> Tensor:
    """int64 [G], among the B rows."""
    free = torch.tensor([[place == group.free for place in range(group.width)] for group in groups], device=device)
    return merge_rows(free).nonzero()[:, 0]


@torch.no_grad()
def score_free_rows(
    model: PreTrainedModel, groups: Sequence[ForcedGroup], temperature: float = 1.0, max_tokens: int = MAX_TOKENS
) -> list[list[float]]:
    """Log-prob of every token of each free row's completion, given its prompt and its siblings."""
    scores: list[list[float]] = []
    with observing(model):
        for part in in_batches(groups, lambda group: group.shape, max_tokens):
            batch = make_batch([g.prompts for g in part], [g.completions for g in part], model.device)
            rows = places_of_free_rows(part, model.device)
            with logits_of_rows(model, rows):
                logits = model(**batch.inputs, logits_to_keep=batch.completion.shape[1] + 1).logits
            # The logits at a column predict the token of the next one.
            logprobs = scaled_logprobs(logits[:, :-1], temperature)
            chosen = logprobs.gather(-1, batch.completion[rows][:, :, None])[:, :, 0].tolist()
            scores += [row[: len(g.completions[g.free])] for row, g in zip(chosen, part, strict=True)]
    return scores


@torch.no_grad()
def sample_free_rows(
    model: PreTrainedModel,
    groups: Sequence[ForcedGroup],
    params: SamplingParams,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Row]:
    """Sample each group's free row anew, with its own draws, in lockstep with siblings that say what is given.

    One batch of groups of one width, which may mix problems and prompts. A sibling is seen up to its last token; it
    is then gone, whether that was its EOS or the limit. `tokenizer`: for `params.stop_strings`.
    """
    device, width = model.device, groups[0].width
    free = places_of_free_rows(groups, device)
    rows = [Row(number=n, group=n, circle=n, limit=params.max_new_tokens) for n in range(len(groups))]
    draws = [group_uniforms(params.seed, [g.index], width, params.max_new_tokens)[:, g.free] for g in groups]
    uniforms = torch.stack(draws, dim=1).to(device)  # [T, G]
    given, said = given_tokens(groups, params.max_new_tokens, device)
    ending = Ending(model, params, tokenizer)
    drawing = torch.ones(len(groups), dtype=torch.bool, device=device)
    with observing(model):
        lockstep = Lockstep(model, [prompt for group in groups for prompt in group.prompts], width)
        for step in range(params.max_new_tokens):
            tokens, logprobs = draw_tokens(lockstep.logits[free], uniforms[step], params)
            stopped = ending.stopped(tokens, rows)
            given[free, step], said[free, step] = tokens, drawing
            for row, *drawn in zip(rows, tokens.tolist(), logprobs.tolist(), stopped.tolist(), strict=True):
                if not row.finish_reason:
                    row.append(*drawn)
            drawing = drawing & ~stopped
            if step + 1 == params.max_new_tokens or not drawing.any():
                break
            lockstep.feed(given[:, step], said[:, step])
    return rows


def given_tokens(groups: Sequence[ForcedGroup], steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the siblings say, int64 [B, steps], and where they say something, bool [B, steps]; free rows are empty."""
    rows = [
        [] if place == group.free else completion[:steps]
        for group in groups
        for place, completion in enumerate(group.completions)
    ]
    tokens, mask = pad_right(rows, 0, device)
    missing = steps - tokens.shape[1]
    return F.pad(tokens.long(), (0, missing)), F.pad(mask.bool(), (0, missing))


class Lockstep:
    """Rows of whole groups, fed a token each at a time, with stock caches; `logits` [B, V] predict the next one."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], width: int) -> None:
        """Prefills `prompts`, one a row, each distinct one once."""
        self.model, self.width = model, width
        distinct = {tuple(prompt): place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        source = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=model.device)
        ids, mask = pad_left(list(distinct), 0, model.device)
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            bridge_alive=mask[:, None, :].bool(),
        )
        self.cache = output.past_key_values
        self.cache.batch_select_indices(source)
        self.mask, self.logits = mask[source], output.logits[source, -1]
        self.position = self.mask.sum(-1, keepdim=True)  # [B, 1], of the token to be fed next

    def feed(self, tokens: Tensor, said: Tensor) -> None:
        """One token a row, int64 [B]; siblings see those of rows that `said` one, bool [B]."""
        self.mask = torch.cat([self.mask, said[:, None].to(self.mask.dtype)], dim=1)
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            bridge_alive=split_rows(said[:, None], self.width),
        )
        self.logits, self.position = output.logits[:, -1], self.position + 1
