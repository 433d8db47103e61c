"""LoRA through peft: which layers to adapt is checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy


def add_lora(
    policy: Policy, *, r: int, alpha: float | None = None, target_modules: Sequence[str] = (), seed: int = 0
) -> None:
    """Wrap the policy's model with a LoRA adapter of rank `r`, in place; only the adapter stays trainable.

    Its reference is the model as it stands now: the adapter switched off.

    Args:
        policy: the policy to adapt.
        r: rank of the update, at least 1.
        alpha: scale of the update (`alpha / r` multiplies it); None means `2 r`.
        target_modules: names of linear layers, as `q_proj`; empty means every linear layer but the head.
        seed: seed of the adapter's random half.

    Raises:
        Refused: a name that fits no layer (also when the others fit), or nothing left to train.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if r < 1:
        raise Refused(f"lora_r={r} is not a rank: give 1 or more (8 and 16 are common), or leave LoRA off.")
    names = [name for name, module in policy.model.named_modules() if _adaptable(module)]
    missing = [t for t in target_modules if not any(n == t or n.endswith("." + t) for n in names)]
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise Refused(
            f"lora_target_modules names {', '.join(map(repr, missing))}, which no linear layer of this model "
            f"is called. Its linear layers are: {', '.join(known)}."
        )
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=0.0,
        target_modules=list(target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in policy.model.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy.model = get_peft_model(policy.model, config)  # type: ignore[arg-type]
    if not policy.trainable_parameters():
        raise Refused("The adapter left no trainable parameter; choose other lora_target_modules.")


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
