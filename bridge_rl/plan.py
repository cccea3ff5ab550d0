"""What a run will do, worked out without weights or network: groups, batches, parameters, memory."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from bridge_rl.config import DataSource, Recipe
from bridge_rl.conflicts import check_types, find_conflicts
from bridge_rl.data import FILE_FORMATS, is_function, load_problems, make_prompts, prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.memory import Memory, estimate, estimate_warmup
from bridge_rl.memory_shapes import Parameters
from bridge_rl.models import load_tokenizer, model_config, resolve_path, uses_deepspeed, uses_fsdp
from bridge_rl.presets import preset_config
from bridge_rl.run_options import check_optimizer, stage_of_launcher, training_arguments
from bridge_rl.surgery import attach_bridge, bridge_parameters
from bridge_rl.warmup import PROBLEMS_PER_CALL

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


class LongestPrompt(NamedTuple):
    """Its tokens; and whether it was read from the data, else it is assumed."""

    tokens: int
    read: bool

    def __str__(self) -> str:
        return f"of {self.tokens} tokens ({'the longest of the data' if self.read else 'assumed'})"


@dataclass(frozen=True)
class Plan:
    """prompt, warmup_prompt: the longest of either. warmup: its memory, by the phases of a run."""

    batches: Batches
    parameters: Parameters
    memory: Memory
    warmup: Memory | None
    prompt: LongestPrompt
    warmup_prompt: LongestPrompt
    conflicts: list[str]


def make_plan(recipe: Recipe, read_data: bool = False) -> Plan:
    """Work out a recipe; with `read_data` from its longest prompt, if data and tokenizer are files here, and with what
    a run of it would find out when it starts.

    Raises UserError for a model that has no configuration or a family that is not served.
    """
    check_types(recipe)
    config = preset_config(recipe.model.path) or model_config(recipe.model)
    parameters, batches = count_parameters(config, recipe), work_out_batches(recipe)
    found = list(find_conflicts(recipe, config, batches, parameters.tied))
    if read_data and not found:
        found += option_conflicts(recipe, batches)
    reads, gpu, section = read_data and not found, planned_for_gpu(recipe), recipe.warmup
    prompt = warmup_prompt = longest_prompt(recipe, recipe.data.train, "data.train", reads)
    if recipe.data.eval is not None:
        longest_prompt(recipe, recipe.data.eval, "data.eval", reads)  # which a run would refuse if it cannot be read
    # At least one, where a conflict says that a batch splits it.
    groups = (max(1, batches.groups_per_micro_batch), max(1, batches.groups_per_rank))
    memory = estimate(recipe, config, parameters, groups, batches.num_processes, prompt.tokens, gpu)
    warmup = None
    if section is not None:
        if section.data is not None:
            warmup_prompt = longest_prompt(recipe, section.data, "warmup.data", reads)
        groups = (section.groups_per_step, min(PROBLEMS_PER_CALL, -(-section.problems // batches.num_processes)))
        warmup = estimate_warmup(recipe, config, parameters, groups, batches.num_processes, warmup_prompt.tokens, gpu)
    return Plan(batches, parameters, memory, warmup, prompt, warmup_prompt, found)


def option_conflicts(recipe: Recipe, batches: Batches) -> Iterator[str]:
    """What TRL and torch would refuse of the `training` section, but for what only a GPU has."""
    options = {key: value for key, value in recipe.training.items() if key not in ("bf16", "fp16", "tf32")}
    # One process that does the work of all: here are not as many.
    options["per_device_train_batch_size"] = batches.rows_per_micro_batch * batches.num_processes
    try:
        check_optimizer(training_arguments(replace(recipe, training=options)))
    except UserError as error:
        yield str(error)


def planned_for_gpu(recipe: Recipe) -> bool:
    """Whether the plan is for a GPU (in bf16), and not for a CPU (in float32): one that is named, or is here."""
    return recipe.launch.gpu_memory_gb is not None or torch.cuda.is_available()


def longest_prompt(recipe: Recipe, source: DataSource, key: str, reads: bool) -> LongestPrompt:
    """Read only if `reads`, and data and tokenizer are files here, or functions."""
    at_hand = is_function(source.path) or source.path.endswith(FILE_FORMATS)
    if not reads or not at_hand or not (Path(resolve_path(recipe.model.path)) / "tokenizer_config.json").is_file():
        return LongestPrompt(ASSUMED_PROMPT_TOKENS, read=False)
    tokenizer = load_tokenizer(recipe.model)
    problems = load_problems(replace(source, check_answers=False), key, recipe.seed)
    longest = sorted(problems, key=lambda row: len(row["problem"]), reverse=True)[:LONGEST_READ]
    prompts = make_prompts(longest, recipe.data, tokenizer)
    return LongestPrompt(max(map(len, prompt_tokens(tokenizer, list(prompts["prompt"])))), read=True)


def check(recipe: Recipe) -> Plan:
    """`make_plan`, or UserError with the first conflict, here also between the recipe and this machine."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    planned = recipe.launch.num_processes
    if planned is not None and world != planned:
        raise UserError(
            f"launch.num_processes is {planned} but this run has {world}, so an update would see another number of "
            f"prompts: accelerate launch {planned} processes, or set launch.num_processes={world}."
        )
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to one process, which would split groups over them: start "
            "it by accelerate launch, or with CUDA_VISIBLE_DEVICES=0."
        )
    stage = stage_of_launcher()
    if stage is not None and recipe.launch.zero_stage not in (0, stage):
        raise UserError(
            f"launch.zero_stage is {recipe.launch.zero_stage}, but the launcher's configuration turns on ZeRO stage "
            f"{stage}, which would decide: set launch.zero_stage={stage}, or launch without that configuration."
        )
    plan = make_plan(recipe)
    if plan.conflicts:
        more = f" ({len(plan.conflicts)} conflicts in all: --dry-run lists them)" if len(plan.conflicts) > 1 else ""
        raise UserError(plan.conflicts[0] + more)
    for key in ("bf16", "fp16"):
        if recipe.training.get(key) and not torch.cuda.is_available():
            raise UserError(f"training.{key} is on, but there is no GPU here: leave it out, CPU runs are in float32.")
    return plan


def linear_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """By path, all but the head."""
    head = model.get_output_embeddings()
    return {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def adapted_modules(model: PreTrainedModel, recipe: Recipe) -> list[torch.nn.Module]:
    """Those that PEFT puts a LoRA on. Raises UserError for a target that is none, which PEFT leaves out silently, or
    refuses when it has the model."""
    named = recipe.lora.target_modules
    targets: list[tuple[str, Any]] = [(named, named)] if isinstance(named, str) else [(name, [name]) for name in named]
    if not named:
        raise UserError("lora.target_modules is empty: name modules, such as [q_proj, v_proj], or 'all-linear'.")
    linear = linear_modules(model)
    found: dict[str, torch.nn.Module] = {}
    for name, target in targets:
        config = LoraConfig(target_modules=target)
        try:
            own = {path: m for path, m in model.named_modules() if check_target_module_exists(config, path)}
        except re.error as error:
            raise UserError(f"lora.target_modules is {name!r}, and no regular expression: {error}.") from error
        if not own or not own.keys() <= linear.keys():
            known = {path.rpartition(".")[2] for path in linear}
            what = f"has no module '{name}'" if not own else f"has '{name}', on which no LoRA is put"
            raise UserError(
                f"lora.target_modules: {recipe.model.path} {what}: its linear ones are {', '.join(sorted(known))}."
            )
        found |= own
    return list(found.values())


def count_parameters(config: PreTrainedConfig, recipe: Recipe) -> Parameters:
    """Counted on the meta device."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise UserError(
                f"model.path: {recipe.model.path} is a '{config.model_type}', no causal language model."
            ) from error
        head = model.get_output_embeddings()
        linear = list(linear_modules(model).values())
        adapted: list[torch.nn.Module] = []
        if recipe.train == "lora":
            adapted = linear if recipe.lora.target_modules == "all-linear" else adapted_modules(model, recipe)
        if recipe.bridge is not None:
            attach_bridge(model, recipe.bridge)
    quantized = {m for m in linear if recipe.model.quantization is not None}
    total, new = model.num_parameters(), sum(p.numel() for _, p in bridge_parameters(model))
    lora = sum(recipe.lora.r * sum(m.weight.shape) for m in adapted)
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
    further = 0 if recipe.rollout.dynamic_sampling is None else recipe.rollout.dynamic_sampling.max_rounds
    most_tokens = b.rows_per_generation * (1 + further) * recipe.rollout.max_new_tokens
    lines = [
        f"model            {resolve_path(recipe.model.path)}",
        f"bridge           {bridge}",
        f"parameters       {base:,} base, {p.new:,} new ({p.new / base:.2%}), "
        f"{p.trained:,} trained (train={recipe.train})",
        f"groups           width {recipe.rollout.width}, {recipe.rollout.num_generations} completions a prompt",
        f"processes        {b.num_processes}, {describe_sharding(recipe, b.num_processes)}",
        f"generation batch {b.prompts_per_generation} prompts, {b.rows_per_generation} rows; "
        f"{b.groups_per_rank} groups a rank; serves {b.updates_per_generation:g} updates",
        f"micro-batch      {b.groups_per_micro_batch} groups, {b.rows_per_micro_batch} rows a rank; "
        f"{b.micro_batches_per_update} an update",
        f"tokens           at most {most_tokens:,} a generation batch",
        *describe_memory(recipe, plan),
        f"output           {recipe.output_dir}",
    ]
    notes = [f"conflict: {conflict}" for conflict in plan.conflicts]
    return "\n".join(lines + notes)


def describe_sharding(recipe: Recipe, num_processes: int) -> str:
    """What shards the run: a launcher's configuration goes before the recipe's stage."""
    planned = recipe.launch.zero_stage if num_processes > 1 else 0
    if not uses_deepspeed() and not uses_fsdp():
        unknown = num_processes > 1 and "WORLD_SIZE" not in os.environ
        return f"ZeRO stage {planned}" + (" unless the launcher's configuration has another" if unknown else "")
    stage = stage_of_launcher()
    shown = "FSDP" if uses_fsdp() else "ZeRO" if stage is None else f"ZeRO stage {stage}"
    note = "" if stage == planned else f"; memory is planned for ZeRO stage {planned}"
    return f"{shown} by the launcher's configuration{note}"


def describe_memory(recipe: Recipe, plan: Plan) -> list[str]:
    """The peak, what it assumes, and the terms of each phase at its largest moment (see `bridge_rl.memory`)."""
    budget, of_warmup = recipe.launch.gpu_memory_gb, [] if plan.warmup is None else plan.warmup.moments
    moments = {moment.phase: moment for moment in plan.memory.moments}
    moments |= {f"warm-up, {moment.phase}": moment for moment in of_warmup}
    peak = max(moment.total for moment in moments.values())
    device = (
        "GPU in bf16" if planned_for_gpu(recipe) else "CPU in float32, as no GPU is here or in launch.gpu_memory_gb"
    )
    prompts = str(plan.prompt)
    if plan.warmup is not None and plan.warmup_prompt != plan.prompt:
        prompts += f", in the warm-up {plan.warmup_prompt}"
    lines = [
        f"memory           about {peak / GIB:.2f} GiB"
        + (f" of {budget:g}" if budget else "")
        + f" on a {device}; prompts {prompts}, every row to its limit"
    ]
    column = 1 + max(map(len, moments))
    for phase, moment in moments.items():
        terms = sorted(moment.terms.items(), key=lambda term: -term[1])
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in terms if size >= GIB / 200)
        lines.append(f"  {phase + ':':{column}} {moment.total / GIB:6.2f} = {listed or 'below 0.01 each'}")
    if budget and plan.memory.peak / GIB > budget:
        lines.append("memory: the estimate is above launch.gpu_memory_gb: lower the micro-batch, lengths or max_rows.")
    if budget and plan.warmup is not None and plan.warmup.peak / GIB > budget:
        lines.append(
            "memory: the warm-up's estimate is above launch.gpu_memory_gb: lower warmup.groups_per_step, "
            "warmup.samples, warmup.max_new_tokens or rollout.max_rows."
        )
    return lines


def print_resolved(recipe: Recipe, plan: Plan) -> None:
    """What `--dry-run` shows: the resolved recipe, then the plan."""
    print(recipe.to_yaml())
    print(describe(recipe, plan))
