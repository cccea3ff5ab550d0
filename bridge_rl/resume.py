"""What a rank must save beside model, optimizer, scheduler and RNG so that a resumed run is the run itself."""

import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from bridge_rl.errors import UserError
from bridge_rl.run_checkpoints import step_of

if TYPE_CHECKING:
    from bridge_rl.trainer import BridgeGRPOTrainer

# Numbers of the trainer and of its state that have no place in transformers' checkpoints, or change inside a step.
OF_TRAINER = (
    "_step",
    "_sampled_at",
    "_total_loss_scalar",
    "_initial_global_step",
    "_globalstep_last_logged",
    "_current_train_step_time",
    "current_flos",
    "entropy_coef",
    "_last_world_entropy",
    "_entropy_window_stats",
)
OF_STATE = ("num_input_tokens_seen", "total_flos")
# What a generation batch is made of.
OF_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")


def capture(trainer: "BridgeGRPOTrainer") -> dict[str, Any]:
    """This rank's place in its generation batch, and what it has measured and not logged yet."""
    args = trainer.args
    return {
        "generation_batch": [getattr(args, name) for name in OF_BATCH],
        "buffered_inputs": trainer._buffered_inputs,
        "trainer": {name: getattr(trainer, name) for name in OF_TRAINER},
        "state": {name: getattr(trainer.state, name) for name in OF_STATE},
        "loss": trainer._tr_loss.clone(),
        "metrics": _plain(trainer._metrics),
        "completions": _plain(trainer._logs) if trainer.log_completions else None,
        "meter": trainer._meter.state(),
        "guards": trainer._guards.state(),
        "evaluation_due": trainer._resume.evaluation_due,
    }


def restore(trainer: "BridgeGRPOTrainer", saved: dict[str, Any]) -> None:
    """Undo everything since `capture`, in this process or in one that is gone.

    Raises UserError if a generation batch is made of other batches now, or another version of bridge_rl saved it.
    """
    now = capture(trainer)
    if saved.keys() != now.keys():
        different = ", ".join(sorted(saved.keys() ^ now.keys()))
        raise UserError(
            f"{trainer._resume.checkpoint} was written by another version of bridge_rl (they differ in {different}): "
            "go on with that version, or set another output_dir."
        )
    if saved["generation_batch"] != now["generation_batch"]:
        raise UserError(
            f"training: {', '.join(OF_BATCH)} are {now['generation_batch']}, and in the checkpoint "
            f"{saved['generation_batch']}, perhaps in the middle of a generation batch: set them back, or another "
            "output_dir."
        )
    waiting = saved["buffered_inputs"]
    if waiting and trainer.beta != 0.0 and "ref_per_token_logps" not in waiting[0]:
        raise UserError(
            f"training.beta is {trainer.beta:g}, and the completions that wait in the checkpoint have no log-probs of "
            "a reference: set it back to 0, or another output_dir."
        )
    trainer._buffered_inputs = waiting
    for name, value in saved["trainer"].items():
        setattr(trainer, name, value)
    for name, value in saved["state"].items():
        setattr(trainer.state, name, value)
    trainer._tr_loss = saved["loss"].to(trainer.args.device)
    for mode, metrics in saved["metrics"].items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update(metrics)
    if saved["completions"] is not None:
        _refill(trainer._logs, saved["completions"])
    trainer._meter.restore(saved["meter"])
    trainer._guards.restore(saved["guards"])


def _refill(columns: dict[str, Any], saved: dict[str, Any]) -> None:
    """Fill TRL's bounded columns, some of which are a level down."""
    for name, content in saved.items():
        if isinstance(content, dict):
            columns[name].clear()
            _refill(columns[name], content)
        else:
            columns[name].clear()
            columns[name].extend(content)


def _plain(value: Any) -> Any:
    """A copy in types that `torch.load` reads without running code. Raises UserError for others, which rewards log."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    raise UserError(
        f"A reward logs {value!r}, a {type(value).__name__}, beside its completions: log text or numbers, which a "
        "checkpoint can hold."
    )


class TrainingComplete(Exception):  # noqa: N818
    """Raised when the checkpoint is that of the last step, after which transformers would take one more."""


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"rollout_state_{rank}.pt"


class Resume(TrainerCallback):
    """Puts a rank back to a checkpoint when training begins, and to the beginning of a step that is given up."""

    def __init__(self, trainer: "BridgeGRPOTrainer") -> None:
        self.trainer = trainer
        self.checkpoint: Path | None = None
        self.evaluation_due = False
        self.at_step_begin: tuple[dict[str, Any], dict[str, Any]] | None = None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(capture(self.trainer), file_of(folder, self.trainer.args.process_index))

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After transformers has loaded its part and set its counters to zero."""
        if self.checkpoint is not None:
            state.compute_steps(args, state.max_steps)  # those of before came with the checkpoint
            path = file_of(self.checkpoint, self.trainer.args.process_index)
            # In two steps: torch does not load to the device `cpu:0`, which accelerate gives a rank.
            saved = send_to_device(torch.load(path, map_location="cpu", weights_only=True), self.trainer.args.device)
            restore(self.trainer, saved)
            at_start = state.global_step == 0 and args.eval_on_start  # transformers evaluates next
            # With all that transformers does behind one; the checkpoint is there already.
            if saved["evaluation_due"] and not at_start:
                metrics = self.trainer._evaluate(None, None)
                self.trainer._determine_best_metric(metrics, None)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise TrainingComplete
        if self.checkpoint is not None and step_of(self.checkpoint) == state.global_step:
            self.trainer._load_rng_state(str(self.checkpoint))  # as transformers does next
        self.rng_before_epoch = rng_state()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """The data of an epoch draw once from the global generators, in a resumed run as well: its first step is
        taken back to before that."""
        is_first = float(state.epoch or 0).is_integer()
        self.at_step_begin = capture(self.trainer), self.rng_before_epoch if is_first else rng_state()

    def rewind(self) -> None:
        """Back to the beginning of the present optimizer step."""
        assert self.at_step_begin is not None
        saved, rng = self.at_step_begin
        restore(self.trainer, saved)
        set_rng_state(rng)


def rng_state() -> dict[str, Any]:
    """Of every global generator that transformers saves."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def checkpoint_bytes(trainer: "BridgeGRPOTrainer") -> int:
    """About how much a checkpoint takes over all ranks: weights, optimizer state, buffered completions."""
    model, ranks = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.num_processes
    parameters = [(getattr(p, "ds_numel", p.numel()), p) for p in model.parameters()]
    trained = sum(n for n, p in parameters if p.requires_grad)
    saved = sum(n * p.element_size() for n, p in parameters if trainer.train_mode == "full" or p.requires_grad)
    if trainer.is_deepspeed_enabled:  # its own copy of all weights, a float32 master and two moments
        saved += sum(n * p.element_size() for n, p in parameters) + (4 + 4 + 4) * trained
    else:
        states = [state.values() for state in trainer.optimizer.state.values()]
        saved += _tensor_bytes(list(map(list, states)))
    return saved + ranks * _tensor_bytes(trainer._buffered_inputs)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return _tensor_bytes(list(value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0
