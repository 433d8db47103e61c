"""Arguments that say which model is used and how it is held. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelArguments:
    """Which model, and how it is held in memory."""

    model: str | None = None
    """Local directory or hub name. Default: the toy task's own tiny model, warm-started here and cached."""
    base_seed: int = 0
    """Seed of that tiny model and its warm start."""
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = "float32"
    """Precision of the weights; auto: as they were saved."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""


@dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapters (peft)."""

    lora_r: int = 0
    """Rank of a LoRA adapter; 0 trains all weights."""
    lora_alpha: float | None = None
    """Scale of the adapter. Default: twice the rank."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt. Default: all but the head."""
