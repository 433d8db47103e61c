"""Computes prompts once for several passes over their completions, and sends the gradient back once.

The completions of each pass get the prompts' keys and values as numbers of their own, whose gradients add up
over the passes. One backward pass through the prompts follows the last of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tokenrl.errors import Refused
from tokenrl.language.rollout.cache import OTHERS, Cache


class PromptPass(NamedTuple):
    """What the forward pass of B prompts leaves for their completions.

    Attributes:
        last: logits of the first token of completions [B, 1, V]; if the head was left out, what it would have
            been given [B, 1, H].
        state: the last hidden state before that token [B, 1, H]; None unless asked for.
        cache: the cache of the prompts.
    """

    last: Tensor
    state: Tensor | None
    cache: Cache


class SharedPrompts:
    """The forward pass of some prompts, from which several passes over completions go on.

    Attributes:
        rows: numbers of the completions whose prompts are shared [n].
    """

    def __init__(self, rows: Tensor) -> None:
        """Compute nothing yet."""
        self.rows = rows
        self._first: PromptPass | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def take(self, compute: Callable[[], PromptPass]) -> PromptPass:
        """Return the forward pass of the prompts, which the first call computes, with a cache of its own.

        Raises:
            Refused: the model keeps something else than keys and values of all tokens.
        """
        if self._first is None:
            found = compute()
            if not found.cache.plain:
                raise Refused(OTHERS)
            state = None if found.state is None else self._apart(found.state)
            self._first = PromptPass(self._apart(found.last), state, found.cache.changed(self._apart))
        return self._first._replace(cache=self._first.cache.changed(lambda x: x))

    def backward(self) -> None:
        """Send the gradients that the passes have left back through the prompts."""
        pairs = [(whole, own.grad) for whole, own in self._pairs if own.grad is not None]
        if pairs:
            outputs, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, gradients)
        self._first, self._pairs = None, []

    def _apart(self, x: Tensor) -> Tensor:
        """Return the same numbers, whose gradient is kept for `backward`."""
        own = x.detach()
        if x.requires_grad:
            self._pairs.append((x, own.requires_grad_()))
        return own
