"""Tiny random models of every served family, and a Bridge that is switched on (not zero)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import bridge_rl as br

pytest_plugins = ["report.browser"]

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA = {
    "gemma3_text": {"sliding_window": 8},
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
CORE_FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text"]
ALL_FAMILIES = [*CORE_FAMILIES, "granite", "mistral", "olmo2", "phi3", "qwen3_moe", "smollm3"]


def make_base(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SHAPE, **EXTRA.get(family, {}), **overrides})
    attention = overrides.get("attn_implementation", "sdpa")
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def switch_on(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Give every block weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in br.bridge_parameters(model):
            if parameter.dim() > 1:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def make_bridged(family: str, kind: str = "bridge", relative: bool = False, **overrides) -> PreTrainedModel:
    model = make_base(family, **overrides)
    return switch_on(br.attach_bridge(model, br.BridgeConfig(kind=kind, num_heads=2, head_dim=8, relative=relative)))


@pytest.fixture(autouse=True)
def no_run_of_another_test():
    """A run says where it logs in the environment, and expects to be alone in its process."""
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "WANDB_RESUME", "WANDB_RUN_ID"):
        os.environ.pop(name, None)


@pytest.fixture(params=CORE_FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def bridged(family) -> PreTrainedModel:
    return make_bridged(family)
