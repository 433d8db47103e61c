"""Pretends an accelerator: its tensors are computed on the CPU, and what a real device refuses is an error.

`begin()` gives torch's spare backend a name and hands it to accelerate. A tensor of that device wraps a
tensor of the CPU. Each operation goes through `compute`, which raises where tensors of the device and of the
CPU meet, as CUDA does, and where anything on the device has float64, as MPS does. It also counts how
often the host would wait: for a number that is read, for a transfer to the CPU, and for results whose shape
depends on values.

It holds for a whole process, so tests that need it start `on_device.py`.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
"""Operations that return a number to the host."""
SHAPES = {"nonzero", "masked_select", "repeat_interleave", "_unique2"}
SHAPES |= {"unique_consecutive", "unique_dim", "unique_dim_consecutive"}
"""Operations whose results have shapes that the host has to read."""
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take indices, which may be on the CPU, or masks, whose True entries the host counts."""
UNMIXED = {"_to_copy", "copy_", "_copy_from", "set_", "_has_compatible_shallow_copy_type"}
"""Operations that may take tensors of both devices."""
waits: Counter[str] = Counter()
"""How often the host waited, by the kind of the wait and the nearest line of the package."""


def begin() -> torch.device:
    """Make the device that of this process, until the process ends."""
    module = SimpleNamespace(
        is_initialized=lambda: True,
        is_available=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 1,
        set_device=lambda device: None,
        manual_seed_all=lambda seed: None,
        manual_seed=lambda seed: None,
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda *_: None,
    )
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    # else a backward pass leaves the thread of the mode
    torch.autograd.set_multithreading_enabled(False)
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    _Operations().__enter__()
    return torch.device(NAME, 0)


class Pretended(torch.Tensor):
    """A tensor of the device, which wraps one of the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        if inner.dtype == torch.float64:
            raise TypeError(f"{_line()}: cannot convert to float64, which this device lacks.")
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
            requires_grad=inner.requires_grad,
        )
        self.inner = inner
        return self

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def storage(self) -> Any:
        # of which safetensors reads the address, to see which weights are tied
        return self.inner.storage()

    @property
    def data(self) -> Pretended:
        return self.detach()

    @data.setter
    def data(self, value: Pretended) -> None:
        torch.Tensor.data.__set__(self, value)  # the shape and the type that torch sees
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(operation, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Sees the operations that make tensors, which have no argument on the device."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the CPU, and put the result where a real device would have it."""
    leaves = [*_tensors(args), *_tensors(kwargs.values())]
    device = kwargs.get("device")
    expected = None if device is None else torch.device(device).type
    here = any(isinstance(x, Pretended) for x in leaves)
    if not here and expected != NAME:
        return operation(*args, **kwargs)
    name = operation._schema.name.removeprefix("aten::")
    if here and name not in UNMIXED:
        _check_devices(operation, name, args, leaves)
    _count(operation, name, args, expected, here)
    options = kwargs | ({} if device is None else {"device": torch.device("cpu")})
    inner_args, inner_kwargs = _each(_unwrapped, (args, options))
    result = operation(*inner_args, **inner_kwargs)
    if name == "copy_" and not isinstance(args[0], Pretended):
        return args[0]
    if operation in READS or expected == "cpu":
        return result
    wrapped = _each(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(operation, args, kwargs, wrapped)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments and in lists of them."""
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    """Call a function on all that lists and dictionaries hold; torch's own takes as long as the operation."""
    if isinstance(x, list | tuple):
        return type(x)([_each(function, item) for item in x])
    if isinstance(x, dict):
        return {name: _each(function, item) for name, item in x.items()}
    return function(x)


def _unwrapped(x: Any) -> Any:
    return x.inner if isinstance(x, Pretended) else x


def _check_devices(operation: Any, name: str, args: Any, leaves: list[torch.Tensor]) -> None:
    """Raise where CUDA would: tensors of both devices meet, and that of the CPU has dimensions."""
    host = [x for x in leaves if not isinstance(x, Pretended) and x.ndim > 0]
    if name in INDEXED and isinstance(args[0], Pretended):
        indices = [x for x in args[1] if x is not None]
        host = [x for x in host if not any(x is index for index in indices)]
    if host:
        raise RuntimeError(
            f"{_line()}: {operation} expected all tensors on one device, but one is on the CPU."
        )


def _count(operation: Any, name: str, args: Any, wanted: str | None, here: bool) -> None:
    """Count the wait if the host has to wait for the operation."""
    kind = ""
    if operation in READS:
        kind = "number"
    elif (here and wanted == "cpu") or (name == "copy_" and not isinstance(args[0], Pretended)):
        kind = "transfer"
    elif name in SHAPES:
        kind = "shape"
    elif name in INDEXED:
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        kind = "shape" if any(isinstance(x, Pretended) for x in masks) else ""
    if kind:
        waits[f"{kind} {_line()}"] += 1


def _line() -> str:
    """The nearest line of the package, and that of the library where it calls one that waits."""
    stack = traceback.extract_stack()
    frames = [f for f in stack if "/torch/" not in f.filename and f.filename != __file__]
    frames = [f for f in frames if f.name not in ("to_host", "small_on_host", "on_host")]
    last = frames[-1]
    ours = next((f for f in reversed(frames) if "/tokenrl/" in f.filename), last)
    path = ours.filename.split("/tokenrl/")[-1]
    library = "" if last is ours else f" ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
    return f"{path}:{ours.lineno}{library}"
