"""Save and load models with a Bridge.

Three kinds of directory, told apart by their files; each has `bridge_config.json`:
- Bridge only: `bridge.safetensors`, to be put into the base it was trained on (checked by a fingerprint);
- full: a Hugging Face checkpoint whose weights include the blocks (a plain `AutoModelForCausalLM` load drops them);
- adapter: a PEFT adapter whose `modules_to_save` are the blocks.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig, PreTrainedModel
from transformers.utils import logging

from bridge_rl.block import BridgeConfig
from bridge_rl.errors import UserError, check_kind, first_line
from bridge_rl.fingerprint import fingerprint
from bridge_rl.surgery import attach_bridge, bridge_parameters, check_takes_bridge, find_state

CONFIG_FILE = "bridge_config.json"
WEIGHTS_FILE = "bridge.safetensors"
SHARDS_OF_ZERO = "latest"  # DeepSpeed's file that names the directory of its shards

CARD = """---
library_name: bridge-rl
tags: [bridge, grpo]
---
# {title}

This checkpoint carries Bridge blocks (arXiv 2510.01143): attention across the samples drawn for one prompt.

**Load it with bridge-rl. `AutoModelForCausalLM.from_pretrained` silently drops the blocks** (it only reports
unexpected keys), and what is left is not the model that was trained.

```python
import bridge_rl as br

model = br.load_bridge("{path}")
groups = br.generate_groups(model, [prompt_ids], width=4, params=br.SamplingParams(max_new_tokens=1024))
```
"""


def save_bridge(model: PreTrainedModel, directory: str | Path, merged: bool = False) -> None:
    """Write the blocks and their configuration; with `merged`, the whole model.

    Raises ValueError for a model without a Bridge or in PEFT's wrapper, for a Bridge-only save of one whose base was
    trained after the Bridge was attached, and for a directory in which `load_bridge` would find another checkpoint
    first.
    """
    directory = Path(directory)
    state = find_state(model)
    check_kind("merged", merged, bool)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name a directory.")
    if hasattr(model, "peft_config"):
        raise UserError("The model is wrapped by PEFT: merge the adapter first (model.merge_and_unload()).")
    if not merged and fingerprint(model) != state.fingerprint:
        raise UserError(
            "The base weights have changed since the Bridge was attached, so the Bridge alone is not the model: "
            "use save_bridge(..., merged=True)."
        )
    for name in ("adapter_config.json", *([WEIGHTS_FILE] if merged else [])):
        if (directory / name).exists():
            raise UserError(
                f"{directory} holds another checkpoint, which load_bridge would read instead ({name}): save elsewhere."
            )
    directory.mkdir(parents=True, exist_ok=True)
    if merged:
        model.save_pretrained(directory)
        (directory / "README.md").write_text(CARD.format(title=directory.name, path=directory.name))
    else:
        save_blocks({name: parameter.detach() for name, parameter in bridge_parameters(model)}, directory)
    write_config(model, directory)


def other_model(directory: Path, train: str, has_bridge: bool) -> str | None:
    """Why a run of this kind cannot save into `directory`: a file in it belongs to another kind, and would be read."""
    kept = {WEIGHTS_FILE: train != "full", "adapter_config.json": train == "lora", CONFIG_FILE: has_bridge}
    for name, of_this_kind in kept.items():
        if not of_this_kind and (directory / name).is_file():
            return (
                f"output_dir: {directory} holds a model that was trained in another way ({name}), which would be read "
                f"instead of that of train={train}: set another output_dir."
            )
    return None


def check_same_base(model: nn.Module, directory: Path) -> None:
    """Raise UserError if what is in `directory` was trained on other base weights than those of `model`."""
    state, before = find_state(model), read_config(directory)["base_fingerprint"]
    if state.fingerprint != before and not state.fingerprint.startswith("meta:"):  # as of a rank that FSDP fills later
        raise UserError(
            f"{directory} was trained on other weights of the base {state.base_name} (fingerprint {before}, now "
            f"{state.fingerprint}): put those back, or set another output_dir."
        )


def save_blocks(state_dict: dict[str, Tensor], directory: Path) -> None:
    """Write the blocks among `state_dict` to `bridge.safetensors`."""
    blocks = {name: tensor.cpu().contiguous() for name, tensor in state_dict.items() if ".bridge." in name}
    save_file(blocks, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def write_config(model: nn.Module, directory: Path) -> None:
    """Write `bridge_config.json`."""
    state = find_state(model)
    content = {
        "bridge": state.config.to_dict(),
        "base": state.base_name,
        "base_options": state.base_options,
        "base_fingerprint": state.fingerprint,
    }
    quantization = getattr(model.config, "quantization_config", None)
    if isinstance(quantization, BitsAndBytesConfig):
        content["quantization"] = quantization.to_dict()
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def is_bridge_checkpoint(directory: str | Path) -> bool:
    """Whether `load_bridge` can read the directory."""
    return (Path(directory) / CONFIG_FILE).is_file()


def load_bridge(
    directory: str | Path, base_model: str | Path | PreTrainedModel | None = None, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Load a model with its Bridge from any of the three kinds of directory.

    `base_model`: path, hub id or model to put the blocks into; by default the base named in the checkpoint.
    `from_pretrained_kwargs` load the base; the blocks keep the dtype that they were saved in, whatever the base's.
    Raises ValueError for a directory without a Bridge, a base that is wrong or cannot be loaded, damaged weights, and
    arguments that have no use.
    """
    directory = Path(directory)
    if not is_bridge_checkpoint(directory):
        raise UserError(f"{directory} holds no Bridge: there is no {CONFIG_FILE} in it.")
    content = read_config(directory)
    config = BridgeConfig(**content["bridge"])
    is_adapter = (directory / "adapter_config.json").is_file()
    if (directory / SHARDS_OF_ZERO).is_file() and not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds shards only: bridge-rl convert {directory} OUTPUT puts them together.")
    if not is_adapter and not (directory / WEIGHTS_FILE).is_file():
        if base_model is not None:
            raise UserError(f"{directory} holds the whole model: leave base_model out.")
        try:
            model = load_weights(str(directory), from_pretrained_kwargs)
        except OSError as error:
            raise UserError(f"{directory} cannot be loaded ({first_line(error)}): restore the checkpoint.") from error
        model.config.bridge = None  # which is attached and loaded next
        return _take_blocks(attach_bridge(model, config), _read_shards(directory), directory)

    options = from_pretrained_kwargs
    if isinstance(base_model, nn.Module):
        if options:
            raise UserError(f"{', '.join(options)}: of no use for a base_model that is loaded already.")
        base = base_model
    else:
        if not isinstance(base_model, str | Path | None):
            raise UserError(
                f"base_model is {base_model!r:.60}: give a path, the name of a model on the hub, or a model."
            )
        if base_model is None:
            options = content.get("base_options", {}) | options
        base = _load_base(directory, str(base_model or content["base"]), content.get("quantization"), options)
    check_takes_bridge(base)
    found = fingerprint(base)
    if found != content["base_fingerprint"]:
        rounded = ", or load it in bfloat16 or float32, since float16 rounds weights away, and call .half() then"
        raise UserError(
            f"{directory} was trained on another base ({content['base']}, fingerprint {content['base_fingerprint']}, "
            f"found {found}): pass the right one as base_model{rounded if base.dtype == torch.float16 else ''}."
        )
    base.config.bridge = None  # of a base that was a whole Bridge model: these blocks take the place of its own
    model = attach_bridge(base, config, options_of_base(options))
    if is_adapter:
        from peft import PeftModel

        cast_blocks(model, _dtype_of(_read_shards(directory)))  # PEFT copies into what is there
        return PeftModel.from_pretrained(model, directory)
    return _take_blocks(model, read_blocks(directory / WEIGHTS_FILE), directory)


def _load_base(directory: Path, name: str, quantization: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """The base that the blocks in `directory` go into, quantized as when they were trained."""
    if not name:
        raise UserError(f"{directory} does not name its base, which was no saved model: pass it as base_model.")
    if quantization is not None:
        options = {"quantization_config": BitsAndBytesConfig.from_dict(quantization), **options}
    try:
        return load_weights(name, options)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} goes into the base {name}, which cannot be loaded ({first_line(error)}): pass where it is as "
            "base_model."
        ) from error


def options_of_base(options: dict[str, Any]) -> dict[str, str]:
    """Those of `from_pretrained` that say which weights it loads."""
    return {key: value for key, value in options.items() if key in ("revision", "gguf_file")}


def load_weights(path: str, options: dict[str, Any]) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` without its blocks, and with all other weights.

    transformers fills those that are missing, or have another shape, with random numbers. Raises ValueError for these
    and for damaged files.
    """
    if "gguf_file" in options:
        # A default load stays marked as quantized, and such a model can neither be trained nor saved.
        options = {"quantization_config": GgufConfig(dequantize=True), **options}
    try:
        with _quietly():  # it would report every block of a checkpoint as unexpected
            model, found = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except SafetensorError as error:
        raise UserError(f"{path} has damaged weights ({error}): fetch or save it again.") from error
    misshapen = {name for name, *_ in found["mismatched_keys"]}
    for what, names in (("lacks", found["missing_keys"]), ("has another shape than its config.json for", misshapen)):
        if names:
            raise UserError(f"{path} {what} {min(names)} ({len(names)} in all): fetch or save it again.")
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `bridge_config.json`. Raises ValueError if it cannot be read."""
    try:
        content = json.loads((directory / CONFIG_FILE).read_text())
        BridgeConfig(**content["bridge"]), content["base"], content["base_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / CONFIG_FILE} is damaged ({error}): restore the checkpoint.") from error
    return content


def read_blocks(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): restore the checkpoint.") from error


def _read_shards(directory: Path) -> dict[str, Tensor]:
    """The blocks in a full checkpoint, which may be sharded, or in an adapter's.

    Of the files that its library loads, whatever else lies beside them.
    """
    files = ("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors")
    tensors: dict[str, Tensor] = {}
    for path in next(filter(None, (sorted(directory.glob(name)) for name in files)), []):
        tensors |= {name: tensor for name, tensor in read_blocks(path).items() if ".bridge." in name}
    return tensors


def _take_blocks(model: PreTrainedModel, tensors: dict[str, Tensor], source: Path) -> PreTrainedModel:
    """`load_blocks` into blocks of the dtype of `tensors`."""
    cast_blocks(model, _dtype_of(tensors))
    return load_blocks(model, tensors, source)


def _dtype_of(tensors: dict[str, Tensor]) -> torch.dtype | None:
    return next((tensor.dtype for tensor in tensors.values()), None)


def cast_blocks(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast the blocks in place; None leaves them as they are."""
    for _, parameter in bridge_parameters(model):
        parameter.data = parameter.data.to(dtype=dtype)


def load_blocks(model: PreTrainedModel, tensors: dict[str, Tensor], source: Path) -> PreTrainedModel:
    """Copy `tensors` into the model's blocks. Raises ValueError unless they fit one to one."""
    own = dict(bridge_parameters(model))
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    misshapen = sorted(n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape)
    for what, names in (("lacks", missing), ("has unknown", unexpected), ("has another shape for", misshapen)):
        if names:
            raise UserError(f"{source} {what} {names[0]} ({len(names)} in all): it does not fit this Bridge.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return model
