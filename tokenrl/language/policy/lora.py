"""Adds a LoRA adapter to a policy through peft, and checks the names of its layers first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tokenrl.errors import Refused
from tokenrl.language.policy.loading import quietly

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy


def add_lora(
    policy: Policy, *, r: int, alpha: float | None = None, target_modules: Sequence[str] = (), seed: int = 0
) -> None:
    """Wrap the policy's model with a LoRA adapter of rank `r`, in place; only the adapter stays trainable.

    The reference policy of a KL term is then the model as it stands now, with the adapter switched off, so no
    frozen copy is needed.

    Args:
        policy: the policy to adapt.
        r: rank of the update, at least 1.
        alpha: scale of the update (`alpha / r` multiplies it); None means `2 r`.
        target_modules: names of linear layers, such as `q_proj`; empty means every linear layer but the head.
        seed: seed of the adapter's first matrix, which starts at random; the second starts at zero.

    Raises:
        Refused: one of the names fits no linear layer.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    from peft import LoraConfig, get_peft_model

    linear = [name for name, module in policy.model.named_modules() if _is_linear(module)]
    missing = [t for t in target_modules if not any(n == t or n.endswith("." + t) for n in linear)]
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        what = f"lora_target_modules holds {', '.join(map(repr, missing))}"
        raise Refused(f"{what}, but this model's linear layers are: {', '.join(known)}.")
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=0.0,
        target_modules=list(target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in policy.model.modules()),
    )
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        policy.model = get_peft_model(policy.model, config)  # type: ignore[arg-type]
    if config.base_model_name_or_path and Path(config.base_model_name_or_path).is_dir():
        # so that the adapter finds its base from wherever it is loaded
        config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
