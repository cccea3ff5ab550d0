"""Tell one base model from another, so that a Bridge is not put into the wrong one."""

import hashlib
import json
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

SAMPLE = 256  # elements read of each chosen weight


def fingerprint(model: nn.Module) -> str:
    """Digest of a base's shapes and of a few of its weights, the same for fp32 and bf16 loads of one checkpoint.

    A model on the meta device has no weights: its fingerprint says so and matches any base of its shapes.
    """
    digest = hashlib.sha256()
    weights = {name: p for name, p in model.named_parameters() if ".bridge." not in name and "lora_" not in name}
    names = sorted(weights)
    digest.update(json.dumps([_plain_name(n) for n in names]).encode())
    chosen = [weights[name] for name in (*names[:2], *names[len(names) // 2 : len(names) // 2 + 2], *names[-2:])]
    if any(p.is_meta for p in chosen):
        return "meta:" + digest.hexdigest()[:32]
    for parameter in chosen:
        with _gathered(parameter):
            sample = parameter.detach().flatten()[:SAMPLE].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _gathered(parameter: nn.Parameter) -> Any:
    """The whole parameter, also where ZeRO-3 has partitioned it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
