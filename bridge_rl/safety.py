"""Combinations that would break groups, or an exact resume, without a sound: refused with the reason and the cure."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing import get_all_start_methods
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import StateDictType

from bridge_rl.errors import UserError

# (option, value that is safe, reason and cure)
_UNSAFE: tuple[tuple[str, Any, str], ...] = (
    ("use_vllm", False, "vLLM samples every row on its own, without its siblings: leave it off, the rollout is ours"),
    (
        "use_transformers_continuous_batching",
        False,
        "continuous batching gives siblings no common token step: leave it off, the rollout is ours",
    ),
    ("use_transformers_paged", False, "as continuous batching: leave it off, the rollout is ours"),
    (
        "mask_truncated_completions",
        False,
        "it hides cut rows from their siblings in the loss, which saw them while sampling: set "
        "rollout.mask_truncated=true instead",
    ),
    ("top_p", 1.0, "the training log-probs know the temperature only: set it to 1.0"),
    ("top_k", 0, "the training log-probs know the temperature only: set it to 0"),
    ("min_p", None, "the training log-probs know the temperature only: leave it out"),
    ("repetition_penalty", 1.0, "the training log-probs know the temperature only: set it to 1.0"),
    ("generation_kwargs", None, "the rollout is ours and does not read them: use the rollout section"),
    ("cache_implementation", None, "the rollout is ours and has a cache of its own: leave it out"),
    ("use_liger_kernel", False, "it replaces the layers' forward, in which the blocks sit: leave it off"),
    ("sync_ref_model", False, "the reference is the base itself, which does not move: leave it off"),
    (
        "load_best_model_at_end",
        False,
        "the best checkpoint would not be loaded back: leave it off and choose yourself",
    ),
    ("save_only_model", False, "no run could go on exactly from such a checkpoint: leave it off"),
    ("enable_jit_checkpoint", False, "SIGTERM saves by itself: leave it off"),
    (
        "push_to_hub",
        False,
        "it uploads all of output_dir, completions and logs too: leave it off, and upload the model with hf upload",
    ),
    ("save_on_each_node", False, "all ranks write into one directory: leave it off, and let the nodes share it"),
    (
        "dataloader_persistent_workers",
        False,
        "a resumed run would draw other numbers than one without a break: leave it off",
    ),
    ("remove_unused_columns", False, "rewards read the other columns of the data: leave it off"),
    ("ignore_data_skip", False, "a run that goes on would see problems again: leave it off"),
    ("auto_find_batch_size", False, "a smaller batch found at run time may split groups: set the batch size yourself"),
)


def conflicts(options: Mapping[str, Any], width: int) -> Iterator[str]:
    """One sentence for each of `options` (fields of GRPOConfig, those set) that would break groups of `width`."""
    for key, safe, reason in _UNSAFE:
        value = options.get(key, safe)
        if value != safe and not (safe in (None, False, 0) and not value):
            yield f"training.{key} is {value!r}: {reason}."
    accelerator = options.get("accelerator_config") or {}
    if isinstance(accelerator, str):
        yield f"training.accelerator_config is {accelerator!r}: write what is in that file into the recipe."
    else:
        chosen = accelerator if isinstance(accelerator, Mapping) else vars(accelerator)
        if chosen.get("split_batches"):
            yield "training.accelerator_config.split_batches is on: it cuts batches inside groups, leave it off."
        if chosen.get("dispatch_batches"):
            yield "training.accelerator_config.dispatch_batches is on: a batch is no tensors yet, leave it off."
    start = options.get("dataloader_multiprocessing_context")
    if start and not options.get("dataloader_num_workers"):
        yield "training.dataloader_multiprocessing_context is set without training.dataloader_num_workers: set both."
    if start and start not in get_all_start_methods():
        known = ", ".join(get_all_start_methods())
        yield f"training.dataloader_multiprocessing_context is {start!r}: this system has {known}."
    if options.get("fsdp"):
        yield "training.fsdp is set: leave it out, and launch with --config_file launch/accelerate/fsdp2.yaml."
    for key in ("per_device_train_batch_size", "num_generations"):
        value = options.get(key)
        if value is not None and value % width != 0:
            yield f"training.{key} is {value}, which splits groups: make it a multiple of the width {width}."


def hook_conflicts(options: Mapping[str, Any]) -> Iterator[str]:
    """The same, of those that fail on a model with blocks."""
    if options.get("debug"):
        yield (
            f"training.debug is {options['debug']!r}: transformers' hooks fail at what the blocks are given "
            "(which rows are alive, no numbers): leave it out, guards.max_skipped names gradients that are not finite."
        )


def check_safe(options: Mapping[str, Any], width: int) -> None:
    """Raise UserError with the first of `conflicts`, and for no width."""
    if width < 1:
        raise UserError(f"width is {width}: it must be at least 1.")
    for conflict in conflicts(options, width):
        raise UserError(conflict)


# (field of accelerate's plugin, value that is tested, key in the launcher's file, what to write there)
_FSDP = (
    ("fsdp_version", 2, "fsdp_version", "2"),
    ("state_dict_type", StateDictType.FULL_STATE_DICT, "fsdp_state_dict_type", "FULL_STATE_DICT"),
    ("cpu_ram_efficient_loading", False, "fsdp_cpu_ram_efficient_loading", "false"),
    (
        "activation_checkpointing",
        False,
        "fsdp_activation_checkpointing",
        "false (training.gradient_checkpointing is ours)",
    ),
)


def check_fsdp(accelerator: Accelerator) -> None:
    """Raise UserError for a launch under FSDP whose checkpoints or weights would not be whole, or that is none."""
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            "The launcher asks for FSDP, but accelerate would run without it, as it does on CPU and in one process: "
            "launch with launch/accelerate/cpu_ddp.yaml, or without a configuration."
        )
    for name, tested, key, cure in _FSDP:
        value = getattr(accelerator.state.fsdp_plugin, name)
        if value != tested:
            raise UserError(f"The launcher's {key} is {value}: set it to {cure}, as launch/accelerate/fsdp2.yaml does.")


def keep_outputs(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let a model under FSDP2 return what it computes: accelerate's policy for bf16 would round log-probs to bf16."""
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
