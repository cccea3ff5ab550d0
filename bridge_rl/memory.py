"""How much memory a run needs on one device, term by term, from shapes alone.

A run has phases that do not overlap: sampling, the update, an evaluation. Weights and the optimizer's state are held in
all of them. To these add, each worst where every row is as long as it may be:

- sampling: the `cache` (keys and values in pages, a prompt once a group), the `prefill`'s own keys and values until they
  are in pages, `logits` of one step, the `workspace` of one layer, on CPU a second copy of the weights in another
  `layout`, and under ZeRO-3 the weights `gathered`.
- update: its peak is the largest of three moments, since activations are freed as gradients appear:
  `head` (all activations, and tiles of logits: the head is computed by tokens and vocabulary in pieces),
  `backward` (all activations, and the gradients that flow through the last layer),
  `end` (all weights' gradients, one layer's activations, and the optimizer's temporaries).

What a layer keeps for its backward pass depends on what is trained: a frozen weight's input is not kept. A checkpointed
layer keeps its input only, and what it keeps inside comes once, for the layer that is computed again (alike whether
reentrant or not).

Shapes: T tokens computed at once, L of them of completions, D model, I inner width of the MLP, Q and H query and key
heads, K head size, V vocabulary, W inner width of the Bridge, N rows of a group, R rows sampled at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCABULARY_CHUNK

from bridge_rl.config import Recipe
from bridge_rl.rollout.budget import LONG, LONG_ROW_PAGE, ROW_PAGE, prompt_page_for
from bridge_rl.rollout.packing import LEAST_ELEMENTS
from bridge_rl.rollout.pages import pages_for
from bridge_rl.rollout.request import RolloutOptions
from bridge_rl.rollout.sampling import CDF_BLOCK

FP32 = 4


@dataclass(frozen=True)
class Parameters:
    """How many: all, those of the Bridge or its control, trained ones; linear: sizes of linear weights, head included.

    tied: whether the embedding is the head, too.
    """

    total: int
    new: int
    trained: int
    linear: tuple[int, ...]
    tied: bool


@dataclass(frozen=True)
class Moment:
    """What is held at once, in bytes by term; `phase` names it."""

    phase: str
    terms: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Memory:
    """The largest moment of each phase, on one device."""

    rollout: Moment
    update: Moment
    evaluation: Moment | None

    @property
    def peak(self) -> float:
        return max(moment.total for moment in (self.rollout, self.update, self.evaluation) if moment is not None)


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
        return cls(gpu, deepspeed, base, blocks, compute, num_processes, recipe.launch.zero_stage)

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


def estimate(
    recipe: Recipe, config: Any, parameters: Parameters, groups: tuple[int, int], processes: int, prompt: int, gpu: bool
) -> Memory:
    """The memory of one device. groups: of a micro-batch, and that a rank samples; prompt: tokens of a prompt."""
    layer, device = Layer.of(recipe, config), Device.of(recipe, gpu, processes)
    held = held_always(recipe, parameters, device)

    def largest(moments: Iterator[Moment]) -> Moment:
        return max((Moment(m.phase, held | m.terms) for m in moments), key=lambda m: m.total)

    of_micro_batch, of_rank = groups
    in_training = Sampled.in_training(recipe, of_rank, prompt)
    in_evaluation = Sampled.in_evaluation(recipe, processes, prompt)
    return Memory(
        rollout=largest(sampling(recipe, layer, in_training, parameters, device, "rollout")),
        update=largest(update(recipe, layer, Part.of(recipe, of_micro_batch, prompt), parameters, device)),
        evaluation=largest(sampling(recipe, layer, in_evaluation, parameters, device, "evaluation"))
        if recipe.data.eval is not None
        else None,
    )


def held_always(recipe: Recipe, parameters: Parameters, device: Device) -> dict[str, float]:
    """Weights, and the optimizer's two moments a weight, with DeepSpeed's float32 master beside them."""
    # PEFT keeps the blocks that it has put its trained copies in the place of.
    beside = {"full": 0, "bridge": parameters.new, "lora": parameters.trained + parameters.new}[recipe.train]
    of_base = parameters.total - (parameters.new if recipe.train != "full" else 0)
    weights = device.base * of_base + device.blocks * beside
    optimizer = (3 if device.deepspeed else 2) * FP32 * parameters.trained
    return {"weights": weights / device.shard(3), "optimizer": optimizer / device.shard(1)}


# -- update -----------------------------------------------------------------------------------------------------------


def update(recipe: Recipe, layer: Layer, part: Part, parameters: Parameters, device: Device) -> Iterator[Moment]:
    """What an update adds to what is held always, at the moments that may be its peak."""
    one, block = kept_by_layer(recipe, layer, part, device), kept_by_block(layer, part, device)
    if recipe.training.get("gradient_checkpointing", True):
        activations, inside = device.compute * part.tokens * layer.D * layer.count, one
    else:
        # Below the first block nothing that is frozen has a gradient, so nothing is kept.
        layers = layer.count - (layer.first + 1 if recipe.train == "bridge" else 0)
        activations, inside = layers * one + layer.carriers * block, -block
    # The last norm's input, and what the head reads.
    activations += FP32 * part.tokens * layer.D + device.compute * part.scored * layer.D
    always = exchanged(recipe, layer, parameters, device)

    per_weight = 2 if device.deepspeed and device.compute == 2 else FP32
    gradients = per_weight * parameters.trained / device.shard(2)
    accumulates = part.parts * recipe.training.get("gradient_accumulation_steps", 1) > 1
    before = gradients if accumulates else 0.0
    embedding = head_gradient = end_of_embedding = 0.0
    if recipe.train == "full":
        embedding = FP32 * layer.V * layer.D
        head_gradient = embedding
        # The embedding's gradient is dense, and added to what is there; if it is the head too, that part has waited.
        end_of_embedding = embedding * (parameters.tied + accumulates)
    of_first = (gradients - embedding / device.shard(2)) / layer.count if recipe.train == "full" else 0.0
    # Gradients pass the block first, and then, when it keeps nothing more, the MLP: of a frozen one, a third is there.
    mlp = device.compute * part.tokens * (2 * layer.D + (3 if recipe.train == "bridge" else 2) * layer.I)
    flow = max(block + 4 * FP32 * part.tokens * layer.D, mlp)

    yield Moment(
        "update, at the head",
        always | {"activations": activations, "gradients": before + head_gradient, "head": head(part, layer, device)},
    )
    yield Moment(
        "update, in the last layer",
        always | {"activations": activations + inside, "flow": flow, "gradients": before or head_gradient},
    )
    yield Moment(
        "update, in the first layer",
        always | {"activations": one, "flow": flow, "gradients": before or gradients - of_first},
    )
    temporary = end_of_embedding
    if device.deepspeed:
        temporary = max(temporary, FP32 * parameters.trained / device.shard(1))  # of gradients, in float32
    elif recipe.training.get("optim") == "adamw_torch":
        temporary = max(temporary, FP32 * parameters.trained)  # it steps all weights at once
    yield Moment("update, at the step", always | {"gradients": gradients, "temporary": temporary})


def kept_by_layer(recipe: Recipe, layer: Layer, part: Part, device: Device) -> float:
    """Bytes that a layer of the base keeps for its backward pass (Llama's operations)."""
    T, D, I, c = part.tokens, layer.D, layer.I, device.compute  # noqa: E741, N806
    queries, keys = layer.Q * layer.K, layer.H * layer.K
    numbers = 2 * T * queries + 2 * T * keys + 3 * T * I  # q, output, k, v; gate, its activation, up
    mask = 0
    if part.shared:
        columns = part.prompt + part.completion
        numbers += 2 * part.rows * columns * keys  # each row's keys and values, behind those of its prompt
        mask = 0 if device.gpu else FP32 * part.rows * part.completion * columns
    adapters = 0
    if recipe.train == "lora":
        adapters = 7 * device.blocks * T * recipe.lora.r
    if recipe.train == "lora" and device.blocks != c:  # each of the seven casts its input for itself
        adapters += device.blocks * T * (5 * D + queries + I)
    elif recipe.train != "bridge":  # the inputs of trained weights
        numbers += 2 * T * D + T * queries + T * I
    if recipe.train == "full":
        numbers += 2 * T * D  # normed, before the norm's weight
    norms = 2 * FP32 * T * D  # their inputs, in float32
    return norms + c * numbers + adapters + mask


def kept_by_block(layer: Layer, part: Part, device: Device) -> float:
    """Bytes that a block keeps, or its control."""
    T, b = part.tokens, device.blocks  # noqa: N806
    norm = FP32 * T * layer.D + 2 * b * T * layer.D  # input, normed before and after the norm's weight
    if layer.kind is None:
        return 0
    if layer.kind == "pmatch":
        return norm + b * 4 * T * layer.W
    attending = part.scored if part.shared else T  # a prompt's tokens do not
    return norm + b * (T + 3 * attending) * layer.W + FP32 * attending * layer.heads * part.width


def head(part: Part, layer: Layer, device: Device) -> float:
    """Tiles of logits of TRL's fused LM head, and the gradient of its input."""
    scored = part.scored if part.shared or device.gpu else part.tokens
    tokens, vocabulary = min(scored, TOKEN_CHUNK_SIZE), min(layer.V, VOCABULARY_CHUNK)
    tiles = device.compute * tokens * VOCABULARY_CHUNK
    if not device.gpu:  # no kernel, but torch's operations with results of their own: seven, and a bool
        tiles += 7.25 * FP32 * tokens * vocabulary
    return tiles + FP32 * scored * layer.D


def exchanged(recipe: Recipe, layer: Layer, parameters: Parameters, device: Device) -> dict[str, float]:
    """What ranks hold to exchange gradients and, under ZeRO-3, weights, by the defaults of DDP and DeepSpeed; what a
    GPU casts weights to; and the second model that full training holds for a KL penalty."""
    terms = {}
    if device.deepspeed:
        bucket = layer.D**2 if device.stage == 3 else 5e8
        terms["buckets"] = 2 * 2 * min(bucket, parameters.trained)  # two, of bf16
        if device.stage == 3:
            live = min(1e9 + 0.9 * layer.D**2, parameters.total)
            terms["gathered"] = device.base * live
    elif device.shards > 1:
        terms["buckets"] = FP32 * parameters.trained
    if device.compute == 2 and device.base == FP32:
        terms["cast"] = 2.0 * sum(parameters.linear)
    if recipe.train == "full" and recipe.training.get("beta"):
        terms["reference"] = device.base * (parameters.total - parameters.new) / device.shard(3)
    return terms


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampling(
    recipe: Recipe, layer: Layer, sampled: Sampled, parameters: Parameters, device: Device, phase: str
) -> Iterator[Moment]:
    """What sampling adds to what is held always, at the moments that may be its peak."""
    per_token = 2 * device.compute * layer.count * layer.H * layer.K
    page = LONG_ROW_PAGE if sampled.limit > LONG else ROW_PAGE
    prompt_page = prompt_page_for([sampled.prompt])
    visit = 8 if device.gpu else 1  # steps between two looks of the scheduler
    row_pages = sampled.rows * (pages_for(sampled.limit + visit, page) + 1)
    prompt_pages = sampled.groups * pages_for(sampled.prompt, prompt_page)
    tokens = row_pages * page + prompt_pages * prompt_page
    cache = per_token * min(tokens, sampled.max_tokens or tokens)

    at_once = min(sampled.groups, max(1, RolloutOptions.prefill_tokens // sampled.prompt))
    prefilled = at_once * sampled.prompt
    copies = 2 + (sampled.temperature != 1) + (layer.V % CDF_BLOCK > 0) + 6 * (sampled.top_p < 1)
    logits = (device.compute + FP32 * copies) * sampled.rows * layer.V
    if not device.gpu and device.compute == 2:
        logits += FP32 * layer.V * layer.D  # a CPU multiplies bf16 in float32
    # Scores twice, queries and what is mixed, of each page.
    own = row_pages * 2 * (page + layer.K)
    shared = prompt_pages * sampled.width * 2 * (prompt_page + layer.K)

    always = {"cache": cache}
    if not device.gpu and device.base == FP32:
        always["layout"] = FP32 * sum(size for size in parameters.linear if size > LEAST_ELEMENTS)
    if device.deepspeed and device.stage == 3 and recipe.training.get("ds3_gather_for_generation", True):
        always["gathered"] = device.base * parameters.total
    later = sampled.waiting > sampled.rows or sampled.groups > at_once  # prompts that find the cache in use
    flow = device.compute * prefilled * (3 * layer.D + 3 * layer.I)
    first = always if later else {**always, "cache": 0.0}
    yield Moment(f"{phase}, in a prefill", first | {"prefill": per_token * prefilled, "flow": flow})
    yield Moment(f"{phase}, after a prefill", always | {"prefill": per_token * prefilled, "logits": logits})
    yield Moment(f"{phase}, in a step", always | {"logits": logits, "attention": FP32 * layer.Q * (own + shared)})
