"""A checkpoint that DeepSpeed wrote in shards, as one that `load_bridge` reads, in float32."""

import contextlib
import io
import shutil
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from bridge_rl.block import BridgeConfig
from bridge_rl.checkpoint import CARD, CONFIG_FILE, SHARDS_OF_ZERO, read_config, save_blocks
from bridge_rl.config import ModelSection
from bridge_rl.errors import UserError
from bridge_rl.models import model_config
from bridge_rl.run_checkpoints import MANIFEST, problem_of
from bridge_rl.surgery import attach_bridge

COPIED = ("*.json", "*.jinja", "tokenizer*")
NOT_COPIED = (MANIFEST, "trainer_state.json", "*.index.json")


def convert(checkpoint: Path, output: Path) -> None:
    """Write the model in `checkpoint` (a run's `checkpoint-N`, or its directory) to `output`, from the float32 masters
    in the shards, whatever whole weights lie beside them.

    Blocks stay blocks, an adapter an adapter, a full model a full one. Raises UserError for a directory that has no
    shards or a damaged one, and for an output that exists.
    """
    if not (checkpoint / CONFIG_FILE).is_file():
        raise UserError(f"{checkpoint} holds no Bridge: there is no {CONFIG_FILE} in it.")
    if output.exists():
        raise UserError(f"{output} exists already: name a new directory.")
    if (checkpoint / MANIFEST).is_file() and (problem := problem_of(checkpoint)) is not None:
        raise UserError(f"{problem}: name another checkpoint.")
    is_adapter, is_full = ((checkpoint / name).is_file() for name in ("adapter_config.json", "config.json"))
    model = skeleton(checkpoint) if is_adapter or is_full else None
    tensors = read_zero(checkpoint, trained_only=not is_full)
    output.mkdir(parents=True)
    copy_rest(checkpoint, output)
    if model is None:
        save_blocks(tensors, output)
    elif is_adapter:
        adapted = get_peft_model(model, PeftConfig.from_pretrained(checkpoint))
        save_file(get_peft_model_state_dict(adapted, tensors), output / "adapter_model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(output, state_dict=tensors)


def read_zero(checkpoint: Path, trained_only: bool) -> dict[str, Tensor]:
    """The float32 masters by their names in training, each in memory of its own unless it is tied."""
    if not (checkpoint / SHARDS_OF_ZERO).is_file():
        raise UserError(
            f"{checkpoint} holds no shards of ZeRO (there is no file '{SHARDS_OF_ZERO}'), nothing to convert."
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
            tensors = get_fp32_state_dict_from_zero_checkpoint(checkpoint, exclude_frozen_parameters=trained_only)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{checkpoint}: its shards cannot be read ({error}): name another checkpoint.") from error
    copies = {tensor.data_ptr(): tensor.clone() for tensor in tensors.values()}
    return {name: copies[tensor.data_ptr()] for name, tensor in tensors.items()}


def skeleton(checkpoint: Path) -> PreTrainedModel:
    """The model in float32 with its blocks and without weights, for the names that its library gives them in files."""
    config = model_config(ModelSection(str(checkpoint)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (checkpoint / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)  # else it is made from `config`
    with torch.device("meta"):
        return attach_bridge(model, BridgeConfig(**read_config(checkpoint)["bridge"]))


def copy_rest(checkpoint: Path, output: Path) -> None:
    """Configuration and tokenizer, and a card of its own."""
    left_out = {path for pattern in NOT_COPIED for path in checkpoint.glob(pattern)}
    for path in {path for pattern in COPIED for path in checkpoint.glob(pattern)} - left_out:
        shutil.copyfile(path, output / path.name)
    (output / "README.md").write_text(CARD.format(title=output.name, path=output))
