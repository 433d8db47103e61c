"""Keeps a bfloat16 copy of a policy's weights, with which it is sampled, scored and differentiated.

The weights that the optimiser changes stay in float32, since most updates are smaller than bfloat16 can add
to a weight. The copy is refreshed once after each update, so that sampling and training see the same policy,
and no weight is converted in a forward pass. Micikevicius et al. 2018, "Mixed Precision Training", sec. 3.1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.model import Policy


class HalfCopy:
    """A copy of a policy whose weights are bfloat16; `hand_over` gives the policy its gradients.

    Buffers, such as the frequencies of rotary positions, and weights that have to keep another precision are
    those of the original.

    Attributes:
        policy: the copy.
    """

    def __init__(self, policy: Policy) -> None:
        """Copy the weights; the original stays as it is."""
        self._original = policy
        pairs = [(p, nn.Parameter(_half(p), p.requires_grad)) for p in _to_be_halved(policy.model)]
        self.policy = replace(policy, model=_copied(policy.model, {id(p): own for p, own in pairs}))
        self._trained = [pair for pair in pairs if pair[0].requires_grad]
        self._frozen = [pair for pair in pairs if not pair[0].requires_grad]

    def adopt_frozen(self) -> None:
        """Let the original use the copy's frozen weights, such as the base of an adapter, to keep them once.

        A reference that is held apart becomes bfloat16 as well.
        """
        for original, own in self._frozen:
            original.data = own.data
        if self.policy.reference is not None:
            for p in _to_be_halved(self.policy.reference):
                p.data = _half(p)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the trained weights again, which an update has changed."""
        for original, own in self._trained:
            own.copy_(original)

    def hand_over(self) -> None:
        """Add the gradients of a backward pass to those of the original weights, in their precision."""
        for original, own in self._trained:
            if own.grad is not None:
                grad = own.grad.to(original.dtype)
                original.grad = grad if original.grad is None else original.grad.add_(grad)
                own.grad = None

    def average_gradients(self, accelerator: Any) -> None:
        """Average the gradients over processes, as accelerate does where it wraps the model."""
        if accelerator.num_processes > 1:
            for p in self._original.trainable_parameters():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = accelerator.reduce(grad, reduction="mean")


def with_eager_attention(model: nn.Module) -> nn.Module:
    """Return the same model, with the same weights, whose attention is computed by its plain formula.

    Raises:
        Refused: the model has no such attention.
    """
    twin: Any = _copied(model, {})
    try:
        twin.set_attn_implementation("eager")
    except Exception as error:  # code of any architecture
        raise Refused(
            f"training_attention='eager' does not work with this model ({describe(error)}). Give as_loaded."
        ) from error
    return twin  # type: ignore[no-any-return]


def _copied(model: nn.Module, other: dict[int, Any]) -> nn.Module:
    """Copy modules and configuration; weights and buffers are shared, but for the `other` ones by id."""
    shared: Iterable[torch.Tensor] = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(x): x for x in shared} | other)


def _half(p: torch.Tensor) -> torch.Tensor:
    return p.detach().to(torch.bfloat16)


def _to_be_halved(model: nn.Module) -> list[nn.Parameter]:
    """Return the float32 weights, but for those that transformers keeps in float32 in any precision."""
    exact = {name for m in model.modules() for name in getattr(m, "_keep_in_fp32_modules_strict", None) or ()}
    return [
        p
        for name, p in model.named_parameters()
        if p.dtype == torch.float32 and not exact & set(name.split("."))
    ]
