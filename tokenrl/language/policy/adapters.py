"""Adds LoRA adapters through peft, and checks the names of the layers before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.model import Policy, wrap
from tokenrl.language.policy.peft_names import answer_peft


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
        Refused: `r` is below 1, one of the names fits no linear layer, or nothing is left to train.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
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
            f"lora_target_modules holds {', '.join(map(repr, missing))}, but this model has no "
            f"linear layer of that name. Its linear layers are: {', '.join(known)}."
        )
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=0.0,
        target_modules=list(target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in policy.model.modules()),
    )
    answer_peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy.model = get_peft_model(policy.model, config)  # type: ignore[arg-type]
    if not policy.trainable_parameters():
        raise Refused("The adapter leaves no parameter to train. Choose other lora_target_modules.")


def load_adapted(directory: Path, *, dtype: str, trust_remote_code: bool) -> Policy:
    """Load an adapter on its base model, apart from it, so that the adapter can be trained on.

    Args:
        directory: the folder `model/adapter` of a run.
        dtype: precision of the weights.
        trust_remote_code: run Python code that is shipped with the model.

    Raises:
        Refused: the adapter or its base model cannot be loaded.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "is_trainable": True}
    answer_peft()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        model = AutoPeftModelForCausalLM.from_pretrained(str(directory), **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Refused(
            f"The adapter {directory} cannot be loaded on its base model ({describe(error)}). Give "
            f"{directory.parent}, in which both are merged; then all weights count."
        ) from error
    return wrap(model, tokenizer, source=str(directory))


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
