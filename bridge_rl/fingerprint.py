"""Tell one model from another: so that a Bridge is not put into the wrong base, nor samples of two models mixed."""

import hashlib
import json
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

SAMPLE = 64  # elements read of each weight, evenly spaced


def fingerprint(model: nn.Module) -> str:
    """Digest of names, shapes and a sample of every weight of the base, the same for fp32 and bf16 loads.

    A model on the meta device has no weights: its fingerprint covers names and shapes, and says so.
    """
    weights = {name: p for name, p in model.named_parameters() if ".bridge." not in name and "lora_" not in name}
    return _digest({_plain_name(name): p for name, p in weights.items()}, torch.bfloat16)


def whole_fingerprint(model: nn.Module) -> str:
    """The same of every weight, those of a Bridge or LoRA too, in fp32: a small step of training changes it.

    Not of the blocks that PEFT has put its trained copies in the place of: they are random and unused.
    """
    return _digest({n: p for n, p in model.named_parameters() if ".original_module." not in n}, torch.float32)


def _digest(weights: dict[str, nn.Parameter], dtype: torch.dtype) -> str:
    names = sorted(weights)
    # Under ZeRO-3 a parameter's own shape is empty; `ds_shape` is the whole one's.
    shapes = {name: list(getattr(weights[name], "ds_shape", weights[name].shape)) for name in names}
    digest = hashlib.sha256(json.dumps(shapes).encode())
    if any(p.is_meta for p in weights.values()):
        return "meta:" + digest.hexdigest()[:32]
    for name in names:
        parameter = weights[name]
        with _gathered(parameter):
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].to("cpu", dtype).contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _gathered(parameter: nn.Parameter) -> Any:
    """The whole parameter, also where ZeRO-3 has partitioned it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
