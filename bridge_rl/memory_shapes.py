"""The numbers that a run's memory follows from (`memory`): of parameters, of a layer, of what is computed at once.

Shapes: T tokens computed at once, L of them of completions, D model, I inner width of the MLP, Q and H query and key
heads, K head size, V vocabulary, W inner width of the Bridge.
"""

from dataclasses import dataclass
from typing import Any

from bridge_rl.config import Recipe

FP32 = 4
QUANTIZED = {"int8": 1, "nf4": 0.5 + FP32 / 64}  # bytes of a weight; of 64 in 4 bits, also a scale


@dataclass(frozen=True)
class Parameters:
    """How many: all, those of the Bridge or its control, trained ones; those of linear layers, head included.

    tied: whether the embedding is the head, too. quantized: those of them in 8 or 4 bits, which are not in `linear`.
    """

    total: int
    new: int
    trained: int
    linear: int
    quantized: int
    tied: bool


@dataclass(frozen=True)
class Device:
    """Bytes of a number by use. gpu: a GPU in bf16, else a CPU; deepspeed: masters in float32 are the optimizer's."""

    gpu: bool
    deepspeed: bool
    base: float  # the base's weights
    blocks: int  # weights trained beside a frozen base
    compute: int  # activations of the base
    shards: int
    stage: int
    offload: str = "none"

    @classmethod
    def of(cls, recipe: Recipe, gpu: bool, num_processes: int) -> "Device":
        bf16 = gpu and bool(recipe.training.get("bf16", True))
        deepspeed = recipe.launch.zero_stage > 0 and num_processes > 1
        own = 2 if recipe.model.dtype == "bfloat16" else FP32
        if deepspeed:
            base = blocks = 2 if bf16 else FP32
        else:
            base, blocks = FP32 if recipe.train == "full" else own, FP32
        compute = 2 if bf16 else int(base)
        offload = recipe.launch.offload if deepspeed else "none"
        return cls(gpu, deepspeed, base, blocks, compute, num_processes, recipe.launch.zero_stage, offload)

    def shard(self, stage: int) -> int:
        """By how many ranks something is shared that ZeRO shards from `stage` on."""
        return self.shards if self.deepspeed and self.stage >= stage else 1


@dataclass(frozen=True)
class Layer:
    """Sizes of a decoder layer and of the block in it, by the letters of the module's docstring."""

    D: int
    I: int  # noqa: E741
    Q: int
    H: int
    K: int
    V: int
    W: int
    heads: int  # of the block
    count: int
    kind: str | None  # of the block: bridge, pmatch, or none
    carriers: int  # layers that have a block
    first: int  # of them

    @classmethod
    def of(cls, recipe: Recipe, config: Any) -> "Layer":
        config = config.get_text_config()
        hidden, count, bridge = config.hidden_size, config.num_hidden_layers, recipe.bridge
        # Some families name neither: their MLP is four times as wide, and every head has its own keys.
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        if getattr(config, "num_experts_per_tok", None):
            inner = config.moe_intermediate_size * config.num_experts_per_tok
        carriers = [] if bridge is None else range(count) if bridge.layers == "all" else bridge.layers
        return cls(
            D=hidden,
            I=inner,
            Q=config.num_attention_heads,
            H=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            K=getattr(config, "head_dim", None) or hidden // config.num_attention_heads,
            V=config.vocab_size,
            W=0 if bridge is None else bridge.inner_width,
            heads=0 if bridge is None else bridge.num_heads,
            count=count,
            kind=None if bridge is None else bridge.kind,
            carriers=len(carriers),
            first=min(carriers, default=0),
        )


@dataclass(frozen=True)
class Part:
    """What an update computes at once, at most. parts: of a micro-batch, one after the other."""

    groups: int
    parts: int
    width: int
    prompt: int
    completion: int
    shared: bool  # a prompt is computed once a group

    @classmethod
    def of(cls, recipe: Recipe, groups: int, prompt: int) -> "Part":
        width, completion = recipe.rollout.width, recipe.rollout.max_new_tokens
        shared, budget = recipe.update.share_prompt, recipe.update.token_budget
        one = cls(1, 1, width, prompt, completion, shared)
        at_once = groups if budget is None else min(groups, max(1, budget // one.tokens))
        return cls(at_once, -(-groups // at_once), width, prompt, completion, shared)

    @property
    def rows(self) -> int:
        return self.groups * self.width

    @property
    def tokens(self) -> int:
        """T."""
        return self.groups * (self.prompt if self.shared else self.width * self.prompt) + self.scored

    @property
    def scored(self) -> int:
        """L."""
        return self.rows * self.completion


@dataclass(frozen=True)
class Sampled:
    """What is sampled at once, at most: `rows` in `groups`, of `waiting` rows in all. limit: of a row's tokens."""

    rows: int
    groups: int
    waiting: int
    width: int
    prompt: int
    limit: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None  # in the cache

    @classmethod
    def in_training(cls, recipe: Recipe, groups: int, prompt: int) -> "Sampled":
        """`groups`: those of a rank."""
        section, waiting = recipe.rollout, groups * recipe.rollout.width
        rows = min(section.max_rows or waiting, waiting)
        # Towards the end, of each group one row may be left.
        at_once = groups if section.max_rows is None else min(groups, rows)
        return cls(
            rows, at_once, waiting, section.width, prompt, section.max_new_tokens, section.temperature,
            max_tokens=section.max_cache_tokens,
        )  # fmt: skip

    @classmethod
    def in_evaluation(cls, recipe: Recipe, processes: int, prompt: int) -> "Sampled":
        """At width 1, where every row has its prompt for itself."""
        section = recipe.evaluation
        waiting = -(-section.problems // processes) * max(section.samples, *section.widths)
        rows = min(section.max_rows or waiting, waiting)
        limit = section.max_new_tokens or recipe.rollout.max_new_tokens
        return cls(rows, rows, waiting, 1, prompt, limit, section.temperature, section.top_p)
