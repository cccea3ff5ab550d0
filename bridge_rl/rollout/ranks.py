"""Ranks that hold shards of one model: each forward pass is a collective, so all must run equally many."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

from bridge_rl.rollout.decode import siblings
from bridge_rl.surgery import has_bridge


class Ranks:
    """Keeps the ranks together where the model is sharded; elsewhere each is on its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.together = is_sharded(model)

    def any_has_work(self, mine: bool) -> bool:
        """Whether to run another forward pass: as long as one rank needs it."""
        if not self.together:
            return mine
        flag = torch.tensor(int(mine), device=self.model.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def idle_forward(self) -> None:
        """Take part in a pass that only other ranks need, with one token that is alone."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        # Left out, it would be made for groups of the model's own width, which one row is not.
        alone = torch.ones(1, 1, 1, dtype=torch.bool, device=token.device)
        self.model(input_ids=token, use_cache=False, **siblings(has_bridge(self.model), alone))


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass collects parameters from other ranks: FSDP 1 and 2, and ZeRO-3 unless all are gathered.

    It does not see DeepSpeed's hooks, which would scatter gathered parameters again: they must be gone by then, as in
    TRL's `unwrap_model_for_generation`.
    """
    if any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in model.modules()):
        return True
    return any(_is_partitioned(parameter) for parameter in model.parameters())


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """By ZeRO-3, whose parameters are empty while they are not gathered."""
    return hasattr(parameter, "ds_shape") and parameter.numel() != parameter.ds_numel
