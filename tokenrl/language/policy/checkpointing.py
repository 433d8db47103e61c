"""Trades time for memory: recomputes activations in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.model import Policy


def enable_gradient_checkpointing(policy: Policy) -> None:
    """Recompute activations in the backward pass, which takes less memory and more time.

    No key/value cache exists then, so the rows of a group do not share the computation of their prompt.

    Raises:
        Refused: the architecture does not support it.
    """
    model: Any = policy.model
    # transformers 5 renamed the method in a later release; its first releases have only the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise Refused(
            f"gradient_checkpointing does not work with this model ({describe(error)}). Leave it off."
        ) from error
    # Under LoRA the embedding is frozen, so without this no input of a block would require a gradient.
    model.enable_input_require_grads()
    model.train()  # transformers checkpoints only in training mode; every dropout rate is zero
    policy.share_prompt = False


@contextmanager
def with_cache(model: nn.Module) -> Iterator[None]:
    """Let a model keep a key/value cache inside the block, even if it recomputes activations in training."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
