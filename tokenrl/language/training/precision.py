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

from tokenrl.language.policy.model import Policy


class HalfCopy:
    """A copy of a policy whose weights are bfloat16, and whose gradients go to the policy's own weights.

    Attributes:
        policy: the copy. Buffers, such as the frequencies of rotary positions, are those of the original.
    """

    def __init__(self, policy: Policy) -> None:
        """Copy the weights; the original stays as it is."""
        exact = _exact_names(policy.model)
        pairs = {
            name: (p, nn.Parameter(_half(name, p, exact), requires_grad=p.requires_grad))
            for name, p in policy.model.named_parameters()
        }
        model = _copied(policy.model, {id(p): own for p, own in pairs.values()})
        self.policy = replace(policy, model=model)
        self._pairs = list(pairs.values())
        for original, own in self._pairs:
            if own.requires_grad:
                own.register_post_accumulate_grad_hook(_handing_to(original))

    def adopt_frozen(self) -> None:
        """Let the original use the copy's frozen weights, such as the base of an adapter, to keep them once.

        The same goes for a reference that is held apart.
        """
        for original, own in self._pairs:
            if not original.requires_grad:
                original.data = own.data
        if self.policy.reference is not None:
            exact = _exact_names(self.policy.reference)
            for name, p in self.policy.reference.named_parameters():
                p.data = _half(name, p, exact)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the trainable weights again, which an update has changed."""
        for original, own in self._pairs:
            if original.requires_grad:
                own.copy_(original)

    def average_gradients(self, accelerator: Any) -> None:
        """Average the gradients over processes, as accelerate does where it wraps the model."""
        if accelerator.num_processes > 1:
            for original, _ in self._pairs:
                if original.requires_grad:
                    grad = torch.zeros_like(original) if original.grad is None else original.grad
                    original.grad = accelerator.reduce(grad, reduction="mean")


def with_eager_attention(model: nn.Module) -> nn.Module:
    """Return the same model, with the same weights, whose attention is computed by its plain formula."""
    twin: Any = _copied(model, {})
    twin.set_attn_implementation("eager")
    return twin  # type: ignore[no-any-return]


def _copied(model: nn.Module, other: dict[int, Any]) -> nn.Module:
    """Copy modules and configuration; weights and buffers are shared, but for the `other` ones by id."""
    shared: Iterable[torch.Tensor] = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(x): x for x in shared} | other)


def _handing_to(original: nn.Parameter) -> Any:
    """Return a hook that adds a gradient to that of the original weight, in its precision."""

    def hand_over(own: torch.Tensor) -> None:
        assert own.grad is not None
        grad = own.grad.to(original.dtype)
        original.grad = grad if original.grad is None else original.grad.add_(grad)
        own.grad = None

    return hand_over


def _half(name: str, p: torch.Tensor, exact: set[str]) -> torch.Tensor:
    keep = p.dtype != torch.float32 or exact & set(name.split("."))
    return p.detach().clone() if keep else p.detach().to(torch.bfloat16)


def _exact_names(model: nn.Module) -> set[str]:
    """Return the names of modules and weights that transformers keeps in float32 in any precision."""
    return {name for m in model.modules() for name in getattr(m, "_keep_in_fp32_modules_strict", None) or ()}
