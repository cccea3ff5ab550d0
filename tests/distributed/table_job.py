"""Train the tiny recipe in every way of `ways`, one after another in one launch: `table_job.py DIRECTORY MODEL [NAME]`.

Each rank trains from the Bridge checkpoint MODEL by `bridge_rl.run.train`. `DIRECTORY/NAME` gets what the run saves and
`facts.json`, what the trainer really was. One process takes the ways whose name begins with `alone`, several take the
others; NAMEs choose among them.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import bridge_rl.run
import bridge_rl.run_options
from bridge_rl import guards
from bridge_rl.checkpoint import read_config
from bridge_rl.config import Recipe, load_recipe
from bridge_rl.run_options import device_arguments
from bridge_rl.surgery import BridgedLayer
from bridge_rl.trainer import BridgeGRPOTrainer

RECIPE = "recipes/tiny_arith.yaml"
STEPS = 2
ROWS = 32  # of an update, over all ranks
TRAINS = ("bridge", "lora", "full")
CHECKPOINTING = {"reentrant": True, "non-reentrant": False}
CONFIGS = {0: None, 2: "cpu_zero2", 3: "cpu_zero3"}
SCATTERED = ("bridge", "full")  # PEFT's adapters are gathered either way
RESUMED = ("fsdp2-bridge-reentrant", "fsdp2-lora-reentrant", "fsdp2-full-reentrant")  # after their first step
OFFLOADED = ("zero2_offload_optimizer", "zero3_offload_all")
OPTIONS = [
    "warmup=null",
    "data.eval=null",
    "rewards=[{function: tests/distributed/table_job.py:digits}]",
    "rollout.max_new_tokens=12",
    "lora.r=4",
    f"training.max_steps={STEPS}",
    "training.logging_steps=1",
    "training.save_strategy=steps",
    f"training.save_steps={STEPS}",
]


def digits(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    """A reward that differs between rows from the first step on, so that every advantage counts."""
    return [sum(token % 7 for token in row) / (7 * len(row)) for row in completion_ids]


@dataclass
class Way:
    """config: a file in launch/deepspeed that the launcher names; changes: to its content. fsdp: by fsdp2.yaml."""

    overrides: list[str]
    config: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    fsdp: bool = False


def ways() -> dict[str, Way]:
    """By name."""
    trained = {
        f"{train}-{name}": [
            f"train={train}",
            "training.gradient_checkpointing=true",
            f"training.gradient_checkpointing_kwargs={{use_reentrant: {str(reentrant).lower()}}}",
        ]
        for train in TRAINS
        for name, reentrant in CHECKPOINTING.items()
    }
    checkpointed = {
        f"zero{stage}-{name}": Way(overrides, CONFIGS[stage])
        for stage in CONFIGS
        for name, overrides in trained.items()
    }
    fsdp = {f"fsdp2-{name}": Way(overrides, fsdp=True) for name, overrides in trained.items()}
    alone = {f"alone-{train}": Way([f"train={train}"]) for train in TRAINS}
    by_recipe = {"zero1-full": Way(["train=full", "launch.zero_stage=1"])}
    # With torch's AdamW: DeepSpeed's for the CPU would be compiled first, for minutes.
    offloaded = {
        f"{name}-full": Way(["train=full"], name, {"zero_force_ds_cpu_optimizer": False}) for name in OFFLOADED
    }
    scattered = {
        f"zero3-{train}-scattered": Way(
            [f"train={train}"],
            "cpu_zero3",
            {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}},
        )
        for train in SCATTERED
    }
    return alone | checkpointed | by_recipe | offloaded | scattered | fsdp


class Probed(BridgeGRPOTrainer):
    """Records, of the first update, in which grad mode each layer runs: once without checkpointing, twice with."""

    grad_modes: list[bool] | None = None
    recorded: list[bool] | None = None

    def _compute_loss(self, *args, **kwargs):
        if self.recorded is None:
            self.grad_modes = []
        return super()._compute_loss(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        result = super().training_step(*args, **kwargs)  # forward and backward
        self.recorded, self.grad_modes = self.recorded or self.grad_modes, None
        return result

    def watch(self) -> None:
        first = next(module for module in self.model.modules() if isinstance(module, BridgedLayer))

        def record(*args: object) -> None:
            if self.grad_modes is not None:
                self.grad_modes.append(torch.is_grad_enabled())

        first.bridge.register_forward_pre_hook(record)

    def train(self, *args, **kwargs):
        self.watch()
        return super().train(*args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        if not _internal_call:  # after the last step
            facts = self.facts()
            if self.accelerator.is_main_process:
                Path(self.args.output_dir, "facts.json").write_text(json.dumps(facts))
        super().save_model(output_dir, _internal_call)

    def facts(self) -> dict:
        plugin = self.accelerator.state.deepspeed_plugin
        parameters = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        held = {name: held_elements(p) for name, p in parameters.items()}
        names = ("loss", "grad_norm", "reward")
        return {
            "distributed_type": self.accelerator.distributed_type.value,
            "num_processes": self.accelerator.num_processes,
            "zero_stage": None if plugin is None else plugin.zero_stage,
            "offload": None if plugin is None else plugin.deepspeed_config["zero_optimization"],
            "elements": sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values()),
            "elements_held": sum(held.values()),
            "optimizer_elements": optimizer_elements(self.optimizer),
            "trained_elements": sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values() if p.requires_grad),
            "grad_modes": self.recorded,
            "frozen": len([p for p in parameters.values() if not p.requires_grad]),
            "frozen_and_changed": self.changed(parameters),
            "steps": [{name: entry[name] for name in names} for entry in self.state.log_history if "loss" in entry],
        }

    def changed(self, parameters) -> list[str]:
        """Frozen parameters that are no longer, to the bit, those of the base."""
        base = load_file(Path(self.base, "model.safetensors"))
        weights = {name: whole(parameter) for name, parameter in parameters.items()}  # together with the other rank
        found = []
        for name, parameter in parameters.items():
            if parameter.requires_grad or ".original_module." in name:
                continue
            original = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if not torch.equal(weights[name], base[original]):
                found.append(name)
        return found


def held_elements(parameter) -> int:
    """Elements of the parameter that are on this rank now."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    if hasattr(parameter, "ds_tensor") and parameter.numel() == 0:
        return parameter.ds_tensor.numel()
    return parameter.numel()


def whole(parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return guards.whole(parameter).detach()


def optimizer_elements(optimizer) -> int:
    """Elements of AdamW's first moments on this rank."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return sum(held_elements(state["exp_avg"]) for state in optimizer.state.values())


def configure(way: Way, directory: Path) -> None:
    """Forget the run before, and say what `accelerate launch --config_file` would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    bridge_rl.run_options.device_arguments = device_arguments
    if way.fsdp:
        launched_by_fsdp2()
    if way.config is not None:
        file = Path(f"launch/deepspeed/{way.config}.json")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(changed(file, way.changes, directory))
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str("zero3" in way.config).lower()


def launched_by_fsdp2() -> None:
    """Say what `accelerate launch --config_file launch/accelerate/fsdp2.yaml` would, had it GPUs."""
    bridge_rl.run_options.device_arguments = fsdp_on_cpu
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for key, value in load_config_from_file("launch/accelerate/fsdp2.yaml").fsdp_config.items():
        os.environ[key.upper()] = str(value)


def fsdp_on_cpu(recipe: Recipe) -> dict[str, Any]:
    """Accelerate runs DDP where FSDP is asked for on CPU, unless it is told that the processes have accelerators."""
    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU
    return {**device_arguments(recipe), "accelerator_config": {"use_configured_state": True}}


def changed(file: Path, changes: dict[str, Any], directory: Path) -> Path:
    """The file, or a copy with the changes."""
    if not changes:
        return file
    content = json.loads(file.read_text())
    zero = content["zero_optimization"] | changes.get("zero_optimization", {})
    copy = directory / f"{file.stem}_{os.environ['RANK']}.json"
    copy.write_text(json.dumps(content | changes | {"zero_optimization": zero}))
    return copy


if __name__ == "__main__":
    directory, model, *names = Path(sys.argv[1]), *sys.argv[2:]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    bridge_rl.run.BridgeGRPOTrainer = Probed
    Probed.base = read_config(Path(model))["base"]
    Probed.end = lambda self: None  # which would close the process group
    if world > 1:
        dist.init_process_group("gloo")
    for name, way in ways().items():
        if name.startswith("alone") == (world == 1) and name in (names or ways()):
            configure(way, directory)
            output = [f"model.path={model}", f"output_dir={directory / name}"]
            rows = f"training.per_device_train_batch_size={ROWS // world}"
            options = [*OPTIONS, rows, *output, *way.overrides]
            if name in RESUMED:
                bridge_rl.run.train(load_recipe(RECIPE, [*options, "training.max_steps=1", "training.save_steps=1"]))
                configure(way, directory)
            bridge_rl.run.train(load_recipe(RECIPE, options))
    if world > 1:
        PartialState().wait_for_everyone()
        dist.destroy_process_group()
