"""Put Bridge blocks into a Hugging Face causal language model, and switch them off again.

Every decoder layer's class is swapped in place for a subclass that runs the block after the layer's own forward. The
block thus sits inside the layer's gradient checkpointing, and no key of the base's state dict changes.

Which rows think together travels as the keyword `bridge_alive` ([G, N, T] bool, see `group`) through the model's
`**kwargs`. A full-sequence forward may leave it out: it is then made from the 2-D attention mask and the width set by
`group_width`, which is 1 unless set. At width 1 the block acts on each token alone, so the stock `generate` is exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridge_rl.block import BLOCKS, BridgeConfig
from bridge_rl.errors import UserError
from bridge_rl.fingerprint import fingerprint
from bridge_rl.group import alive_from_mask
from bridge_rl.packed import PackedGroups

# Families whose layer loop hands **kwargs to the layers and whose layers return [B, T, D]; each is in the tests.
# Others fail silently (bloom, falcon, gptj drop the keyword; gemma3n has 4-D states), so they are refused by name.
SERVED_FAMILIES = (
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)


@dataclass
class BridgeState:
    """What all blocks of one model share: one object, referred to by the backbone and its layers."""

    config: BridgeConfig
    fingerprint: str
    base_name: str
    base_options: dict[str, str]  # see `attach_bridge`
    width: int = 1
    enabled: bool = True


class BridgedLayer:
    """Mixed into the class of a decoder layer: the layer, then its block."""

    def forward(self, *args: Any, bridge_alive: Tensor | PackedGroups | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        block = self._modules.get("bridge")  # type: ignore[attr-defined]
        if block is None or not self.bridge_state.enabled:  # type: ignore[attr-defined]
            return output
        if isinstance(output, tuple):
            return (block(output[0], bridge_alive), *output[1:])
        return block(output, bridge_alive)

    def __reduce__(self) -> tuple[Any, ...]:
        """By the class of the family, since pickle does not find the subclass by its name."""
        return empty_layer, (type(self).__bases__[1],), self.__dict__


@cache
def bridged_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a decoder layer that runs its block. It keeps the name, by which FSDP wraps layers."""
    return type(cls.__name__, (BridgedLayer, cls), {"__module__": cls.__module__})


def empty_layer(cls: type[nn.Module]) -> nn.Module:
    """A layer without its modules, which pickle and deepcopy fill in."""
    layer: nn.Module = object.__new__(bridged_class(cls))  # type: ignore[arg-type]
    return layer


def attach_bridge(
    model: PreTrainedModel, config: BridgeConfig, base_options: dict[str, str] | None = None
) -> PreTrainedModel:
    """Add a zero-started block after every decoder layer named by `config`, in place, and return `model`.

    base_options: what it took to load the model beside its name (`revision`, `gguf_file`), for `load_bridge` to do it
    again.

    The blocks take the device of their layer and the dtype of the model; their random start comes from torch's global
    generator.
    Raises ValueError for a model family that is not served, a layer that does not exist, a model that has blocks or an
    adapter or is spread over devices, and one whose blocks were dropped when it was loaded.
    """
    check_takes_bridge(model)
    if not isinstance(config, BridgeConfig):
        raise UserError(f"config is {config!r:.60}: give bridge_rl.BridgeConfig(...).")
    if getattr(model.config, "bridge", None):
        raise UserError("This model was saved with a Bridge, which a plain load has dropped: load it with load_bridge.")
    backbone = model.base_model
    carriers = layer_indices(config, len(backbone.layers))
    base_name = str(getattr(model.config, "_name_or_path", ""))
    state = BridgeState(config, fingerprint(model), base_name, base_options or {})
    hidden_size = model.config.get_text_config().hidden_size
    for index, layer in enumerate(backbone.layers):
        if index in carriers:
            weight = next(layer.parameters())
            layer.bridge = BLOCKS[config.kind](hidden_size, config, device=weight.device, dtype=model.dtype)
        layer.bridge_state = state
        layer.__class__ = bridged_class(type(layer))  # type: ignore[arg-type]
    backbone.bridge_state = state
    backbone.register_forward_pre_hook(_give_alive, with_kwargs=True)
    model.config.bridge = config.to_dict()
    return model


def check_model(model: object) -> None:
    """Raise UserError for what is no model, such as the path of one."""
    if not isinstance(model, nn.Module):
        raise UserError(f"The model is {model!r:.60}: load it first, by load_bridge or transformers' from_pretrained.")


def check_family(model: PreTrainedModel, what: str) -> None:
    """Raise UserError for a model of a family that `what` does not serve."""
    check_model(model)
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in SERVED_FAMILIES:
        raise UserError(
            f"{what} does not serve the model family '{family}' ({type(model).__name__}): use one of "
            f"{', '.join(SERVED_FAMILIES)}."
        )


def check_takes_bridge(model: PreTrainedModel) -> None:
    """Raise UserError for a model that no blocks can be put into, by what it is and not by where it comes from."""
    if hasattr(model, "peft_config"):
        raise UserError("The model is wrapped by PEFT: attach the Bridge to the base before the adapter.")
    check_family(model, "Bridge")
    if has_bridge(model):
        raise UserError("This model has a Bridge already: load the base again to attach another.")
    if any("forward" in vars(layer) for layer in model.base_model.layers):  # which goes before that of a class
        raise UserError(
            "The model's layers run a forward of their own, as a device_map over several devices gives them, which "
            'would leave the blocks out: load the model on one device, such as device_map={"": 0}.'
        )


def layer_indices(config: BridgeConfig, num_layers: int) -> set[int]:
    """The layers that carry a block. Raises ValueError naming one that does not exist."""
    if config.layers == "all":
        return set(range(num_layers))
    for index in config.layers:
        if not 0 <= index < num_layers:
            raise UserError(f"bridge.layers names layer {index}, but the model has layers 0 to {num_layers - 1}.")
    return set(config.layers)


def _give_alive(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pre-hook of the backbone: `bridge_alive` from the attention mask where the caller gave none."""
    width = backbone.bridge_state.width
    if kwargs.get("bridge_alive") is not None or width == 1 or not backbone.bridge_state.enabled:
        return args, kwargs
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"][..., 0]
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError(
            f"A Bridge model at width {width} was called with a cache and without `bridge_alive`: the rows still "
            "sampling are unknown. Use bridge_rl.generate_groups, or group_width(model, 1) for independent rows."
        )
    if mask is None:
        mask = torch.ones_like(inputs, dtype=torch.bool)
    if mask.dim() != 2:
        raise UserError(f"The attention mask has {mask.dim()} dimensions: pass a 2-D mask or `bridge_alive`.")
    return args, {**kwargs, "bridge_alive": alive_from_mask(mask, width)}


def find_state(model: nn.Module) -> BridgeState:
    """The shared state of a model with a Bridge, also inside PEFT, DDP and DeepSpeed wrappers."""
    check_model(model)
    for module in model.modules():
        if "bridge_state" in module.__dict__:
            return module.__dict__["bridge_state"]
    raise UserError("This model has no Bridge: call attach_bridge or load_bridge first.")


def has_bridge(model: nn.Module) -> bool:
    """Whether `attach_bridge` was called on the model."""
    return any("bridge_state" in module.__dict__ for module in model.modules())


def bridge_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every block. Under PEFT, of the copies that are trained."""
    check_model(model)
    for name, parameter in model.named_parameters():
        if ".bridge." in name and ".original_module." not in name:
            yield name, parameter


def freeze_base(model: nn.Module) -> None:
    """Leave only the blocks trainable."""
    model.requires_grad_(False)
    for _, parameter in bridge_parameters(model):
        parameter.requires_grad_(True)


@contextmanager
def disable_bridge(model: nn.Module) -> Iterator[None]:
    """Inside, the model is exactly its base."""
    state = find_state(model)
    before, state.enabled = state.enabled, False
    try:
        yield
    finally:
        state.enabled = before


@contextmanager
def group_width(model: nn.Module, width: int) -> Iterator[None]:
    """Inside, a full-sequence forward takes its rows as groups of `width`."""
    state = find_state(model)
    before, state.width = state.width, width
    try:
        yield
    finally:
        state.width = before
