"""What training measures about itself beside TRL's metrics: the time of its steps, memory, and what the blocks add.

Shapes: B rows, T tokens (columns), C columns of the completion, D model.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bridge_rl.block import BridgeBlock, MatchedMLP
from bridge_rl.packed import PackedGroups
from bridge_rl.report import names
from bridge_rl.rollout.request import RolloutStats

GIB = 2**30


class StepMeter(TrainerCallback):
    """Time and tokens of the optimizer steps since the last log, from sampling to the end of the update."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.steps, self.seconds, self.tokens = 0, 0.0, torch.tensor(0)

    def state(self) -> dict[str, Any]:
        """What has been counted since the last log."""
        return {"steps": self.steps, "seconds": self.seconds, "tokens": self.tokens}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps, self.seconds, self.tokens = state["steps"], state["seconds"], state["tokens"]

    def add_tokens(self, mask: Tensor) -> None:
        """Count what `mask` marks. It stays on its device: a number would make the host wait for every micro-batch."""
        self.tokens = self.tokens.to(mask.device) + mask.sum()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the optimizer's time would count as the next rollout's
        self.seconds += time.perf_counter() - self._start
        self.steps += 1

    def take(self, rollout: float, reward: float) -> dict[str, float]:
        """Metrics of the steps since the last call, which took so many seconds for rollout and reward together; none
        before the first step has ended."""
        if not self.steps:
            return {}
        update, tokens = self.seconds - rollout - reward, self.tokens.item()
        metrics = {
            names.STEP_SECONDS: self.seconds / self.steps,
            names.STEP_ROLLOUT: rollout / self.seconds,
            names.STEP_REWARD: reward / self.seconds,
            names.STEP_UPDATE: update / self.seconds,
            names.STEP_TOKENS_PER_SECOND: tokens / self.seconds,
            names.UPDATE_TOKENS_PER_SECOND: tokens / update,
            names.PEAK_MEMORY: peak_memory() / GIB,
        }
        self._reset()
        return metrics


@dataclass
class GenerationMeter:
    """What the rollouts of one generation batch took on this rank, and scoring them. Times in seconds."""

    seconds: float = 0.0
    tokens: int = 0
    cut: list[bool] = field(default_factory=list)  # of each row, whether at the limit
    row_steps: int = 0
    steps: int = 0
    cache_tokens: int = 0
    preempted: int = 0
    reward_seconds: float = 0.0

    def add(self, seconds: float, tokens: int, cut: list[bool], stats: RolloutStats) -> None:
        self.seconds += seconds
        self.tokens += tokens
        self.cut += cut
        self.row_steps += stats.row_steps
        self.steps += stats.steps
        self.cache_tokens = max(self.cache_tokens, stats.peak_cache_tokens)
        self.preempted += stats.preempted

    def metrics(self) -> dict[str, float]:
        return {
            names.ROLLOUT_SECONDS: self.seconds,
            names.ROLLOUT_TOKENS_PER_SECOND: self.tokens / self.seconds,
            names.ROLLOUT_TRUNCATED: sum(self.cut) / len(self.cut),
            names.ROLLOUT_ROWS_PER_STEP: self.row_steps / max(1, self.steps),
            names.ROLLOUT_CACHE_TOKENS: self.cache_tokens,
            names.ROLLOUT_PREEMPTED: self.preempted,
            names.REWARD_SECONDS: self.reward_seconds,
        }


def peak_memory() -> int:
    """Bytes: the most that CUDA tensors took since the start; without CUDA, what the process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


@contextmanager
def record_norm_ratios(model: nn.Module, mask: Tensor) -> Iterator[dict[int, Tensor]]:
    """Inside, a full-sequence forward leaves in the dict, by layer, the sum of |what the block adds| / |what it is
    added to| over the tokens that `mask` [B, C] marks among the last C columns; of packed groups, over all tokens of
    the completions.

    What is added is taken before the sum, where bf16 has not rounded it away. A layer that a checkpoint computes again
    in the backward pass, after this, is not counted twice.
    """
    sums: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    counted: dict[int, Tensor] = {}

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32)  # [B, T]

    def hooks_of(layer: int) -> tuple[Any, Any]:
        def before(block: nn.Module, inputs: tuple[Any, ...]) -> None:
            x, alive = inputs
            if isinstance(alive, PackedGroups):
                counted[layer] = torch.arange(x.shape[1], device=x.device)[None] >= alive.num_prompt_tokens
            else:
                counted[layer] = nn.functional.pad(mask.bool(), (x.shape[1] - mask.shape[1], 0))
            norms[layer] = norm(x)

        def after(projection: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sums[layer] = (norm(output) / norms.pop(layer)).masked_fill(~counted.pop(layer), 0.0).sum()

        return before, after

    handles = []
    for layer, block in find_blocks(model):
        before, after = hooks_of(layer)
        last = block.o_proj if isinstance(block, BridgeBlock) else block.down_proj
        handles += [block.register_forward_pre_hook(before), last.register_forward_hook(after)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(model: nn.Module) -> Iterator[tuple[int, BridgeBlock | MatchedMLP]]:
    """(layer, block) of every block, in order. Under PEFT both copies of each, of which one runs."""
    for name, module in model.named_modules():
        if isinstance(module, BridgeBlock | MatchedMLP):
            [layer] = re.findall(r"\.layers\.(\d+)\.bridge\b", f".{name}")
            yield int(layer), module
