"""Copies models, and proves of each copy that it computes with weights of its own.

A function that was put on a model or on one of its parts, such as a compiled `forward`, is not copied: the copy
has the same function, which reads the weights of the original. A reference would then follow the training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused

CLOSE = 0.01
"""Logits that differ by less, or by this share, are equal but for rounding; the changes of a proof are far larger."""


def uncompiled(model: Any) -> Any:
    """Return the model that `torch.compile(model)` has wrapped; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def copied(model: nn.Module, replaced: Mapping[int, Any] | None = None) -> Any:
    """Copy a model, and prove that the copy computes with its own weights.

    The proof changes the weights of the copy, then those of the original, and restores both bit for bit. Only
    the first change may reach the logits of the copy.

    Args:
        model: the model.
        replaced: what stands in the copy for parts of the model, by the `id` of the part; the rest is copied.

    Raises:
        Refused: the copy computes with other weights than its own, or not at all.
    """
    twin = copy.deepcopy(model, dict(replaced or {}))
    of_twin, of_model = ({w.data_ptr(): w for w in m.parameters()} for m in (twin, model))
    of_copy = [of_twin[address] for address in of_twin.keys() - of_model]
    of_original = [of_model[address] for address in of_model.keys() - of_twin]
    logits = _logits(twin)
    if not of_copy or (logits is None and _logits(model) is None):
        return twin  # the checks of a run refuse a model that cannot be computed
    if logits is None or not _changes(twin, logits, of_copy) or _changes(twin, logits, of_original):
        parts = [name or "the model" for name, m in model.named_modules() if "forward" in vars(m)]
        raise Refused(
            f"A copy of the model ({type(model).__name__}) does not compute with its own weights. Functions that were "
            "put on it or on its parts are not copied and go on with the weights of the original; forward was put on: "
            f"{', '.join(parts[:3]) or 'nothing'}. A reference, a teacher, an older sampler and bfloat16 need a copy. "
            "Give a model without such functions; model.compile() compiles it in place and does not have this fault."
        )
    return twin


def sharing_copy(model: nn.Module, replaced: Mapping[int, Any]) -> Any:
    """Copy modules and configuration; weights and buffers are shared, but for the `replaced` ones (see `copied`)."""
    shared: dict[int, Tensor] = {id(x): x for x in chain(model.parameters(), model.buffers())}
    return copied(model, {**shared, **replaced})


def frozen_copy(model: nn.Module) -> Any:
    """Return a copy of the model as it is now; it shares the weights that are not trained."""
    copies = {}
    for weight in model.parameters():
        if weight.requires_grad:
            copies[id(weight)] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return sharing_copy(model, copies).eval()


def _changes(model: Any, logits: Tensor, weights: Sequence[nn.Parameter]) -> bool:
    """Return whether the logits of a model depend on weights, which are changed for a moment."""
    _flip(weights)
    try:
        changed = _logits(model)
    finally:
        _flip(weights)
    return changed is None or not torch.allclose(changed, logits, rtol=CLOSE, atol=CLOSE)


def _flip(weights: Sequence[nn.Parameter]) -> None:
    """Change all numbers of weights by inverting their exponents; a second time restores them bit for bit."""
    for weight in weights:
        if type(weight.data) is Tensor and weight.is_floating_point():
            integers = getattr(torch, f"int{8 * weight.element_size()}")
            exponent = weight.data.new_full((), math.inf).view(integers)
            weight.data.view(integers).bitwise_xor_(exponent)


@torch.no_grad()
def _logits(model: Any) -> Tensor | None:
    """Return the logits of a few tokens; None where they cannot be computed or are not finite."""
    with suppress(Exception), torch.random.fork_rng(devices=[]):  # code of any architecture
        ids = torch.arange(4, device=next(model.parameters()).device)
        logits: Tensor = model(ids[None]).logits
        return logits if bool(logits.isfinite().all()) else None
    return None
