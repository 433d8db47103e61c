"""Computes one more token by compiled code for a layer, which serves all layers that are built alike.

It does what code for the whole model does, a little slower, but 30 layers take as long to make as one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.language.rollout.ahead import file_of
from tokenrl.language.rollout.cache import Cache, GrowingLayer
from tokenrl.language.rollout.layers import (
    arguments_by_name,
    build_of,
    code_of_layer,
    computed_by,
    form_of,
    layers_of,
    take_cache,
)


def layer_step(module: nn.Module, arguments: dict[str, Any], name: str, held: GrowingLayer) -> Any:
    """Compute one layer for one token of each row, and return what the layer returns.

    Args:
        module: the layer.
        arguments: those of its forward pass by name, without the cache.
        name: the name of the argument that is the cache.
        held: what the cache holds for this layer, which stands in for it.
    """
    return type(module).forward(module, **arguments, **{name: held})


class LayerSteps:
    """Feeds each row a token as the model does, with compiled code for its layers.

    Attributes:
        making: whether the next call loads or makes code where it is missing.
        wanted: files of the code that was missing in other calls; None for what cannot be kept.
    """

    def __init__(
        self, model: nn.Module, directory: Path | None, compute: Callable[..., Tensor], making: bool
    ) -> None:
        """Look at the layers, and make nothing yet.

        Args:
            model: a causal language model, whose layers can share code; see `layers.unfit`.
            directory: where code is kept between runs; None to keep none.
            compute: the function of the model, the tokens and its other arguments whose layers are compiled.
            making: whether the first call makes code.
        """
        self.making = making
        self.wanted: dict[Any, Path | None] = {}
        self._layers = layers_of(model)
        self._model, self._directory, self._function = model, directory, compute
        self._builds = [build_of(layer) for layer in self._layers]
        self._codes: dict[Any, Any] = {}

    def guard_check(self, *_: Any) -> bool:
        """Return True: each layer checks for itself whether code holds for its arguments."""
        return True

    def __call__(self, model: nn.Module, token: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Compute the function; later calls make no code."""
        with computed_by(self._compute, self._layers):
            found = self._function(model, token, arguments)
        self.making = False
        return found

    def _compute(self, place: int, layer: nn.Module, *given: Any, **named: Any) -> Any:
        """Compute the layer at this place among all, by compiled code if there is some."""
        arguments = arguments_by_name(layer, given, named)
        name, held = take_cache(arguments, place)
        if type(held) is GrowingLayer:
            inputs = (layer, arguments, name, held)
            code = self._code((self._builds[place], name, form_of(arguments)), inputs)
            if code is not None and code.guard_check(*inputs):
                return code(*inputs)
        return type(layer).forward(layer, *given, **named)

    def _code(self, kind: Any, inputs: tuple[Any, ...]) -> Any:
        """Return the code for arguments of a kind, which may have to be made; None if there is none."""
        if kind not in self._codes and (self.making or kind not in self.wanted):
            layer, sources = inputs[0], (__name__, Cache.__module__)
            path = file_of(self._directory, self._model, layer, sources, kind=repr(kind))
            if self.making:
                self._codes[kind] = code_of_layer(layer_step, inputs, path, _mark_sizes)
            else:
                self.wanted[kind] = path
        return self._codes.get(kind)


def _mark_sizes(_: nn.Module, arguments: dict[str, Any], __: str, held: GrowingLayer) -> None:
    """Mark the numbers of rows and of tokens."""
    torch._dynamo.mark_dynamic(next(iter(arguments.values())), 0)
    for whole in held.whole:
        torch._dynamo.mark_dynamic(whole, (0, 2))
