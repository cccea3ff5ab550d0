"""Sample groups in lockstep: all rows of a group are at the same token step, so that they can attend to each other.

Groups are admitted whole as soon as enough rows are free; a finished row leaves at once and costs nothing more. What a
group says does not depend on when it was admitted or on who runs beside it (`tests/parity/test_rollout.py`).

Shapes: R rows running, N width, P prompt columns.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bridge_rl.errors import UserError
from bridge_rl.group import pad_left, same_group
from bridge_rl.rollout.cache import SlotCache
from bridge_rl.rollout.sampling import SamplingParams, draw_tokens, group_uniforms
from bridge_rl.surgery import SERVED_FAMILIES, has_bridge

# Prompts prefilled in one call: more would pad short prompts to long ones, fewer would read the weights more often.
PREFILL_PROMPTS = 32
# Which attention mask a family's decode step takes: one for each type of layer, or one with its sliding window.
MASK_A_LAYER_TYPE = ("gemma3_text", "qwen2", "qwen3", "smollm3")
ONE_SLIDING_MASK = ("mistral", "phi3", "qwen3_moe")


@dataclass(frozen=True)
class Group:
    """The completions of one prompt that were sampled together, each a list over the N rows.

    tokens: ids, with the EOS where one was drawn. logprobs: of each token at the sampling temperature.
    finish_reasons: `stop` at an EOS, `length` at the limit.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]


@dataclass
class Row:
    """One completion while it is sampled."""

    group: int  # place of its prompt
    limit: int  # of its tokens
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    uniforms: Any = None  # its draws, one a step

    def append(self, token: int, logprob: float, eos: set[int]) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in eos:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"


@torch.no_grad()
def generate_groups(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    width: int,
    params: SamplingParams,
    indices: Sequence[int] | None = None,
    max_rows: int | None = None,
    limits: Sequence[Sequence[int]] | None = None,
) -> list[Group]:
    """One group of `width` interdependent completions for each prompt, in the order of the prompts.

    A group's tokens depend on its prompt, `params.seed`, its index and the width, not on what else is in the batch.
    `indices`: the index of each group, by default its place in `prompt_ids`. `max_rows`: how many rows run at once
    (at least one group), by default all. `limits`: of each group's rows, where they are below `max_new_tokens`.
    Without Bridge blocks the rows are independent samples.
    """
    family = model.config.model_type
    if family not in SERVED_FAMILIES:
        raise UserError(
            f"Sampling does not serve the model family '{family}': use one of {', '.join(SERVED_FAMILIES)}."
        )
    if getattr(model.config, "bridge", None) and not has_bridge(model):
        raise UserError("The model's config names a Bridge that is not there: load it with bridge_rl.load_bridge.")
    if width < 1:
        raise UserError(f"width is {width}: it must be at least 1.")
    for place, prompt in enumerate(prompt_ids):
        if not len(prompt):
            raise UserError(f"Prompt {place} has no tokens: give every group at least one.")
    if not prompt_ids:
        return []
    indices = range(len(prompt_ids)) if indices is None else indices
    limits = [[params.max_new_tokens] * width] * len(prompt_ids) if limits is None else limits
    rows = [[Row(place, limit) for limit in group] for place, group in enumerate(limits)]
    with sampling_mode(model):
        Rollout(model, prompt_ids, rows, params, indices, max_rows or len(prompt_ids) * width).run()
    return [
        Group([row.tokens for row in group], [row.logprobs for row in group], [row.finish_reason for row in group])
        for group in rows
    ]


class Rollout:
    """Rows in slots: admit what fits, step what runs, let go what has finished, until nothing waits or runs."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Row]],
        params: SamplingParams,
        indices: Sequence[int],
        max_rows: int,
    ) -> None:
        self.model, self.prompt_ids, self.groups, self.params = model, prompt_ids, groups, params
        self.width = len(groups[0])
        self.has_bridge = has_bridge(model)
        self.indices = indices
        self.eos = set(eos_token_ids(model, params))
        self.waiting = deque(range(len(groups)))
        self.running: list[Row] = []  # row of each slot
        self.num_slots = max(self.width, min(max_rows, len(groups) * self.width))
        longest = max(map(len, prompt_ids)) + params.max_new_tokens
        self.cache = SlotCache(self.num_slots, longest)

    def run(self) -> None:
        while self.waiting or self.running:
            self.admit()
            self.step()

    def admit(self) -> None:
        """Prefill waiting prompts, once a group, while whole groups fit."""
        while self.waiting and self.num_slots - len(self.running) >= self.width:
            fitting = (self.num_slots - len(self.running)) // self.width
            places = [self.waiting.popleft() for _ in range(min(fitting, len(self.waiting), PREFILL_PROMPTS))]
            ids, mask = pad_left([self.prompt_ids[place] for place in places], 0, self.model.device)
            # On prompt tokens all rows of a group are equal, and attention over equal rows gives one row's value.
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=DynamicCache(),
                use_cache=True,
                logits_to_keep=1,
                **self.layout(mask[:, None, :].bool()),
            )
            self.cache.admit(output.past_key_values, (ids.shape[1] - mask.sum(-1)).tolist(), self.width)
            for place in places:
                uniforms = group_uniforms(
                    self.params.seed, [self.indices[place]], self.width, self.params.max_new_tokens
                )
                for row, draws in zip(self.groups[place], uniforms.T.numpy(), strict=True):
                    row.uniforms = draws
                    self.running.append(row)
            new = self.running[-len(places) * self.width :]
            self.draw(new, output.logits[:, -1].repeat_interleave(self.width, dim=0))

    def step(self) -> None:
        """Feed every running row its last token; draw the next one for those that have not ended."""
        if not self.running:
            return
        self.cache.begin_step()
        tokens = torch.tensor([[row.tokens[-1]] for row in self.running], device=self.model.device)
        output = self.model(
            input_ids=tokens,
            attention_mask=self.attention_mask(),
            position_ids=self.cache.last[:, None],
            past_key_values=self.cache,
            use_cache=True,
            **self.layout(same_group([row.group for row in self.running], self.model.device)),
        )
        self.draw(self.running, output.logits[:, -1])

    def draw(self, rows: list[Row], logits: Tensor) -> None:
        """One token for each of `rows` (the last ones running) that has not ended, from its `logits`; let go the rest.

        A row that has drawn its EOS runs one step more, in which its siblings see the EOS. When no row of a group is
        left to see it, the group goes at once.
        """
        going = [n for n, row in enumerate(rows) if not row.finish_reason]
        if going:
            uniforms = torch.tensor([rows[n].uniforms[len(rows[n].tokens)] for n in going], device=logits.device)
            tokens, logprobs = draw_tokens(logits[going], uniforms, self.params)
            for n, token, logprob in zip(going, tokens.tolist(), logprobs.tolist(), strict=True):
                rows[n].append(token, logprob, self.eos)
        drew = set(going)
        open_groups = {row.group for row in rows if not row.finish_reason}
        gone = {id(row) for n, row in enumerate(rows) if n not in drew or row.group not in open_groups}
        if gone:
            self.let_go(gone)

    def let_go(self, gone: set[int]) -> None:
        """Free the slots of rows, and move the last rows into them, so that rows 0 to R-1 are those running."""
        kept = len(self.running) - len(gone)
        holes = [slot for slot in range(kept) if id(self.running[slot]) in gone]
        movers = [slot for slot in range(kept, len(self.running)) if id(self.running[slot]) not in gone]
        for hole, mover in zip(holes, movers, strict=True):
            self.running[hole] = self.running[mover]
        del self.running[kept:]
        self.cache.move(movers, holes, kept)

    def layout(self, alive: Tensor) -> dict[str, Tensor]:
        """Who thinks together, as a keyword; models without blocks do not take it."""
        return {"bridge_alive": alive} if self.has_bridge else {}

    def attention_mask(self) -> Tensor | dict[str, Tensor]:
        """What each row sees of its own past in this step, in the form that the family takes."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if config.model_type in MASK_A_LAYER_TYPE:
            masks = {"full_attention": self.cache.mask()}
            if "sliding_attention" in config.layer_types:
                masks["sliding_attention"] = self.cache.mask(window)
            return {name: self.in_form(mask) for name, mask in masks.items()}
        return self.in_form(self.cache.mask(window if config.model_type in ONE_SLIDING_MASK else None))

    def in_form(self, mask: Tensor) -> Tensor:
        """Eager attention adds its mask to the scores; SDPA takes a bool one."""
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def eos_token_ids(model: PreTrainedModel, params: SamplingParams) -> list[int]:
    """Those of `params`, else of the model's generation config; empty: every row runs to its limit."""
    eos = params.eos_token_id
    if eos is None:
        eos = model.generation_config.eos_token_id
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, no gradient checkpointing (it would switch the cache off), and attention that takes a mask."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if attention not in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
        model.train(training)
