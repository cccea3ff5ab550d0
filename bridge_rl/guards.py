"""What ends a run that has gone wrong, before the update that would spoil it, with the batch kept for inspection.

A loss that is not finite makes the gradients so (`poison`). The norm of the gradients, which is computed in any case,
is then not finite on every rank, so that all decide alike without asking each other.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from bridge_rl.config import GuardsSection
from bridge_rl.errors import UserError, is_failed_write

if TYPE_CHECKING:
    from bridge_rl.trainer import BridgeGRPOTrainer

NORM, KL = "gradient norm", "rollout KL"  # what was checked


class Halted(Exception):  # noqa: N818
    """Raised on all ranks before an update that a guard forbids. `args[0]` says why, and where the batch is."""


def poison(loss: Tensor) -> Tensor:
    """The loss, bit for bit; one that is not finite has gradients that are not finite either."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


def clip_finite(model: nn.Module, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, except that gradients whose norm is not finite are left for inspection."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if whole(norm).isfinite():
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def whole(x: Tensor) -> Tensor:
    """Of all ranks, where FSDP has each hold a shard."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are not finite; none under ZeRO, which has dropped them."""
    return [name for name, p in model.named_parameters() if p.grad is not None and not whole(p.grad.isfinite().all())]


class Guards(TrainerCallback):
    """Watches the micro-batches of an optimizer step; skips the step, or ends the run."""

    def __init__(self, trainer: "BridgeGRPOTrainer", options: GuardsSection) -> None:
        self.trainer, self.options = trainer, options
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._start_step()

    def _start_step(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []  # of each part of each micro-batch

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """ZeRO-3 looks at the norm always, ZeRO-1 and -2 in bf16 only if told to."""
        optimizer: Any = getattr(self.trainer.model_wrapped, "optimizer", None)
        if self.options.max_skipped is not None and hasattr(optimizer, "check_grad_overflow"):
            optimizer.check_grad_overflow = True

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start_step()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._start_step()

    @property
    def in_charge(self) -> bool:
        """Whether it leaves out updates itself. DeepSpeed has by the time it tells the norm; fp16's scaler does so to
        find its scale."""
        trainer = self.trainer
        return self.options.max_skipped is not None and not (trainer.is_deepspeed_enabled or trainer.args.fp16)

    def watch_loss(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.detach())
        return loss if self.options.max_skipped is None else poison(loss)

    def check_kl(self, kl: float) -> None:
        """`kl`: nats a token, of all ranks. Raises Halted. One that is not a number is left to the gradient."""
        limit = self.options.max_rollout_kl
        if limit is not None and kl > limit:
            batch = self._save(KL, kl, [])
            raise Halted(
                f"training computes other log-probs than the rollout did, by a KL of {kl:.3g} nats a token "
                f"(guards.max_rollout_kl is {limit:g}), so what would be trained (siblings, masks, weights or their "
                f"precision) is not what was sampled: step {self._step} was not taken, its batch {batch}"
            )

    def skips(self, model: nn.Module, norm: Tensor | float | None) -> bool:
        """Whether this update is to be left out, told from the norm of its gradients. Raises Halted at the limit."""
        limit = self.options.max_skipped
        if limit is None or norm is None or self.trainer.args.fp16:
            return False
        value = float(whole(norm) if isinstance(norm, Tensor) else norm)  # waits for the gradients, once an update
        if torch.tensor(value).isfinite():
            self.skipped_in_a_row = 0
            return False
        self.skipped += 1
        self.skipped_in_a_row += 1
        batch = self._save(NORM, value, not_finite(model))
        if self.trainer.is_deepspeed_enabled and not self.trainer.accelerator.optimizer_step_was_skipped:
            raise UserError(
                f"DeepSpeed has taken step {self._step} with a gradient that is not finite (its batch {batch}): "
                "use ZeRO-1, -2 or -3, which leave such steps out, and go on from the checkpoint before."
            )
        if self.skipped_in_a_row >= limit:
            raise Halted(
                f"loss or gradient was not finite in {limit} update(s) in a row (guards.max_skipped): none of them was "
                f"applied, the batch of the last, step {self._step}, {batch}"
            )
        return True

    @property
    def _step(self) -> int:
        """Of the update that is being computed, counted from 1."""
        return self.trainer.state.global_step + 1

    def _save(self, check: str, value: float, parameters: list[str]) -> str:
        """Write what this rank knows of the step, and say where; of such files the newest are kept, as many as
        `max_skipped`. A full disk must not end this rank alone: the others wait for it at the next checkpoint."""
        folder = Path(self.trainer.args.output_dir) / "guards"
        rank = self.trainer.args.process_index
        path = folder / f"step_{self._step:06d}_rank_{rank}.pt"
        content = {
            "step": self._step,
            "rank": rank,
            "check": check,
            "value": value,
            "losses": self.losses,
            "parameters": parameters,
            "batches": self.batches,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(send_to_device(content, "cpu"), path)
        except (OSError, RuntimeError) as error:
            if not is_failed_write(error):
                raise
            path.unlink(missing_ok=True)  # half of it
            return "could not be kept (disk full)"
        for old in sorted(folder.glob(f"step_*_rank_{rank}.pt"))[: -(self.options.max_skipped or 1)]:
            old.unlink()
        return f"is in {path}"
