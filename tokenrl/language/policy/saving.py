"""Saves a model so that plain transformers can load it, writes its model card, and reads weights back."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.loading import quietly
from tokenrl.runs.files import write_json, write_text

BASE = "base.json"
"""In the folder of an adapter: the fingerprint of the base that it was trained on."""


@quietly()
def save_policy(policy: Any, directory: Path, *, card: Card | None = None) -> None:
    """Write the model and the tokenizer with `save_pretrained`, and the model card.

    An adapter is merged into a copy of the weights, so that transformers alone can load the model; the
    adapter alone is written to `adapter/`.

    Args:
        policy: the policy or the reward model to save.
        directory: an existing folder.
        card: what README.md says, in the folder of the adapter too; None writes no card.
    """
    model = policy.model
    if has_adapter(model):
        write_adapter(policy, directory / "adapter", base_of(model))
        if card is not None:
            write_text(directory / "adapter" / "README.md", replace(card, kind="adapter").text())
        model = merged(copy.deepcopy(model))
    model.save_pretrained(directory)
    write_generation(policy, model, directory)
    policy.tokenizer.save_pretrained(directory)
    if card is not None:
        write_text(directory / "README.md", card.text())


def merged(model: Any) -> Any:
    """Merge an adapter into the weights of its model, in place.

    A weight that an adapted layer shares with another layer, as a head does with the embedding, becomes two,
    since the adapter changes only one of them.

    Args:
        model: a model wrapped by peft.

    Returns:
        The model without the adapter.
    """
    owners, tied = defaultdict(list), True
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            owners[weight].append((path, module, name))
    for weight, (first, *others) in owners.items():
        is_adapted = any(
            re.search("base_layer|original_module", path) for path, *_ in (first, *others)
        )
        for _, module, name in others if is_adapted else ():
            setattr(module, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))
            tied = False
    whole = model.merge_and_unload()
    for config in () if tied else (whole.config, whole.config.get_text_config()):
        config.tie_word_embeddings = False
    return whole


def write_generation(policy: Any, model: Any, directory: Path) -> None:
    """Write how transformers generates with a model, whose completions end where those of the policy do."""
    settings = copy.deepcopy(getattr(model, "generation_config", None))
    if settings is None:  # of a reward model
        return
    stops = getattr(policy, "stops", None)
    if ends := sorted({*policy.eos_ids, *(stops.ids if stops else ())}):
        settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    settings.save_pretrained(directory)


def has_adapter(model: Any) -> bool:
    """Return whether a model is wrapped by peft."""
    return hasattr(model, "disable_adapter")


@quietly()
def read_weights(model: Any, folder: Path) -> None:
    """Give a model the weights that its `save_pretrained` wrote, bit for bit: all of them, or its adapter's.

    Args:
        model: a model of transformers, of the same class and shape as the saved one.
        folder: a local folder.

    Raises:
        Refused: the weights cannot be read, or are those of another model.
    """
    try:
        (_read_adapter if has_adapter(model) else _read_whole)(model, folder)
    except Refused:
        raise
    except (
        Exception
    ) as error:  # files that are absent, damaged or something else raise many kinds of errors
        raise Refused(
            f"The weights in {folder} are not those of this run's model ({describe(error)}). Resume with the "
            "model and the settings that the run was started with, or start a new run from these weights."
        ) from error


def _read_whole(model: Any, folder: Path) -> None:
    """Read all weights as transformers does: names on the disk may differ from those of the model."""
    # The widest precision of the model holds each of its weights without rounding.
    kinds = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    form: Any = {"dtype": reduce(torch.promote_types, kinds), "config": copy.deepcopy(model.config)}
    with torch.random.fork_rng(devices=[]):  # some classes draw weights before they load them
        saved, mismatch = type(model).from_pretrained(
            folder, **form, output_loading_info=True, local_files_only=True
        )
    if wrong := [
        *mismatch["missing_keys"],
        *mismatch["mismatched_keys"],
        *mismatch["unexpected_keys"],
    ]:
        raise ValueError(
            f"the names or the shapes of {len(wrong)} weights differ, such as {wrong[0]}"
        )
    model.load_state_dict(saved.state_dict())


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """Return an adapter's weights; frozen embeddings belong to the base, of which peft would ask the hub."""
    from peft import get_peft_model_state_dict

    name = model.active_adapter
    return dict(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))


def write_adapter(policy: Any, folder: Path, base: Mapping[str, Any]) -> None:
    """Write the adapter alone, with its tokenizer and what `base_of` says of the base it belongs to."""
    name = policy.model.active_adapter
    policy.model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=[name])
    if name != "default":  # peft writes such an adapter into a folder of its name
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # peft's template, without content
    policy.tokenizer.save_pretrained(folder)
    write_json(folder / BASE, base)


def _read_adapter(model: Any, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    saved, present = load_file(folder / "adapter_model.safetensors"), adapter_weights(model)
    if {name: w.shape for name, w in saved.items()} != {
        name: w.shape for name, w in present.items()
    }:
        raise ValueError("the names or the shapes of its adapter's weights differ")
    check_base(model, folder)
    set_peft_model_state_dict(model, saved, adapter_name=model.active_adapter)


def check_base(model: Any, folder: Path) -> None:
    """Check that an adapter has been put on the base that it was trained on, if its folder tells.

    A base in another precision has other bytes, so then nothing can be said.

    Args:
        model: the model with the adapter.
        folder: the folder of the adapter.

    Raises:
        Refused: the weights of the base differ.
    """
    if not (folder / BASE).exists():  # written by peft itself
        return
    recorded, base = json.loads((folder / BASE).read_bytes()), base_of(model)
    if recorded["dtypes"] == base["dtypes"] and recorded != base:
        name = getattr(model.get_base_model(), "name_or_path", "") or "in memory"
        raise Refused(
            f"The adapter in {folder} was trained on another base than the model {name}: their weights "
            "differ. Give the run's model/, in which base and adapter are merged."
        )


def base_of(model: nn.Module) -> dict[str, Any]:
    """Return what tells the base under an adapter apart from others: its fingerprint and its precision."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {"sha256": _hash_of(frozen), "dtypes": sorted({str(p.dtype) for p in frozen.values()})}


def fingerprint(model: nn.Module) -> str:
    """Hash the names, precisions, shapes and bytes of all weights and saved buffers of a model.

    Returns:
        A SHA-256 in hexadecimal digits, the same in every process and on every machine.
    """
    return _hash_of(model.state_dict())


def _hash_of(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what decides how a tokenizer writes text as ids, and ids as text.

    That is the vocabulary with its merges and every rule of a fast tokenizer, the special tokens, and the
    chat template. Padding and truncation, which each use may set anew, do not count.

    Returns:
        A SHA-256 in hexadecimal digits, the same in every process and on every machine.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    content = {
        "rules": {
            name: rule for name, rule in rules.items() if name not in ("padding", "truncation")
        },
        "vocabulary": tokenizer.get_vocab() if backend is None else None,
        "special tokens": tokenizer.special_tokens_map,
        "special ids": sorted(tokenizer.all_special_ids),
        "chat template": getattr(tokenizer, "chat_template", None),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


KINDS = {
    "policy": (
        "transformers",
        "AutoModelForCausalLM",
        "This model was trained by tokenrl. It loads so:",
    ),
    "adapter": (
        "peft",
        "AutoPeftModelForCausalLM",
        "This is a LoRA adapter alone, trained by tokenrl.",
    ),
    "reward model": (
        *("transformers", "AutoModelForSequenceClassification"),
        "A reward model: one number for prompt + completion, trained on preferences.",
    ),
}
"""By kind of card, the library and its class that load what is saved beside the card, and what that is."""
_MARKS = re.compile(r"[\\`*~$&<|\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown or mathematics in it may read as a mark; an underscore only at the edge of a word."""


@dataclass(frozen=True)
class Card:
    """What a model card says, the README.md beside saved weights: what the model is, and how to load it.

    Attributes:
        title: the heading.
        facts: rows of the table.
        origin: lines of Markdown that say how the run was started.
        base: the model that training started from, as it was given: the card names a directory or a hub name.
        tags: how the model was trained, as the hub's tags.
        kind: "policy", its "adapter" alone, or "reward model".
    """

    title: str
    facts: Mapping[str, Any]
    origin: Sequence[str]
    base: Any = None
    tags: Sequence[str] = ("reinforcement-learning", "reinforce")
    kind: str = "policy"

    def text(self) -> str:
        """Return the card as Markdown, with the front matter that the hub reads."""
        from huggingface_hub import ModelCardData

        library, auto, about = KINDS[self.kind]
        data = ModelCardData(
            library_name=library,
            base_model=os.fspath(self.base) if isinstance(self.base, str | os.PathLike) else None,
            pipeline_tag="text-classification"
            if self.kind == "reward model"
            else "text-generation",
            tags=[*self.tags, *(["lora"] if self.kind == "adapter" else []), "tokenrl"],
        )
        lines = [
            *("---", data.to_yaml().strip(), "---", f"# {_plain(self.title)}", "", about, ""),
            *(
                "```python",
                "from transformers import AutoTokenizer",
                f"from {library} import {auto}",
            ),
            f"model = {auto}.from_pretrained(DIRECTORY)",
            *(
                "tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)",
                "```",
                "",
                "| | |",
                "|---|---|",
            ),
            *(f"| {_plain(name)} | {_plain(value)} |" for name, value in self.facts.items()),
            *("", *self.origin, ""),
        ]
        return "\n".join(lines)


def _plain(value: Any) -> str:
    """Write a value on one line so that Markdown shows it as it is, in a table too."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _MARKS.sub(r"\\\g<0>", " ".join(text.splitlines()))
