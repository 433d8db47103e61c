"""Arguments that say which model is used and how it is held in memory. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenrl.settings import Natural, Positive, Settings

Dtype = Literal["float32", "bfloat16", "float16", "float64", "auto"]


@dataclass(frozen=True)
class HoldingArguments(Settings, group="model"):
    """How the model is made and how it is held in memory."""

    base_seed: Natural = 0
    """Seed of a toy task's own tiny model and of its warm start."""
    dtype: Dtype = "float32"
    """Precision of the weights; auto keeps the precision that they were saved in."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    trust_remote_code: bool = False
    """Run Python code that is shipped with a model."""


@dataclass(frozen=True)
class ModelArguments(HoldingArguments):
    """Which model is used, and how it is held in memory."""

    model: str | None = None
    """Local directory or hub name. Default: the toy task's own tiny model, which is warm-started here and
    cached."""


@dataclass(frozen=True)
class LoraArguments(Settings, group="LoRA"):
    """Low-rank adapters (peft)."""

    lora_r: Natural = 0
    """Rank of a LoRA adapter; 0 trains all weights."""
    lora_alpha: Positive | None = None
    """Scale alpha of the adapter, whose update is multiplied by alpha / rank. Default: twice the rank."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt. Default: all of them but the head."""
