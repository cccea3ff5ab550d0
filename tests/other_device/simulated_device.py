"""A device that is not the CPU, simulated on it, so that code for a GPU runs where there is none.

Its tensors say that they are elsewhere and hold their data on the CPU, which computes on them. As on a GPU, an
operation on tensors of both is an error, but for copies, numbers (no dimension) and indices; what waits for the device
is noted in `waits`, what copies to it in `uploads`: neither can be recorded in a CUDA graph. Autocast casts as on CUDA.
What is a GPU's alone does not show: its kernels, its memory, `torch.cuda`.

`register` changes torch for good: only for a process of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import TrainingArguments

NAME = "elsewhere"
DEVICE = f"{NAME}:0"
waits: list[str] = []  # the operations for which the host has waited
uploads: list[str] = []  # those that copied from it

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
# Whose result, or its shape, the host has to know.
WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
# Others come to these, or would be resized, which does not show in a tensor of the device.
MADE = [
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "linspace",
]
# Of torch's lists for CUDA what models use here.
IN_LOW_PRECISION = ["matmul", "mm", "bmm", "linear", "addmm", "baddbmm", "scaled_dot_product_attention"]
IN_FLOAT32 = [
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "rsqrt",
    "exp",
    "log",
    "softmax.int",
    "log_softmax.int",
    "sum",
    "sum.dim_IntList",
    "cumsum",
    "prod",
    "layer_norm",
    "nll_loss",
    "cross_entropy_loss",
    "softplus",
]


class Elsewhere(torch.Tensor):
    """A tensor of the device; `there` is its data."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    there: torch.Tensor

    def __new__(cls, there: torch.Tensor) -> "Elsewhere":
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            there.shape,
            strides=there.stride(),
            storage_offset=there.storage_offset(),
            dtype=there.dtype,
            device=torch.device(DEVICE),
        )
        self.there = there
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:  # torch has none for subclasses
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:  # by whose address weights are known as tied
        return self.there.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Elsewhere, (self.there,)

    def __repr__(self) -> str:
        return f"Elsewhere({self.there})"


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` on the data of the device's tensors. Raises RuntimeError where a GPU would."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    ours = [x for x in leaves if isinstance(x, Elsewhere)]
    of_host = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) and x.dim() > 0]
    asked = kwargs.get("device")
    stays = bool(ours) if asked is None else torch.device(asked).type == NAME
    if func is aten.copy_.default:
        stays = isinstance(args[0], Elsewhere)
    if ours and of_host and func not in COPIES | INDEXING:
        raise RuntimeError(f"{func} mixes devices: {[tuple(x.shape) for x in of_host]} is on the CPU")
    if stays and (generator := kwargs.get("generator")) is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{func} on the device draws from a generator of the CPU")
    by_mask = func in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
    if func in WAITING or by_mask or (func in COPIES and not stays):
        waits.append(str(func))
    if stays and func in COPIES | INDEXING and len(ours) < sum(isinstance(x, torch.Tensor) for x in leaves):
        uploads.append(str(func))

    def data(x: Any) -> Any:
        if isinstance(x, Elsewhere):
            return x.there
        return torch.device("cpu") if isinstance(x, torch.device) else x

    own_args, own_kwargs = pytree.tree_unflatten(list(map(data, leaves)), spec)
    if func is aten.histc.default and not own_args[0].is_floating_point():  # which the CPU has of floats only
        own_args = (own_args[0].float(), *own_args[1:])
    result = func(*own_args, **own_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if not stays or func is aten._local_scalar_dense.default:
        return result
    result = pytree.tree_map_only(torch.Tensor, Elsewhere, result)
    result = return_and_correct_aliasing(func, args, kwargs, result)
    assert all(x.shape == x.there.shape for x in ours), f"{func} resizes, which is not simulated"
    return result


class Backend(_DummyBackendModule):
    """What `torch.elsewhere` has."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing draws there."""


def make(operation: Any, *args: Any, **kwargs: Any) -> Elsewhere:
    """A tensor that is made from none."""
    return Elsewhere(operation(*args, **{**kwargs, "device": "cpu"}))


def operation_of(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


registered: list[torch.library.Library] = []  # which forget their kernels when they are gone


def register() -> None:
    """Let torch know the device."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    # Tied weights stay tied when a model is moved.
    torch.__future__.set_swap_module_params_on_conversion(True)
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in MADE:
        kernels.impl(name, partial(make, operation_of(name)))
    kernels.impl("_copy_from", copy_from)
    kernels.impl("_local_scalar_dense", number)
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    autocast = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in (*IN_LOW_PRECISION, *IN_FLOAT32):
        autocast.impl(name, cast_before(name, torch.float32 if name in IN_FLOAT32 else None))
    registered.extend([kernels, rest, autocast])
    torch.serialization.add_safe_globals([Elsewhere])


@contextmanager
def as_the_device() -> Iterator[None]:
    """Inside, accelerate and transformers find this device."""
    make_state, device = PartialState.__init__, TrainingArguments.device

    def make_state_elsewhere(self: PartialState, *args: Any, **kwargs: Any) -> None:
        make_state(self, *args, **kwargs)
        self.device = torch.device(DEVICE)

    def device_elsewhere(self: TrainingArguments) -> torch.device:
        device.fget(self)  # which sets up more
        return torch.device(DEVICE)

    PartialState.__init__, TrainingArguments.device = make_state_elsewhere, property(device_elsewhere)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        PartialState.__init__, TrainingArguments.device = make_state, device
        AcceleratorState._reset_state(reset_partial_state=True)


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What `copy_` comes to where torch makes a tensor of numbers."""
    (uploads if isinstance(target, Elsewhere) else waits).append("aten._copy_from.default")
    source, own = (x.there if isinstance(x, Elsewhere) else x for x in (source, target))
    own.copy_(source)
    return target


def number(tensor: Elsewhere) -> float | int | bool:
    """What `item` comes to there."""
    waits.append("aten._local_scalar_dense.default")
    return tensor.there.item()


def cast_before(name: str, dtype: torch.dtype | None) -> Callable[..., Any]:
    """The operation on arguments in `dtype`; None: in autocast's."""
    operation = operation_of(name)

    def cast(x: torch.Tensor) -> torch.Tensor:
        floats = x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype or torch.get_autocast_dtype(NAME)) if floats and x.device.type == NAME else x

    def call(*args: Any, **kwargs: Any) -> Any:
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            args, kwargs = pytree.tree_map_only(torch.Tensor, cast, (args, kwargs))
            return operation(*args, **kwargs)

    return call
