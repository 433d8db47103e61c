"""Adds LoRA adapters through peft, and checks the names of the layers before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.fingerprints import BASE, check_base, check_base_is_named
from tokenrl.language.policy.intact import intact_model
from tokenrl.language.policy.model import Policy, wrap
from tokenrl.language.policy.peft_names import answer_peft
from tokenrl.runs.files import write_json


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
    if config.base_model_name_or_path and Path(config.base_model_name_or_path).is_dir():
        # so that the adapter finds its base from wherever it is loaded
        config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
    if not policy.trainable_parameters():
        raise Refused("The adapter leaves no parameter to train. Choose other lora_target_modules.")


def load_adapted(directory: Path, *, dtype: str, trust_remote_code: bool) -> Policy:
    """Load an adapter on its base model, apart from it, so that the adapter can be trained on.

    Args:
        directory: the folder `model/adapter` of a run.
        dtype: precision of the weights.
        trust_remote_code: run Python code that is shipped with the model.

    Raises:
        Refused: the adapter or its base model cannot be loaded, or the base is not that of the adapter.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "is_trainable": True}
    answer_peft()
    intact_model(directory)
    check_base_is_named(Path(directory) / "adapter_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        model = AutoPeftModelForCausalLM.from_pretrained(str(directory), **options)
    except Exception as error:  # configuration, weights and tokenizer files each have errors of their own
        raise Refused(
            f"The adapter {directory} cannot be loaded on its base model ({describe(error)}). Give "
            f"{directory.parent}, in which both are merged; then all weights count."
        ) from error
    check_base(model, Path(directory))
    return wrap(model, tokenizer, source=str(directory))


def check_adapter(policy: Policy) -> None:
    """Check that the adapter alone holds all that is trained, so that a checkpoint of it is complete.

    Raises:
        Refused: weights outside the adapter are trained too.
    """
    from peft import get_peft_model_state_dict

    model: Any = policy.model
    held = {w.data_ptr() for w in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in held]
    if outside:
        raise Refused(
            f"The model has an adapter, but {len(outside)} weights outside it would be trained too, such as "
            f"{outside[0]}. Freeze them (requires_grad_(False)), name their modules in peft's "
            "modules_to_save, or merge the adapter and train all weights."
        )


def write_adapter(policy: Policy, folder: Path, base: Mapping[str, Any]) -> None:
    """Write the adapter alone, with its tokenizer and the fingerprint of the base that it belongs to.

    Args:
        policy: a policy with an adapter.
        folder: is made if absent, and then loads as a model, on top of the base.
        base: what `base_of` returned for the policy's model.
    """
    model: Any = policy.model
    # Frozen embeddings belong to the base; otherwise peft would ask the hub for the base's configuration.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template, without content
    policy.tokenizer.save_pretrained(folder)
    write_json(folder / BASE, base)


def read_adapter(policy: Policy, folder: Path) -> None:
    """Give a policy's adapter the weights that `write_adapter` wrote, bit for bit.

    Args:
        policy: a policy with an adapter of the same shape, on the same base.
        folder: what `write_adapter` wrote.

    Raises:
        Refused: the folder holds no adapter, another one, or one that was trained on another base.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    model: Any = policy.model
    try:
        saved = load_file(folder / "adapter_model.safetensors")
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        if {name: w.shape for name, w in saved.items()} != {name: w.shape for name, w in own.items()}:
            raise ValueError("the names or the shapes of its weights differ")
    except Exception as error:  # files that are absent, damaged or something else raise many kinds of errors
        raise Refused(
            f"The adapter in {folder} is not that of this run ({describe(error)}). Resume with the model, "
            "the rank and the target modules that the run was started with, or start a new run."
        ) from error
    check_base(model, folder)
    set_peft_model_state_dict(model, saved)


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
