"""Compiles the forward pass of one more token, whose time goes into hundreds of small operations otherwise.

The code holds for any number of rows and tokens: keys and values lie in memory that was set aside, and each
call sees as much of it as there are tokens. It is made once for a model's shape, which takes many times as
long as a step of training, and kept in a directory for later runs. Of a deep model one layer is compiled, for
all that are built alike.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.language.rollout.ahead import COARSE, TOLERANCES, code_for, failure_of, file_of
from tokenrl.language.rollout.cache import OTHERS, Cache
from tokenrl.language.rollout.layer_steps import LayerSteps
from tokenrl.language.rollout.layers import layers_of, unfit

DEEP = 60
"""Modules with weights from which on a layer is compiled: all together would take half a minute and more, and
calling code for each layer takes little time beside what so many modules compute."""


def logits_after(module: nn.Module, token: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Feed each row one token [n], and return the logits of the next [n, V].

    Args:
        module: a causal language model.
        token: the tokens.
        arguments: the cache of the tokens before, and the places of the new ones; see `Cache.arguments`.
    """
    logits: Tensor = module(token[:, None], **arguments, use_cache=True).logits
    return logits[:, -1]


def compiled_part(model: nn.Module) -> nn.Module:
    """Return what is compiled: the model, or its first layer if it has many that can share code."""
    layers = layers_of(model)
    return model if weighted(model) < DEEP or unfit(layers) else layers[0]


def weighted(module: nn.Module) -> int:
    """Return the number of modules that have weights, on which depends how long compiling takes."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


class CompiledStep:
    """Does what `logits_after` does for one model, by compiled code where that fits.

    The code is made, or loaded, when it is first needed, and tried out against the model itself.

    Attributes:
        directory: where code is kept between runs; None to keep none. Code is run, so nobody else may be able
            to write there.
        making: whether code is loaded or made where it is missing.
        wanted: files of the code that was missing before any was made; None for what cannot be kept.
        seconds: how long it took so far to make or load code.
        failure: in words, why the model is called as it is; empty if it need not be.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Make nothing yet."""
        self.directory = directory
        self.making = False
        self.wanted: dict[Any, Path | None] = {}
        self.seconds = 0.0
        self.failure = ""
        self._codes: dict[bool, Any] = {}
        self._seen: set[bool] = set()

    def __call__(self, model: nn.Module, token: Tensor, cache: Cache, places: dict[str, Any]) -> Tensor:
        """Return the logits of the next token [n, V]; the cache then holds `token` [n] too."""
        arguments = cache.arguments(places)
        if not cache.growing:
            self.failure = OTHERS
            return logits_after(model, token, arguments)
        # The code for a single row would differ, and nothing is gained by it.
        if len(token) < 2 or cache.held.get_seq_length() < 2:
            return logits_after(model, token, arguments)
        padded = bool(places)
        if self.making and padded not in self._codes:
            return self._first(model, token, cache, arguments, padded)
        if not self.making and padded not in self._seen:
            return self._look(model, token, arguments, padded)
        code = self._codes.get(padded)
        if code is None or not code.guard_check(model, token, arguments):
            return logits_after(model, token, arguments)
        found: Tensor = code(model, token, arguments)
        return found

    def _look(self, model: nn.Module, token: Tensor, arguments: dict[str, Any], padded: bool) -> Tensor:
        """Note which code is missing, and let the model answer."""
        self._seen.add(padded)
        if compiled_part(model) is model:
            self.wanted[padded] = self._path(model, padded)
            return logits_after(model, token, arguments)
        layers = LayerSteps(model, self.directory, logits_after, making=False)
        logits = layers(model, token, arguments)
        self.wanted |= layers.wanted
        return logits

    def _first(
        self, model: nn.Module, token: Tensor, cache: Cache, arguments: dict[str, Any], padded: bool
    ) -> Tensor:
        """Make or load the code, and take it if it gives what the model gives."""
        length, began = cache.held.get_seq_length(), time.perf_counter()
        code = found = None
        try:
            if compiled_part(model) is model:
                path = self._path(model, padded)
                code = code_for(logits_after, (model, token, arguments), path, _mark_sizes)
            else:
                code = LayerSteps(model, self.directory, logits_after, making=True)
            found = code(model, token, arguments)
        except Exception as error:  # of any kind
            self.failure, code = failure_of(error), None
        cache.cut(length)
        expected = logits_after(model, token, arguments)
        if found is not None:
            off = float((found - expected).abs().max() / expected.std())
            if not off <= TOLERANCES.get(expected.dtype, COARSE):
                self.failure, code = f"its logits are off by {off:.2g} standard deviations", None
        self._codes[padded] = code
        self.seconds += time.perf_counter() - began
        return expected

    def _path(self, model: nn.Module, padded: bool) -> Path | None:
        """Return the file of the code for the whole model; None where none can be kept."""
        return file_of(self.directory, model, model, (__name__, Cache.__module__), padded=padded)


def _mark_sizes(_: nn.Module, token: Tensor, arguments: dict[str, Any]) -> None:
    """Mark the numbers of rows and of tokens."""
    torch._dynamo.mark_dynamic(token, 0)
    for layer in arguments["past_key_values"].layers:
        for whole in layer.whole:
            torch._dynamo.mark_dynamic(whole, (0, 2))
    if "attention_mask" in arguments:
        torch._dynamo.mark_dynamic(arguments["attention_mask"], (0, 1))
        torch._dynamo.mark_dynamic(arguments["position_ids"], 0)
