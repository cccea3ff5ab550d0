"""What a recipe asks of the libraries: the options of TRL's trainer, of the warm-up's, of LoRA and of DeepSpeed."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments, get_scheduler
from trl import GRPOConfig

from bridge_rl.config import Recipe
from bridge_rl.errors import UserError
from bridge_rl.evaluation.run import PATIENCE
from bridge_rl.models import uses_deepspeed, uses_fsdp
from bridge_rl.report.tracking import trackers
from bridge_rl.run_directory import warmup_directory
from bridge_rl.user_code import find_file


def prepare_distributed(recipe: Recipe) -> None:
    """Turn DeepSpeed on where the recipe asks for it and the launcher did not, in the launcher's own words.

    On CPU, keep DeepSpeed from compiling its shared-memory operator, which takes minutes and is not used.
    """
    stage = recipe.launch.zero_stage
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if stage > 0 and not uses_deepspeed() and not uses_fsdp():
        file = find_file(recipe.launch.deepspeed_config)
        if file is None:
            raise UserError(
                f"launch.zero_stage is {stage}, and {recipe.launch.deepspeed_config} is not here: start the run in a "
                "clone of the repository, or let accelerate's configuration turn DeepSpeed on."
            )
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(stage == 3).lower()
    elif uses_deepspeed() and (file := find_file(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))) is not None:
        # launch/accelerate names launch/deepspeed, which is there in the clone's root only.
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
    if uses_deepspeed() and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def stage_of_launcher() -> int | None:
    """ZeRO's stage under a launcher that has turned DeepSpeed on; None where none has, or where
    its file does not say it or is not here.
    """
    if not uses_deepspeed():
        return None
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named == "none":
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))  # accelerate's own default
    file = find_file(named)
    if file is None:
        return None
    try:
        stage = json.loads(file.read_text())["zero_optimization"]["stage"]
    except (ValueError, KeyError, TypeError):  # which accelerate will say, or fill in
        return None
    return stage if isinstance(stage, int) else None


def device_arguments(recipe: Recipe) -> dict[str, Any]:
    """Where and in what precision to run: bf16 on a GPU, fp32 on CPU (over gloo with several processes).

    A process has one precision: the warm-up's is that of the run after it.
    """
    if torch.cuda.is_available():
        fp16 = bool(recipe.training.get("fp16"))
        return {"bf16": recipe.training.get("bf16", not fp16), "fp16": fp16}
    if uses_deepspeed():
        # With use_cpu accelerate would believe in a world of one process.
        return {"bf16": False, "use_cpu": False, "ddp_backend": "gloo"}
    return {"bf16": False, "use_cpu": True}


def training_arguments(recipe: Recipe) -> GRPOConfig:
    """TRL's configuration: the recipe's `training` section beside what other sections decide."""
    rollout = recipe.rollout
    evaluating = recipe.data.eval is not None and recipe.evaluation.every is not None
    options = {
        "num_generations": rollout.num_generations,
        "max_completion_length": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "reward_weights": [section.weight for section in recipe.rewards],
        "seed": recipe.seed,
        "output_dir": recipe.output_dir,
        "run_name": recipe.logging.name or Path(recipe.output_dir).name,
        "project": recipe.logging.project,
        "eval_strategy": "steps" if evaluating else "no",
        "eval_steps": recipe.evaluation.every if evaluating else None,
        "per_device_eval_batch_size": rollout.num_generations,  # of TRL's evaluation loop, which ours replaces
        "log_completions": recipe.logging.wandb != "off",  # the dashboard's table
        "num_completions_to_print": 0,
        "ddp_timeout": int(PATIENCE.total_seconds()),
        "disable_tqdm": True,  # our own bar shows the reward
        "ddp_find_unused_parameters": False,
    }
    decided = {"report_to": trackers(recipe), **device_arguments(recipe)}
    try:
        return GRPOConfig(**{**options, **recipe.training, **decided})
    except (ValueError, TypeError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error


def warmup_arguments(recipe: Recipe) -> TrainingArguments:
    """Of the warm-up's SFT, which saves every tenth of its steps if the run saves any."""
    section = recipe.warmup
    assert section is not None
    return TrainingArguments(
        output_dir=str(warmup_directory(recipe) / "trainer"),
        max_steps=section.steps,
        per_device_train_batch_size=section.groups_per_step,
        learning_rate=section.learning_rate,
        lr_scheduler_type="cosine",
        logging_steps=max(1, section.steps // 20),
        save_strategy="no" if recipe.training.get("save_strategy") == "no" else "steps",
        save_steps=max(1, section.steps // 10),
        report_to=[],
        seed=recipe.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        gradient_checkpointing=recipe.training.get("gradient_checkpointing", True),
        **device_arguments(recipe),
    )


def check_optimizer(args: GRPOConfig) -> None:
    """Raise UserError, before anything is computed, for an optimizer or a schedule that could not be made later."""
    if args.optim_args and any(part.count("=") != 1 for part in args.optim_args.split(",")):
        raise UserError(
            f"training.optim_args is {args.optim_args!r}: write key=value, several with commas between them."
        )
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise UserError(f"training.optim is {args.optim.value}: {' '.join(str(error).split())}") from error
    except ValueError:  # of those that need the model
        cls, options = torch.optim.AdamW, {"lr": args.learning_rate}
    if cls.__module__.startswith("torch.optim."):
        try:
            cls([torch.nn.Parameter(torch.zeros(1))], **options)
        except ValueError as error:
            raise UserError(f"training.learning_rate or training.adam_*: {error}.") from error
    schedule = args.lr_scheduler_type
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], args.learning_rate)
    try:
        get_scheduler(schedule, optimizer, 0, 10, args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"training.lr_scheduler_type is {schedule.value} with training.lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}: {' '.join(str(error).split())}"
        ) from error


def lora_config(recipe: Recipe) -> LoraConfig:
    """LoRA on the base; the blocks are trained in full and kept free of it."""
    return LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_modules,
        modules_to_save=["bridge"] if recipe.bridge is not None else None,
        task_type="CAUSAL_LM",
    )
