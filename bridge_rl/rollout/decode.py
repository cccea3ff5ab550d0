"""Decode steps of the rows that run: forward, draw, and again, without asking the host in between.

Shapes: R rows running, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from bridge_rl.group import sibling_bias
from bridge_rl.rollout.cache import PagedCache, lockstep_attention
from bridge_rl.rollout.ending import Ending
from bridge_rl.rollout.layout import Layout
from bridge_rl.rollout.request import Row
from bridge_rl.rollout.sampling import SamplingParams, draw_tokens
from bridge_rl.surgery import find_state, has_bridge

LOCKSTEP = "bridge_lockstep"
AttentionInterface.register(LOCKSTEP, lockstep_attention)


@dataclass
class Inputs:
    """What a step reads and, but for the last two, leaves for the next one. All [R].

    tokens: to feed; drawn: how many tokens the row has, these included; limits: how many it may have; drawing: rows
    that have not ended; visible: rows whose token siblings see; uniforms: the draws; pages: where keys and values go.
    """

    tokens: Tensor
    drawn: Tensor
    limits: Tensor
    drawing: Tensor
    visible: Tensor
    uniforms: Tensor
    pages: Tensor


class Decoder:
    """Runs steps of one model."""

    def __init__(self, model: PreTrainedModel, params: SamplingParams, ending: Ending) -> None:
        self.model, self.params, self.ending = model, params, ending
        self.has_bridge = has_bridge(model)
        state = find_state(model) if self.has_bridge else None
        self.siblings_listen = state is not None and state.enabled and state.config.kind == "bridge"

    def forget(self) -> None:
        """Drop what depends on the cache, which is about to be replaced."""

    def run(self, rows: Sequence[Row], layout: Layout, cache: PagedCache, pages: Tensor) -> None:
        """Feed every row its last token and draw the next, as often as `pages` [steps, R] has rows' pages to write to.

        A row that has drawn its end runs one step more, in which its siblings see that token; what it runs after that
        is seen by nobody. The rows get what they drew.
        """
        device = self.model.device
        drawing = torch.tensor([not row.finish_reason for row in rows], device=device)
        uniforms = torch.tensor(np.stack([next_uniforms(row, len(pages)) for row in rows], axis=1), device=device)
        inputs = Inputs(
            tokens=torch.tensor([row.tokens[-1] for row in rows], device=device),
            drawn=torch.tensor([len(row.tokens) for row in rows], device=device),
            limits=torch.tensor([row.limit for row in rows], device=device),
            drawing=drawing,
            visible=torch.ones_like(drawing),
            uniforms=uniforms[0],
            pages=pages[0],
        )
        with attention(self.model, LOCKSTEP):
            made = self.steps(rows, inputs, uniforms, pages, layout, cache)
        for columns in zip(*(torch.stack(part).tolist() for part in zip(*made, strict=True)), strict=True):
            for row, token, logprob, stop, draws in zip(rows, *columns, strict=True):
                if draws:
                    row.append(token, logprob, stop)

    def steps(
        self, rows: Sequence[Row], inputs: Inputs, uniforms: Tensor, pages: Tensor, layout: Layout, cache: PagedCache
    ) -> list[tuple[Tensor, ...]]:
        """Of each step, [R] each: tokens, log-probs, whether they end their rows, and which rows drew."""
        made = []
        for inputs.uniforms, inputs.pages in zip(uniforms, pages, strict=True):
            made.append(self.step(rows, inputs, layout, cache))
        return made

    def step(self, rows: Sequence[Row], inputs: Inputs, layout: Layout, cache: PagedCache) -> tuple[Tensor, ...]:
        """One step, which leaves `inputs` as the next one reads them."""
        cache.begin_step(layout, inputs.drawn - 1, inputs.pages)
        # A row that runs on behind its limit must not have positions by which all rows' frequencies are chosen.
        columns = torch.minimum(cache.columns, inputs.limits - 1)
        logits = self.forward(layout, cache, inputs.tokens, columns, inputs.visible)
        tokens, logprobs = draw_tokens(logits, inputs.uniforms, self.params)
        stopped, drew = self.ending.stopped(tokens, rows), inputs.drawing
        inputs.tokens, inputs.drawn, inputs.visible = tokens, inputs.drawn + 1, drew
        inputs.drawing = drew & ~stopped & (inputs.drawn < inputs.limits)
        return tokens, logprobs, stopped, drew

    def forward(self, layout: Layout, cache: PagedCache, tokens: Tensor, columns: Tensor, visible: Tensor) -> Tensor:
        """One step: each row's last token, int64 [R], which stands `columns` [R] behind its prompt -> logits [R, V].

        `visible` [R]: rows whose token siblings see.
        """
        positions = layout.prompt_lengths[layout.group_of_row] + columns
        output = self.model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            past_key_values=cache,
            rollout_cache=cache,
            use_cache=True,
            **siblings(self.has_bridge, sibling_bias(layout.circle_of_row, visible)),
        )
        return output.logits[:, -1]


def siblings(has_bridge: bool, alive: Tensor) -> dict[str, Tensor]:
    """Who thinks together, as a keyword; models without blocks do not take it."""
    return {"bridge_alive": alive} if has_bridge else {}


def next_uniforms(row: Row, steps: int) -> np.ndarray:
    """The next draws of a row; beyond its last one, any number."""
    draws = row.uniforms[len(row.tokens) : len(row.tokens) + steps]
    return np.pad(draws, (0, steps - len(draws)))


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, no gradient checkpointing (it would switch the cache off), and attention that takes a mask.

    Nor the load balance of experts, which is of no use here and does not serve prompts in chunks.
    """
    config, implementation = model.config.get_text_config(), model.config._attn_implementation
    training = [module for module in model.modules() if module.training]  # not all of them need be
    model.eval()
    try:
        with (
            attention(model, implementation if implementation in ("eager", "sdpa") else "sdpa"),
            changed(config, "output_router_logits", False)
            if hasattr(config, "output_router_logits")
            else nullcontext(),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def attention(model: PreTrainedModel, implementation: str) -> AbstractContextManager[None]:
    """Inside, the model's layers call this attention function."""
    return changed(model.config.get_text_config(), "_attn_implementation", implementation)


@contextmanager
def changed(config: PretrainedConfig, name: str, value: object) -> Iterator[None]:
    """Inside, `config` has another value."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)
