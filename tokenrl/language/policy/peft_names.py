"""Answers a question of peft under the name that peft knows."""

from __future__ import annotations

from typing import Any


def answer_peft() -> None:
    """Let models say whether they checkpoint activations without a FutureWarning.

    peft asks for it under the name that it had before transformers 5, and the old name warns.
    """
    import transformers

    kind: Any = transformers.PreTrainedModel
    if hasattr(kind, "is_activation_checkpointing"):
        kind.is_gradient_checkpointing = kind.is_activation_checkpointing
