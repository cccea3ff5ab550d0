"""What is refused of a recipe before anything is computed: each conflict is a sentence with its cure.

Those of `safety`, `update` and `checkpoint` are refused by the trainer as well, of whoever makes one.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch.utils.checkpoint
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PreTrainedConfig
from transformers.training_args import trainer_log_levels
from trl import GRPOConfig

from bridge_rl import safety
from bridge_rl.checkpoint import is_bridge_checkpoint, other_model, read_config
from bridge_rl.config import DataSource, Recipe
from bridge_rl.data import check_path, unread_keys
from bridge_rl.errors import UserError
from bridge_rl.models import adapter_conflict, quantization_config, resolve_path
from bridge_rl.report import names
from bridge_rl.reward_functions import load_reward
from bridge_rl.rollout.request import known_positions
from bridge_rl.typed_yaml import nearest
from bridge_rl.update import part_conflicts

if TYPE_CHECKING:
    from bridge_rl.plan import Batches

# Fields of GRPOConfig that another section of the recipe decides, or what is not in a recipe.
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
    "project": "logging.project",
    "data_seed": "seed",
    "per_device_eval_batch_size": "evaluation.max_rows",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "num_generations_eval": "evaluation.widths",
    "hub_token": "the environment's HF_TOKEN or `hf auth login` (the recipe is saved with the run)",
    "deepspeed": "accelerate launch --config_file launch/accelerate/zero3.yaml",
}
# Fields that nothing reads here: of other samplers, of TRL's evaluation loop, of losses by labels, of vLLM.
WITHOUT_EFFECT = re.compile(
    "train_sampling_strategy|length_column_name|eval_accumulation_steps|eval_do_concat_batches|eval_use_gather_object"
    "|prediction_loss_only|batch_eval_metrics|include_for_metrics|(bf16|fp16)_full_eval|label_names"
    "|label_smoothing_factor|max_tool_calling_iterations|ref_model_.*|vllm_.*"
)
LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "generation_batch_size": 1,
    "num_iterations": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
}
# Values that TRL reads in the first step only, long after the warm-up.
CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "log_level": tuple(trainer_log_levels),
    "log_level_replica": tuple(trainer_log_levels),
}
INT8_KL = 0.05  # nats a token, above what int8 was measured to have
_DROPOUT = ("attention_dropout", "resid_pdrop")  # what the layers of the served families apply in training


def check_types(recipe: Recipe) -> None:
    """Raise UserError for a value of `training` that GRPOConfig declares to be something else."""
    for key, value in recipe.training.items():
        if key in MANAGED or key not in type_hints() or key in CHOICES:
            continue
        hint = type_hints()[key]
        config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        try:
            TypeAdapter(hint, config=config).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = f"of type {getattr(hint, '__name__', None) if isinstance(hint, type) else hint}"
            if any(found["type"] == "finite_number" for found in error.errors()):
                wanted = "a finite number"
            raise UserError(f"training.{key} is {value!r}: it must be {wanted}.") from error
        if key in LEAST and value is not None and value < LEAST[key]:
            raise UserError(f"training.{key} is {value}: it must be at least {LEAST[key]}.")
        if key == "top_entropy_quantile" and not 0 <= value <= 1:
            raise UserError(f"training.{key} is {value}: it is a share of the tokens, from 0 to 1.")


@cache
def type_hints() -> dict[str, Any]:
    """Types of GRPOConfig's fields by name."""
    return get_type_hints(GRPOConfig)


def find_conflicts(recipe: Recipe, config: PreTrainedConfig, batches: "Batches", tied: bool) -> Iterator[str]:
    """Every conflict of a recipe whose types have been checked. `config`: of the base; `tied`: as `mode_conflicts`."""
    yield from unknown_options(recipe)
    yield from safety.conflicts({"per_device_train_batch_size": 8, **recipe.training}, recipe.rollout.width)
    yield from checkpointing_conflicts(recipe)
    yield from batch_conflicts(recipe, batches)
    yield from file_conflicts(recipe)
    yield from reward_conflicts(recipe)
    yield from guard_conflicts(recipe, config)
    yield from evaluation_conflicts(recipe)
    yield from metric_conflicts(recipe)
    yield from part_conflicts(recipe.training, config, recipe.update)
    yield from router_conflicts(recipe, config)
    yield from checkpoint_conflicts(recipe)
    yield from output_conflicts(recipe)
    yield from mode_conflicts(recipe, tied)
    yield from quantization_conflicts(recipe)
    yield from position_conflicts(recipe, config)


def router_conflicts(recipe: Recipe, config: PreTrainedConfig) -> Iterator[str]:
    coefficient = recipe.training.get("router_aux_loss_coef")
    if coefficient and not hasattr(config.get_text_config(), "output_router_logits"):
        yield f"training.router_aux_loss_coef is {coefficient}, but {config.model_type} has no experts: leave it out."


def unknown_options(recipe: Recipe) -> Iterator[str]:
    """Keys of `training` that GRPOConfig does not have, that do nothing, or that another section decides."""
    known = {f.name for f in fields(GRPOConfig) if f.init}
    for key in recipe.training:
        if key in MANAGED:
            yield f"training.{key} is decided elsewhere: use {MANAGED[key]}."
        elif key not in known:
            near = difflib.get_close_matches(key.lower(), known, 1)
            yield f"unknown key 'training.{key}'" + (f": did you mean '{near[0]}'?" if near else ".")
        elif WITHOUT_EFFECT.fullmatch(key):
            yield f"training.{key} has no effect here: leave it out."
        elif key in CHOICES and recipe.training[key] not in CHOICES[key]:
            yield f"training.{key} is {recipe.training[key]!r}: use one of {', '.join(map(str, CHOICES[key]))}."


def checkpointing_conflicts(recipe: Recipe) -> Iterator[str]:
    """Options of torch's checkpoints, which torch reads in the first update."""
    known = sorted(signature(torch.utils.checkpoint.checkpoint).parameters.keys() - {"function", "args", "kwargs"})
    for key in recipe.training.get("gradient_checkpointing_kwargs") or {}:
        if key not in known:
            yield f"unknown key 'training.gradient_checkpointing_kwargs.{key}'{nearest(key, known)}"


def batch_conflicts(recipe: Recipe, batches: "Batches") -> Iterator[str]:
    if batches.rows_per_generation % recipe.rollout.num_generations != 0:
        yield (
            f"a generation batch of {batches.rows_per_generation} rows (per_device_train_batch_size x "
            f"gradient_accumulation_steps x {batches.num_processes} processes) is no multiple of "
            f"rollout.num_generations {recipe.rollout.num_generations}: change training.per_device_train_batch_size."
        )


def file_conflicts(recipe: Recipe) -> Iterator[str]:
    """Files and functions that the recipe names and that are not there."""
    for number, section in enumerate(recipe.rewards):
        try:
            load_reward(section, number)
        except UserError as error:
            yield str(error)
    sources = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    if recipe.warmup is not None:
        sources["warmup.data"] = recipe.warmup.data
    for key, source in sources.items():
        if source is not None:
            yield from source_conflicts(source, key)
    output = Path(recipe.output_dir)
    if output.exists() and not output.is_dir():
        yield f"output_dir: {output} is a file: name a directory."


def reward_conflicts(recipe: Recipe) -> Iterator[str]:
    first = recipe.rewards[0].function
    for number, section in enumerate(recipe.rewards):
        alone = section.function == "rewards/set_aware.py:sole_solver" and "judge" not in section.kwargs
        if alone and first != "rewards/answer.py:correct":
            yield (
                f"rewards.{number}: sole_solver judges by rewards/answer.py:correct unless told otherwise, but the "
                f"first reward is {first}: give it kwargs: {{judge: '{first}'}}."
            )


def source_conflicts(source: DataSource, key: str) -> Iterator[str]:
    """What is wrong with a source as far as it shows without reading the data."""
    try:
        check_path(source, key)
    except UserError as error:
        yield str(error)
    yield from unread_keys(source, key)
    if source.size is not None and source.size < 1:
        yield f"{key}.size is {source.size}: it must be at least 1."
    try:
        if source.answer_pattern is not None and re.compile(source.answer_pattern).groups < 1:
            yield f"{key}.answer_pattern is {source.answer_pattern!r}: put the answer's place in parentheses."
    except re.error as error:
        yield f"{key}.answer_pattern is {source.answer_pattern!r}, no regular expression: {error}."


def guard_conflicts(recipe: Recipe, config: PreTrainedConfig) -> Iterator[str]:
    """Where training computes other log-probs than the rollout by intent, so that `max_rollout_kl` would end the run.

    `config`: of the base.
    """
    if recipe.guards.max_rollout_kl is None:
        return
    sentence = "training with dropout computes other log-probs than the rollout, so the guard cannot tell"
    # TRL's `disable_dropout` reaches modules (LoRA's, Phi's), not the attention's.
    off, text = bool(recipe.training.get("disable_dropout")), config.get_text_config()
    active = [key for key in _DROPOUT if getattr(text, key, None) and not (off and key == "resid_pdrop")]
    if recipe.train == "lora" and recipe.lora.dropout > 0 and not off:
        yield (
            f"lora.dropout is {recipe.lora.dropout:g}: {sentence}, set guards.max_rollout_kl=null or lora.dropout=0."
        )
    for key in active:
        yield (
            f"model.path: the base's {key} is {getattr(text, key):g}: {sentence}, set guards.max_rollout_kl=null or "
            f"{key} to 0 in its config.json."
        )
    if recipe.training.get("neftune_noise_alpha"):
        yield (
            "training.neftune_noise_alpha is set: training with noise computes other log-probs than the rollout, so "
            "the guard cannot tell, set guards.max_rollout_kl=null or leave the noise out."
        )
    if recipe.model.quantization == "int8" and recipe.guards.max_rollout_kl < INT8_KL:
        yield (
            "model.quantization is int8, which rounds activations by the batch, so that training's log-probs differ "
            "from the rollout's (by a KL of 0.02 for SmolLM2-135M, and guards.max_rollout_kl is "
            f"{recipe.guards.max_rollout_kl:g}): set guards.max_rollout_kl=0.1 or null, or model.quantization=nf4."
        )


def evaluation_conflicts(recipe: Recipe) -> Iterator[str]:
    if recipe.evaluation.every is not None and recipe.data.eval is None:
        yield (
            f"evaluation.every is {recipe.evaluation.every}, but data.eval is null, so nothing is evaluated: name "
            "held-out problems there, or set evaluation.every=null."
        )


def metric_conflicts(recipe: Recipe) -> Iterator[str]:
    """What a run is to follow or keep the best of must be measured while it trains: transformers looks late."""
    training, section = recipe.training, recipe.evaluation
    metric = training.get("metric_for_best_model")
    if metric is None and training.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
        metric = "loss"  # transformers' own
    if metric is None:
        if training.get("save_strategy") == "best":
            yield "training.save_strategy is best without training.metric_for_best_model: name the metric there."
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


def output_conflicts(recipe: Recipe) -> Iterator[str]:
    """What the trained model may not be saved beside, or over."""
    output, base = Path(recipe.output_dir), Path(resolve_path(recipe.model.path))
    if problem := other_model(output, recipe.train, recipe.bridge is not None):
        yield problem
    if recipe.train == "full" and base.resolve() == output.resolve():
        yield f"output_dir is model.path, {base}, with train=full: the run would write over its base, set another one."


def mode_conflicts(recipe: Recipe, tied: bool) -> Iterator[str]:
    """Options that do not go with what is trained. `tied`: whether the embedding is the head."""
    if recipe.train == "lora" and recipe.training.get("cast_lm_head_to_fp32") and tied:
        yield "training.cast_lm_head_to_fp32 with train=lora: TRL cannot where the embedding is the head, leave it."
    if recipe.bridge is not None:
        yield from safety.hook_conflicts(recipe.training)
    own_base = recipe.model.gguf_file or recipe.model.revision or is_bridge_checkpoint(resolve_path(recipe.model.path))
    if recipe.train == "full" and recipe.training.get("beta") and own_base:
        yield (
            "training.beta with train=full loads a second model as reference, and cannot from GGUF, a revision or a "
            "checkpoint with a Bridge: set beta=0, or train=bridge or lora."
        )


def quantization_conflicts(recipe: Recipe) -> Iterator[str]:
    """A base in 8 or 4 bits has no gradients, and has not been tried in shards."""
    if recipe.model.quantization is None:
        return
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


def position_conflicts(recipe: Recipe, config: PreTrainedConfig) -> Iterator[str]:
    longest = known_positions(config)
    for name in ("rollout", "warmup", "evaluation"):
        limit = getattr(getattr(recipe, name), "max_new_tokens", None)
        if longest is not None and limit is not None and limit >= longest:
            yield (
                f"{name}.max_new_tokens is {limit}, but the model knows {longest} positions, prompt included: lower it."
            )
