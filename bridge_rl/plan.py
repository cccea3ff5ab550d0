"""What a run will do, worked out without weights or network: groups, batches, parameters, memory, conflicts."""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl import GRPOConfig

from bridge_rl.checkpoint import is_bridge_checkpoint, read_config
from bridge_rl.config import DataSource, Recipe
from bridge_rl.data import FILE_FORMATS, import_function, is_function, load_problems, make_prompts, prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.memory import Memory, estimate
from bridge_rl.memory_shapes import Parameters
from bridge_rl.models import (
    adapter_conflict,
    load_reward,
    load_tokenizer,
    model_config,
    quantization_config,
    resolve_path,
)
from bridge_rl.presets import preset_config
from bridge_rl.report import names
from bridge_rl.rollout.request import known_positions
from bridge_rl.safety import conflicts, guard_conflicts
from bridge_rl.surgery import attach_bridge, bridge_parameters
from bridge_rl.update import part_conflicts

# Fields of GRPOConfig that another section of the recipe decides.
MANAGED = {
    "num_generations": "rollout.num_generations",
    "max_completion_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "reward_weights": "rewards.0.weight",
    "output_dir": "output_dir",
    "seed": "seed",
    "resume_from_checkpoint": "resume",
    "model_init_kwargs": "model.dtype, model.revision or model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "activation_checkpointing": "training.gradient_checkpointing",  # the older name, which TRL and the plan read
    "activation_checkpointing_kwargs": "training.gradient_checkpointing_kwargs",
    "chat_template_kwargs": "model.chat_template_kwargs",
    "run_name": "logging.name",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "num_generations_eval": "evaluation.widths",
    "deepspeed": "accelerate launch --config_file launch/accelerate/zero3.yaml",
}
COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_iterations",
)
# Values that TRL reads in the first step only, long after the warm-up.
CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
}
GIB = 2**30
ASSUMED_PROMPT_TOKENS = 512  # where the data are not at hand
LONGEST_READ = 256  # prompts with most characters, of which the one with most tokens is found


@dataclass(frozen=True)
class Batches:
    """Batch arithmetic. Rows are completions; a prompt has `num_generations` rows in groups of `width`."""

    num_processes: int
    rows_per_micro_batch: int
    micro_batches_per_update: int
    rows_per_generation: int  # over all ranks
    prompts_per_generation: int
    groups_per_rank: int
    groups_per_micro_batch: int
    updates_per_generation: float


@dataclass(frozen=True)
class Plan:
    """prompt: tokens of the longest prompt, read from the data or (`prompt_read` false) assumed."""

    batches: Batches
    parameters: Parameters
    memory: Memory
    prompt: int
    prompt_read: bool
    conflicts: list[str]


def make_plan(recipe: Recipe, read_data: bool = False) -> Plan:
    """Work out a recipe; with `read_data` from its longest prompt, if data and tokenizer are files here.

    Raises UserError for a model that has no configuration or a family that is not served.
    """
    check_types(recipe)
    config = preset_config(recipe.model.path) or model_config(recipe.model)
    parameters, batches = count_parameters(config, recipe), work_out_batches(recipe)
    found = [
        *unknown_options(recipe),
        *conflicts({"per_device_train_batch_size": 8, **recipe.training}, recipe.rollout.width),
    ]
    found += [*batch_conflicts(recipe, batches), *file_conflicts(recipe), *guard_conflicts(recipe, config)]
    found += [*metric_conflicts(recipe), *part_conflicts(recipe.training, config, recipe.update)]
    found += checkpoint_conflicts(recipe)
    if recipe.train == "lora" and recipe.training.get("cast_lm_head_to_fp32") and parameters.tied:
        found.append(
            "training.cast_lm_head_to_fp32 with train=lora: TRL cannot where the embedding is the head, leave it."
        )
    own_base = recipe.model.gguf_file or recipe.model.revision or is_bridge_checkpoint(resolve_path(recipe.model.path))
    if recipe.train == "full" and recipe.training.get("beta") and own_base:
        found.append(
            "training.beta with train=full loads a second model as reference, and cannot from GGUF, a revision or a "
            "checkpoint with a Bridge: set beta=0, or train=bridge or lora."
        )
    if recipe.model.quantization is not None:
        found += quantization_conflicts(recipe)
    longest = known_positions(config)
    if longest is not None and recipe.rollout.max_new_tokens >= longest:
        found.append(
            f"rollout.max_new_tokens is {recipe.rollout.max_new_tokens}, but the model knows {longest} positions, "
            "prompt included: lower it."
        )
    read = longest_prompt(recipe) if read_data and not found else None
    prompt = read or ASSUMED_PROMPT_TOKENS
    # At least one, where a conflict says that a batch splits it.
    groups = (max(1, batches.groups_per_micro_batch), max(1, batches.groups_per_rank))
    memory = estimate(recipe, config, parameters, groups, batches.num_processes, prompt, planned_for_gpu(recipe))
    return Plan(batches, parameters, memory, prompt, read is not None, found)


def planned_for_gpu(recipe: Recipe) -> bool:
    """Whether the plan is for a GPU (in bf16), and not for a CPU (in float32): one that is named, or is here."""
    return recipe.launch.gpu_memory_gb is not None or torch.cuda.is_available()


def longest_prompt(recipe: Recipe) -> int | None:
    """Tokens of the longest training prompt; None unless data and tokenizer are files here, or functions."""
    source, model = recipe.data.train, Path(resolve_path(recipe.model.path))
    at_hand = is_function(source.path) or source.path.endswith(FILE_FORMATS)
    if not at_hand or not (model / "tokenizer_config.json").is_file():
        return None
    tokenizer = load_tokenizer(recipe.model)
    problems = load_problems(replace(source, check_answers=False), "data.train", recipe.seed)
    longest = sorted(problems, key=lambda row: len(row["problem"]), reverse=True)[:LONGEST_READ]
    prompts = make_prompts(longest, recipe.data, conversational=tokenizer.chat_template is not None)
    return max(map(len, prompt_tokens(tokenizer, list(prompts["prompt"]))))


def check(recipe: Recipe) -> Plan:
    """`make_plan`, or UserError with the first conflict, here also between the recipe and this machine."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    planned = recipe.launch.num_processes
    if planned is not None and world != planned:
        raise UserError(
            f"launch.num_processes is {planned} but this run has {world}, so an update would see another number of "
            f"prompts: accelerate launch {planned} processes, or set launch.num_processes={world}."
        )
    plan = make_plan(recipe)
    if plan.conflicts:
        more = f" ({len(plan.conflicts)} conflicts in all: --dry-run lists them)" if len(plan.conflicts) > 1 else ""
        raise UserError(plan.conflicts[0] + more)
    for key in ("bf16", "fp16"):
        if recipe.training.get(key) and not torch.cuda.is_available():
            raise UserError(f"training.{key} is on, but there is no GPU here: leave it out, CPU runs are in float32.")
    return plan


def check_types(recipe: Recipe) -> None:
    """Raise UserError for a value of `training` that GRPOConfig declares to be something else."""
    for key, value in recipe.training.items():
        if key in MANAGED or key not in type_hints() or key in CHOICES:
            continue
        hint = type_hints()[key]
        try:
            TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
            raise UserError(f"training.{key} is {value!r}: it must be of type {wanted}.") from error
        if key in COUNTS and value is not None and value < 1:
            raise UserError(f"training.{key} is {value}: it must be at least 1.")


@cache
def type_hints() -> dict[str, Any]:
    """Types of GRPOConfig's fields by name."""
    return get_type_hints(GRPOConfig)


def count_parameters(config: PreTrainedConfig, recipe: Recipe) -> Parameters:
    """Counted on the meta device. LoRA is that on every linear layer of the base but the head (PEFT's `all-linear`)."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise UserError(
                f"model.path: {recipe.model.path} is a '{config.model_type}', no causal language model."
            ) from error
        head = model.get_output_embeddings()
        adapted = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        if recipe.bridge is not None:
            attach_bridge(model, recipe.bridge)
    quantized = {m for m in adapted if recipe.model.quantization is not None}
    total, new = model.num_parameters(), sum(p.numel() for _, p in bridge_parameters(model))
    lora = sum(recipe.lora.r * (m.in_features + m.out_features) for m in adapted)
    return Parameters(
        total=total,
        new=new,
        trained={"bridge": new, "lora": new + lora, "full": total}[recipe.train],
        linear=sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m not in quantized),
        quantized=sum(m.weight.numel() for m in quantized),
        tied=head.weight is model.get_input_embeddings().weight,
    )


def work_out_batches(recipe: Recipe) -> Batches:
    training, rollout = recipe.training, recipe.rollout
    num_processes = recipe.launch.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    rows = training.get("per_device_train_batch_size", 8)
    accumulation = training.get("gradient_accumulation_steps", 1)
    per_generation = training.get("steps_per_generation") or accumulation
    if training.get("generation_batch_size"):
        per_generation = max(1, training["generation_batch_size"] // (rows * num_processes))
    generated = rows * per_generation * num_processes
    return Batches(
        num_processes=num_processes,
        rows_per_micro_batch=rows,
        micro_batches_per_update=accumulation,
        rows_per_generation=generated,
        prompts_per_generation=generated // rollout.num_generations,
        groups_per_rank=rows * per_generation // rollout.width,
        groups_per_micro_batch=rows // rollout.width,
        updates_per_generation=per_generation * training.get("num_iterations", 1) / accumulation,
    )


def unknown_options(recipe: Recipe) -> Iterator[str]:
    """Keys of `training` that GRPOConfig does not have, or that another section decides."""
    known = {f.name for f in fields(GRPOConfig) if f.init}
    for key in recipe.training:
        if key in MANAGED:
            yield f"training.{key} is decided elsewhere: use {MANAGED[key]}."
        elif key not in known:
            near = difflib.get_close_matches(key, known, 1)
            yield f"unknown key 'training.{key}'" + (f": did you mean '{near[0]}'?" if near else ".")
        elif key in CHOICES and recipe.training[key] not in CHOICES[key]:
            yield f"training.{key} is {recipe.training[key]!r}: use one of {', '.join(map(str, CHOICES[key]))}."


def batch_conflicts(recipe: Recipe, batches: Batches) -> list[str]:
    found = []
    if batches.rows_per_generation % recipe.rollout.num_generations != 0:
        found.append(
            f"a generation batch of {batches.rows_per_generation} rows (per_device_train_batch_size x "
            f"gradient_accumulation_steps x {batches.num_processes} processes) is no multiple of "
            f"rollout.num_generations {recipe.rollout.num_generations}: change training.per_device_train_batch_size."
        )
    return found


def metric_conflicts(recipe: Recipe) -> Iterator[str]:
    """What a run is to follow or keep the best of must be measured while it trains: transformers looks late."""
    training, section = recipe.training, recipe.evaluation
    metric = training.get("metric_for_best_model")
    if metric is None and training.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
        metric = "loss"  # transformers' own
    if metric is None:
        return
    evaluated = recipe.data.eval is not None and section.every is not None
    measured = [names.evaluation(name, width) for name in names.EVALUATION for width in section.widths]
    if not evaluated:
        yield f"training.metric_for_best_model is {metric}, but nothing is evaluated in training: set evaluation.every."
    elif f"eval_{metric.removeprefix('eval_')}" not in measured:
        yield (
            f"training.metric_for_best_model is {metric}, which is not measured (transformers takes loss where a "
            f"schedule needs one): use one of {', '.join(measured)}."
        )


def checkpoint_conflicts(recipe: Recipe) -> Iterator[str]:
    """What a checkpoint with a Bridge, as the model, cannot be trained as."""
    path = Path(resolve_path(recipe.model.path))
    if (path / "adapter_config.json").is_file():
        yield adapter_conflict(recipe.model)
    if is_bridge_checkpoint(path) and "quantization" in read_config(path) and recipe.model.quantization is None:
        yield f"model.path: {recipe.model.path} was trained on a quantized base: set model.quantization as it was."


def quantization_conflicts(recipe: Recipe) -> Iterator[str]:
    """A base in 8 or 4 bits has no gradients, and has not been tried in shards."""
    quantization = f"model.quantization is {recipe.model.quantization}"
    if recipe.train == "full":
        yield f"{quantization} with train=full: a quantized base is frozen, set train=bridge or train=lora."
    if recipe.launch.zero_stage > 0:
        stage = recipe.launch.zero_stage
        yield f"{quantization} with launch.zero_stage={stage}: set 0, a frozen base has little to shard."
    if recipe.model.gguf_file is not None:
        yield f"{quantization} with model.gguf_file: that is loaded dequantized, name a checkpoint in safetensors."
    try:
        quantization_config(recipe.model)
    except UserError as error:
        yield str(error)


def file_conflicts(recipe: Recipe) -> list[str]:
    """Files and functions that the recipe names and that are not there."""
    found = []
    for number, section in enumerate(recipe.rewards):
        try:
            load_reward(section, number)
        except UserError as error:
            found.append(str(error))
    sources = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    if recipe.warmup is not None:
        sources["warmup.data"] = recipe.warmup.data
    for key, source in sources.items():
        if source is not None:
            found += source_conflicts(source, key)
    output = Path(recipe.output_dir)
    if output.exists() and not output.is_dir():
        found.append(f"output_dir: {output} is a file: name a directory.")
    return found


def source_conflicts(source: DataSource, key: str) -> Iterator[str]:
    """What is wrong with a source as far as it shows without reading the data."""
    if source.path.endswith(FILE_FORMATS):
        if not Path(source.path).is_file():
            yield f"{key}.path: there is no file {source.path}."
    elif ":" in source.path:
        try:
            import_function(source.path, f"{key}.path")
        except UserError as error:
            yield str(error)
    if source.size is not None and source.size < 1:
        yield f"{key}.size is {source.size}: it must be at least 1."
    try:
        if source.answer_pattern is not None and re.compile(source.answer_pattern).groups < 1:
            yield f"{key}.answer_pattern is {source.answer_pattern!r}: put the answer's place in parentheses."
    except re.error as error:
        yield f"{key}.answer_pattern is {source.answer_pattern!r}, no regular expression: {error}."


def describe(recipe: Recipe, plan: Plan) -> str:
    """The plan as text."""
    b, p = plan.batches, plan.parameters
    bridge = (
        "none"
        if recipe.bridge is None
        else (
            f"{recipe.bridge.kind}, {recipe.bridge.num_heads} heads x {recipe.bridge.head_dim}, "
            f"layers {recipe.bridge.layers}"
        )
    )
    base = p.total - p.new
    lines = [
        f"model            {resolve_path(recipe.model.path)}",
        f"bridge           {bridge}",
        f"parameters       {base:,} base, {p.new:,} new ({p.new / base:.2%}), "
        f"{p.trained:,} trained (train={recipe.train})",
        f"groups           width {recipe.rollout.width}, {recipe.rollout.num_generations} completions a prompt",
        f"processes        {b.num_processes}, ZeRO stage {recipe.launch.zero_stage}",
        f"generation batch {b.prompts_per_generation} prompts, {b.rows_per_generation} rows; "
        f"{b.groups_per_rank} groups a rank; serves {b.updates_per_generation:g} updates",
        f"micro-batch      {b.groups_per_micro_batch} groups, {b.rows_per_micro_batch} rows a rank; "
        f"{b.micro_batches_per_update} an update",
        f"tokens           at most {b.rows_per_generation * recipe.rollout.max_new_tokens:,} a generation batch",
        *describe_memory(recipe, plan),
        f"output           {recipe.output_dir}",
    ]
    notes = [f"conflict: {conflict}" for conflict in plan.conflicts]
    return "\n".join(lines + notes)


def describe_memory(recipe: Recipe, plan: Plan) -> list[str]:
    """The peak, what it assumes, and the terms of each phase at its largest moment (see `bridge_rl.memory`)."""
    memory, budget = plan.memory, recipe.launch.gpu_memory_gb
    device = (
        "GPU in bf16" if planned_for_gpu(recipe) else "CPU in float32, as no GPU is here or in launch.gpu_memory_gb"
    )
    prompt = "the longest of the data" if plan.prompt_read else "assumed"
    lines = [
        f"memory           about {memory.peak / GIB:.2f} GiB"
        + (f" of {budget:g}" if budget else "")
        + f" on a {device}; "
        f"prompts of {plan.prompt} tokens ({prompt}), every row to its limit"
    ]
    for moment in (memory.rollout, memory.update, memory.evaluation):
        if moment is not None:
            terms = sorted(moment.terms.items(), key=lambda term: -term[1])
            listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in terms if size >= GIB / 200)
            lines.append(f"  {moment.phase + ':':27} {moment.total / GIB:6.2f} = {listed or 'below 0.01 each'}")
    if budget and memory.peak / GIB > budget:
        lines.append("memory: the estimate is above launch.gpu_memory_gb: lower the micro-batch, lengths or max_rows.")
    return lines


def print_resolved(recipe: Recipe, plan: Plan) -> None:
    """What `--dry-run` shows: the resolved recipe, then the plan."""
    print(yaml.safe_dump(yaml.safe_load(recipe.to_yaml()), sort_keys=False))
    print(describe(recipe, plan))
