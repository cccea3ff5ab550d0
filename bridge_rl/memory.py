"""How much memory a run needs on one device, term by term, from shapes alone.

A run has phases that do not overlap: sampling, the update, an evaluation. Weights and the optimizer's state are held in
all of them. To these add, where every row is as long as it may be:

- sampling and evaluation: the `cache` (keys and values in pages, a prompt once a group); the keys and values of a
  `prefill` until they are in pages, and what flows through one of its layers (`flow`); the `logits` of a step and the
  workspace of one layer's `attention`; on CPU the weights in another `layout`; under ZeRO-3 the weights `gathered`.
- update: its peak is the largest of four moments, as activations are freed while gradients appear: at the `head`
  (all activations; logits come in tiles, whatever the vocabulary and the lengths), in the last layer (all activations,
  and the gradients that flow through it), in the first layer (its activations, nearly all gradients), at the step
  (all gradients, and what the step makes besides).

What a layer keeps for its backward pass depends on what is trained: a frozen weight's input is not kept. A checkpointed
layer keeps its input, and the rest comes once, for the layer that is computed again (reentrant or not). Not in it are
the CUDA context and what the allocator cannot use.

Counted by hand from the operations of Llama and Qwen2, and measured against them on CPU by `benchmarks/memory.py`. What
is a GPU's (bf16 under autocast, kernels), DDP's and DeepSpeed's is derived, not measured.

Shapes: T tokens computed at once, D model, I inner width of the MLP.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCABULARY_CHUNK

from bridge_rl.config import Recipe, RolloutSection
from bridge_rl.memory_shapes import FP32, QUANTIZED, Device, Layer, Parameters, Part, Sampled
from bridge_rl.rollout.budget import prompt_page_for, row_page_for
from bridge_rl.rollout.packing import LEAST_ELEMENTS
from bridge_rl.rollout.pages import pages_for
from bridge_rl.rollout.request import RolloutOptions
from bridge_rl.rollout.sampling import CDF_BLOCK


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
    def moments(self) -> list[Moment]:
        return [moment for moment in (self.rollout, self.update, self.evaluation) if moment is not None]

    @property
    def peak(self) -> float:
        return max(moment.total for moment in self.moments)


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


def estimate_warmup(
    recipe: Recipe, config: Any, parameters: Parameters, groups: tuple[int, int], processes: int, prompt: int, gpu: bool
) -> Memory:
    """The same of a recipe's warm-up. groups: of a step, and that a rank samples at once."""
    of_blocks = replace(parameters, trained=parameters.new)
    found = estimate(warmup_as_run(recipe), config, of_blocks, groups, processes, prompt, gpu)
    terms = {name: size for name, size in found.rollout.terms.items() if name != "optimizer"}  # which is made later
    return replace(found, rollout=replace(found.rollout, terms=terms))


def warmup_as_run(recipe: Recipe) -> Recipe:
    """The run that holds as much as the warm-up of `recipe`: groups of all completions of a problem, a frozen base in
    its own dtype, on each rank all of it."""
    section, rollout = recipe.warmup, recipe.rollout
    assert section is not None
    return replace(
        recipe,
        train="bridge",
        data=replace(recipe.data, eval=None),
        rollout=RolloutSection(
            width=section.samples,
            num_generations=section.samples,
            max_new_tokens=section.max_new_tokens or rollout.max_new_tokens,
            temperature=rollout.temperature,
            max_rows=None if rollout.max_rows is None else max(rollout.max_rows, section.samples),
        ),
        training={key: recipe.training[key] for key in ("bf16", "gradient_checkpointing") if key in recipe.training},
        launch=replace(recipe.launch, zero_stage=0, offload="none"),
    )


def held_always(recipe: Recipe, parameters: Parameters, device: Device) -> dict[str, float]:
    """Weights, and the optimizer's two moments a weight, with DeepSpeed's float32 master beside them."""
    # PEFT keeps the blocks that it has put its trained copies in the place of.
    beside = {"full": 0, "bridge": parameters.new, "lora": parameters.trained + parameters.new}[recipe.train]
    of_base = parameters.total - (parameters.new if recipe.train != "full" else 0)
    weights = device.base * of_base + device.blocks * beside
    if recipe.model.quantization is not None:
        weights -= (device.base - QUANTIZED[recipe.model.quantization]) * parameters.quantized
    optimizer = (3 if device.deepspeed else 2) * FP32 * parameters.trained
    if device.offload == "all":  # what a pass needs of it is `gathered`
        weights = 0
    if device.offload != "none":
        optimizer = 0
    return {"weights": weights / device.shard(3), "optimizer": optimizer / device.shard(1)}


# -- update -----------------------------------------------------------------------------------------------------------


def update(recipe: Recipe, layer: Layer, part: Part, parameters: Parameters, device: Device) -> Iterator[Moment]:
    """What an update adds to what is held always, at the moments that may be its peak."""
    one, block = kept_by_layer(recipe, layer, part, device), kept_by_block(layer, part, device)
    if recipe.training.get("gradient_checkpointing", True):
        activations, inside = float(device.compute * part.tokens * layer.D * layer.count), one
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
    if device.deepspeed and device.offload == "none":
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
        terms["cast"] = 2.0 * parameters.linear
    if recipe.train == "full" and recipe.training.get("beta"):
        terms["reference"] = device.base * (parameters.total - parameters.new) / device.shard(3)
    return terms


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampling(
    recipe: Recipe, layer: Layer, sampled: Sampled, parameters: Parameters, device: Device, phase: str
) -> Iterator[Moment]:
    """What sampling adds to what is held always, at the moments that may be its peak."""
    per_token = 2 * device.compute * layer.count * layer.H * layer.K
    page = row_page_for(sampled.limit)
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
        logits += FP32 * layer.V * layer.D  # some CPUs multiply bf16 in float32, from a copy
    # Scores twice, queries and what is mixed, of each page.
    own = row_pages * 2 * (page + layer.K)
    shared = prompt_pages * sampled.width * 2 * (prompt_page + layer.K)

    always: dict[str, float] = {"cache": cache}
    if not device.gpu and device.base == FP32 and parameters.linear > LEAST_ELEMENTS:
        always["layout"] = FP32 * parameters.linear
    if device.deepspeed and device.stage == 3 and recipe.training.get("ds3_gather_for_generation", True):
        always["gathered"] = device.base * parameters.total
    if device.compute == 2 and device.base == FP32 and recipe.train == "full":  # autocast keeps what it casts
        always["cast"] = 2.0 * parameters.linear
    later = sampled.waiting > sampled.rows or sampled.groups > at_once  # prompts that find the cache in use
    flow = device.compute * prefilled * (3 * layer.D + 3 * layer.I)
    first = always if later else {**always, "cache": 0.0}
    yield Moment(f"{phase}, in a prefill", first | {"prefill": per_token * prefilled, "flow": flow})
    yield Moment(f"{phase}, after a prefill", always | {"prefill": per_token * prefilled, "logits": logits})
    yield Moment(f"{phase}, in a step", always | {"logits": logits, "attention": FP32 * layer.Q * (own + shared)})
