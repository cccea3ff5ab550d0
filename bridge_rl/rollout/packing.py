"""Weights in the layout that oneDNN multiplies from, for the time of a rollout on CPU.

A decode step multiplies few rows by every weight, and on CPU most of its time goes into bringing the weights into the
layout of the product, again in each step. Packed once they take a second copy in memory for as long as the rollout
runs; the next rollout packs anew, so that they are never older than the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch
from torch import Tensor, nn

# Weights that are fewer, all together, stay in the processor's cache.
LEAST_ELEMENTS = 2**22
# The layout pads sides that are shorter, as LoRA's are.
LEAST_SIDE = 64
# Share of the free memory that the copies may take.
MEMORY_SHARE = 0.25


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a model on CPU multiply from packed copies of their weights, where these fit."""
    layers = packable(model)
    copies = sum(layer.weight.nbytes for layer in layers)
    if copies > MEMORY_SHARE * psutil.virtual_memory().available:
        layers = []
    try:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            # An attribute of the instance goes before the method of its class.
            layer.forward = partial(multiply, packed, layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def packable(model: nn.Module) -> list[nn.Linear]:
    """Plain linear layers whose whole fp32 weight is on CPU; none without oneDNN, or where autocast would cast them.

    None either where they are few, and none with a short side. accelerate's autocast begins within the model's forward:
    it is seen as a wrapped `forward`.
    """
    wrapped = hasattr(model, "_original_forward")
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu") or wrapped:
        return []
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.dim() == 2
        and min(module.weight.shape) >= LEAST_SIDE
    ]
    return layers if sum(layer.weight.numel() for layer in layers) > LEAST_ELEMENTS else []


def multiply(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`x` [..., in] -> [..., out]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
