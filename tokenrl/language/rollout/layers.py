"""Compiles the layers of a model for passes that are differentiated: one layer, whose code serves all alike.

So the time to compile does not grow with the number of layers. The backward pass is compiled too. What comes
before and after the layers is the model's own, such as masks and positions.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from tokenrl.language.rollout.ahead import code_for, failure_of, file_of


class Kept:
    """The keys and values of one layer, which the layer takes for the cache of all.

    Attributes:
        keys: those of all tokens so far [n, heads, t, d]; None before the first.
        values: alike.
    """

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        """Begin with those of the tokens before."""
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens, and return all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        self.keys, self.values = keys, values
        return keys, values


def layer_pass(
    module: nn.Module, arguments: dict[str, Any], name: str | None, keys: Tensor | None, values: Tensor | None
) -> tuple[Any, Tensor | None, Tensor | None]:
    """Compute one layer.

    Args:
        module: the layer.
        arguments: those of its forward pass by name, without the cache.
        name: the name of the argument that is the cache; None if there is none.
        keys: the keys in the cache; None if it is empty.
        values: the values in it.

    Returns:
        What the layer returns, and the keys and values of all tokens.
    """
    kept = Kept(keys, values)
    cache = {} if name is None else {name: kept}
    return type(module).forward(module, **arguments, **cache), kept.keys, kept.values


class CompiledLayers:
    """Computes the layers of a model by compiled code inside a block, where such code fits.

    Attributes:
        making: whether code is loaded or made where it is missing.
        wanted: files of the code that was missing before any was made; None for what cannot be kept.
        seconds: how long it took so far to make or load code.
        failure: in words, why layers are computed as they are; empty if they need not be.
    """

    def __init__(self, model: nn.Module, directory: Path | None = None) -> None:
        """Look at the layers, and make nothing yet.

        Args:
            model: a causal language model.
            directory: where code is kept between runs; None to keep none. Code is run, so nobody else may be
                able to write there.
        """
        self.making = False
        self.wanted: dict[Any, Path | None] = {}
        self.seconds = 0.0
        self._model, self._directory = model, directory
        self._codes: dict[Any, Any] = {}
        self._layers = layers_of(model)
        self.failure = unfit(self._layers)
        self._builds = [build_of(layer) for layer in self._layers]

    @property
    def made(self) -> int:
        """How many pieces of code there are."""
        return sum(code is not None for code in self._codes.values())

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Compute the layers by compiled code inside the block; it is made under a gradient only."""
        layers = [] if self.failure else self._layers
        with computed_by(self._compute, layers):
            yield

    def _compute(self, place: int, layer: nn.Module, *given: Any, **named: Any) -> Any:
        """Compute the layer at this place among all, by compiled code if there is some."""
        arguments = arguments_by_name(layer, given, named)
        name, held = take_cache(arguments, place)
        keys = values = None
        if isinstance(held, DynamicLayer) and held.is_initialized:
            keys, values = held.keys, held.values
        kind = (self._builds[place], name, form_of((keys, values, arguments)))
        inputs = (layer, arguments, name, keys, values)
        code = None if name is not None and type(held) is not DynamicLayer else self._code(kind, inputs)
        if code is None or not code.guard_check(*inputs):
            return type(layer).forward(layer, *given, **named)
        found, keys, values = code(*inputs)
        if isinstance(held, DynamicLayer) and keys is not None and values is not None:
            if not held.is_initialized:
                held.lazy_initialization(keys, values)
            held.keys, held.values = keys, values
        return found

    def _code(self, kind: Any, inputs: tuple[Any, ...]) -> Any:
        """Return the code for arguments of a kind, which may have to be made."""
        if kind in self._codes:
            return self._codes[kind]
        # Code that is made where no gradient is kept would have no backward pass.
        if not torch.is_grad_enabled() or (not self.making and (self._codes or kind in self.wanted)):
            return None
        path = file_of(self._directory, self._model, inputs[0], (__name__,), kind=repr(kind))
        if not self.making:
            self.wanted[kind] = path
            return None
        began, code = time.perf_counter(), None
        try:
            code = code_of_layer(layer_pass, _example(*inputs), path, _mark_sizes)
        except Exception as error:  # of any kind
            self.failure = failure_of(error)
        self.seconds += time.perf_counter() - began
        self._codes[kind] = code
        return code


def layers_of(model: nn.Module) -> list[Any]:
    """Return what transformers names the layers of a model."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes a second to import

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def computed_by(compute: Callable[..., Any], layers: list[Any]) -> Iterator[None]:
    """Let a function of the place, the layer and its arguments compute the layers inside the block."""
    try:
        for place, layer in enumerate(layers):
            layer.forward = partial(compute, place, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def code_of_layer(
    function: Callable[..., Any], inputs: tuple[Any, ...], path: Path | None, mark: Callable[..., None]
) -> Any:
    """Load or make the code of a function of a layer that is `computed_by` another; see `code_for`."""
    layer = inputs[0]
    compute = vars(layer).pop("forward")  # else all that computes it would be kept with the code
    try:
        return code_for(function, inputs, path, mark)
    finally:
        layer.forward = compute


def unfit(layers: list[Any]) -> str:
    """Say why layers cannot share compiled code; nothing if they may."""
    if not layers:
        return "the model names no layers"
    if any("forward" in vars(layer) for layer in layers):
        return "something else has changed the layers"
    if any(layer.gradient_checkpointing for layer in layers):
        return "activations are recomputed"
    return ""


def build_of(layer: nn.Module) -> str:
    """Return all that decides what a layer computes, besides its weights and its arguments."""
    plain = (bool, int, float, str)
    traits = [
        (path, name, value)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) and not name.endswith("_idx")
    ]
    return sys.intern(f"{type(layer)} {layer} {traits}")


def arguments_by_name(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a layer's forward pass by their names."""
    signature = _signature(type(layer).forward)
    arguments = dict(signature.bind(layer, *given, **named).arguments)
    del arguments[next(iter(signature.parameters))]
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def take_cache(arguments: dict[str, Any], place: int) -> tuple[str | None, Any]:
    """Take the cache out of a layer's arguments.

    Returns:
        The name of the argument, and what the cache holds for the layer at this place; None where one is
        missing.
    """
    name = next((name for name, x in arguments.items() if isinstance(x, Cache)), None)
    layers = [] if name is None else getattr(arguments.pop(name), "layers", [])
    return name, layers[place] if place < len(layers) else None


def form_of(x: Any) -> Any:
    """Return what code depends on in an argument: all of a number, of a tensor which sizes are 1."""
    if isinstance(x, Tensor):
        return str(x.dtype), tuple(size == 1 for size in x.shape)
    if isinstance(x, dict):
        return tuple((name, form_of(x[name])) for name in sorted(x))
    if isinstance(x, (tuple, list)):
        return tuple(form_of(one) for one in x)
    return x if isinstance(x, (bool, int, float, str, type(None))) else repr(type(x))


def _example(
    layer: nn.Module, arguments: dict[str, Any], name: str | None, keys: Tensor | None, values: Tensor | None
) -> tuple[Any, ...]:
    """Return arguments for which code is made, with a gradient where other layers have one."""
    hidden = next(iter(arguments))
    states, *kept = [
        None if x is None else x.detach().clone().requires_grad_() for x in (arguments[hidden], keys, values)
    ]
    return layer, arguments | {hidden: states}, name, *kept


def _mark_sizes(_: nn.Module, arguments: dict[str, Any], __: str | None, *kept: Tensor | None) -> None:
    """Mark the numbers of rows and of tokens."""
    for x, sizes in ((next(iter(arguments.values())), (0, 1)), *((x, (0, 2)) for x in kept)):
        if x is not None:  # code for one row or one token has a kind of its own
            torch._dynamo.mark_dynamic(x, [k for k in sizes if x.shape[k] > 1])
