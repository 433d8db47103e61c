"""Saves a model so that plain transformers can load it, writes its model card, and reads weights back."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, read_file, refusing
from tokenrl.files import write_json, write_text
from tokenrl.language.policy.arguments import run_of
from tokenrl.language.policy.loading import quietly, refuse_attention_of_hub

CONFIG = "adapter_config.json"
KEPT = ("bos_token_id", "pad_token_id", "eos_token_id", "max_length", "max_new_tokens")
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""How transformers draws from the distribution of the logits themselves; by default it keeps 50 tokens."""
BASE = "base.json"
"""In the folder of an adapter: the fingerprint of the base that it was trained on."""


@quietly()
def save_policy(
    policy: Any, directory: Path, *, card: Card | None = None, distribution: dict[str, Any] = DRAWN
) -> None:
    """Write the model and the tokenizer with `save_pretrained`, and the model card.

    An adapter is merged into a copy of the weights, so that transformers alone can load the model; the
    adapter alone is written to `adapter/`.

    Args:
        policy: the policy or the reward model to save.
        directory: an existing folder.
        card: what README.md says, in the folder of the adapter too; None writes no card. With a card the folder
            is for others, and no directory of this machine is named in it.
        distribution: how tokens were drawn in training, as `GenerationConfig` names it.
    """
    model = policy.model
    if has_adapter(model):
        settings = model.active_peft_config
        base = settings.base_model_name_or_path or ""
        is_ours = card is not None and os.path.isdir(base)
        with patch.object(settings, "base_model_name_or_path", "" if is_ours else base):
            write_adapter(policy, directory / "adapter", base_of(model))
        if card is not None:
            write_text(directory / "adapter" / "README.md", replace(card, kind="adapter").text())
        model = merged(copy.deepcopy(model))
    with patch.object(model, "can_generate", return_value=False):  # how is written below
        model.save_pretrained(directory)
    write_generation(policy, model, directory, distribution)
    policy.tokenizer.save_pretrained(directory)
    if card is not None:
        write_text(directory / "README.md", card.text())


def base_named(name: str, trust_remote_code: bool) -> tuple[str, str | None]:
    """Return the base of an adapter, and its revision on the hub; it may be a checkpoint of the run that names it.

    Args:
        name: the directory or hub name of the adapter.
        trust_remote_code: whether programs may run that the base names.

    Raises:
        Refused: no base is named, or adapter or base cannot be used.
    """
    from peft import PeftConfig

    run = run_of(name) or Path(name)
    for folder in (name, *[str(file.parent) for file in run.glob(f"checkpoints/*/{CONFIG}")]):
        config = PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning or getattr(config, "megatron_config", None):
            raise Refused(
                f"The adapter, of the kind {config.peft_type.value}, adds to prompts or needs layers of Megatron, so "
                "no base can take it over: give a model with a LoRA adapter of linear layers, or without any."
            )
        if base := config.base_model_name_or_path:
            if not trust_remote_code:
                refuse_attention_of_hub(base, config.revision)
            return base, config.revision
    raise Refused(
        f"{name} does not name the base that the adapter belongs to, which was in memory or a directory: give the "
        f"run's model/, in which both are merged, or write the base's directory into its {CONFIG}."
    )


def with_adapter(model: Any, tokenizer: Any, name: str) -> Any:
    """Return a base with the adapter of a directory or hub name, whose tokenizer may have more tokens."""
    from peft import PeftModelForCausalLM

    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model = PeftModelForCausalLM.from_pretrained(model, name, is_trainable=True)
    check_base(model, Path(name))
    return model


def merged(model: Any) -> Any:
    """Merge an adapter into the weights of its model, in place.

    Where the adapter changes the embedding or a head that shares its weights, the two weights become two.

    Args:
        model: a model wrapped by peft.

    Returns:
        The model without the adapter.
    """
    base = model.get_base_model()
    embedding = base.get_input_embeddings()
    head = base.get_output_embeddings()
    is_adapted = hasattr(embedding, "base_layer") or hasattr(head, "base_layer")
    if is_adapted and head.weight is embedding.weight:
        layer = getattr(head, "base_layer", head)
        layer.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    whole = model.merge_and_unload()
    head = whole.get_output_embeddings()
    # Later releases of peft than 0.18 do this themselves.
    if head is not None and head.weight is not whole.get_input_embeddings().weight:
        whole.config.tie_word_embeddings = False
        whole.config.get_text_config().tie_word_embeddings = False
    return whole


def write_generation(
    policy: Any, model: Any, directory: Path, distribution: dict[str, Any]
) -> None:
    """Write how transformers generates with a model: its completions are drawn and end as those of the policy.

    Of the settings that the base model came with, special tokens and limits of length stay. The distribution is
    that of training, as `GenerationConfig` names it.
    """
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    if settings is None:  # of a reward model
        return
    values = {name: getattr(settings, name) for name in KEPT} | DRAWN | distribution
    values.pop("allowed", None)  # which transformers cannot hold; the run's settings do
    if ends := policy.ends:
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    GenerationConfig(**values).save_pretrained(directory)


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
    with refusing(
        f"The weights in {folder} are not those of this run's model",
        "Resume with the model and the settings that the run was started with, or start a new run from these weights.",
    ):
        (_read_adapter if has_adapter(model) else _read_whole)(model, folder)


def _read_whole(model: Any, folder: Path) -> None:
    """Read all weights as transformers does: names on the disk may differ from those of the model."""
    # The widest precision of the model holds each of its weights without rounding.
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    with torch.random.fork_rng(devices=[]):  # some classes draw weights before they load them
        saved, keys = type(model).from_pretrained(
            folder,
            dtype=reduce(torch.promote_types, dtypes),
            config=copy.deepcopy(model.config),
            output_loading_info=True,
            local_files_only=True,
        )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys[kind]:
            raise ValueError(f"{kind}: {', '.join(map(str, keys[kind]))[:200]}")
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

    saved = load_file(folder / "adapter_model.safetensors")
    if weight_shapes(saved.items()) != weight_shapes(adapter_weights(model).items()):
        raise ValueError("the names or the shapes of its adapter's weights differ")
    check_base(model, folder)
    set_peft_model_state_dict(model, saved, adapter_name=model.active_adapter)


def weight_shapes(weights: Iterable[tuple[str, Tensor]]) -> dict[str, torch.Size]:
    """Return the shapes of named weights."""
    return {name: weight.shape for name, weight in weights}


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
    recorded = json.loads(read_file(folder / BASE))
    base = base_of(model)
    if recorded["dtypes"] == base["dtypes"] and recorded != base:
        name = getattr(model.get_base_model(), "name_or_path", "") or "in memory"
        raise Refused(
            f"The adapter in {folder} was trained on another base than the model {name}: their weights "
            "differ. Give the run's model/, in which base and adapter are merged."
        )


def base_of(model: nn.Module) -> dict[str, Any]:
    """Return what tells the base under an adapter apart from others: its fingerprint and its precision."""
    parameters = model.named_parameters()
    frozen = {name: weight.detach() for name, weight in parameters if not weight.requires_grad}
    dtypes = {str(weight.dtype) for weight in frozen.values()}
    return {"sha256": _hash_of(frozen), "dtypes": sorted(dtypes)}


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
    rules.pop("padding", None)
    rules.pop("truncation", None)
    content = {
        "rules": rules,
        "vocabulary": tokenizer.get_vocab() if backend is None else None,
        "special tokens": tokenizer.special_tokens_map,
        "special ids": sorted(tokenizer.all_special_ids),
        "chat template": getattr(tokenizer, "chat_template", None),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


AUTO_CLASSES = {
    "policy": "AutoModelForCausalLM",
    "adapter": "AutoPeftModelForCausalLM",
    "reward model": "AutoModelForSequenceClassification",
}
"""By kind of card, the class that loads what is saved beside the card."""
CARD = """\
---
{{ front }}
---
# {{ plain(card.title) }}

{% if card.kind == "policy" -%}
This model was trained by tokenrl. It loads so:
{%- elif card.kind == "adapter" -%}
This is a LoRA adapter alone, trained by tokenrl.
{%- else -%}
A reward model: one number for prompt + completion, trained on preferences.
{%- endif %}

```python
from transformers import AutoTokenizer
from {{ library }} import {{ auto }}
model = {{ auto }}.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
```

| | |
|---|---|
{% for name, value in card.facts.items() -%}
| {{ plain(name) }} | {{ plain(value) }} |
{% endfor %}
{% for line in card.origin -%}
{{ line }}
{% endfor %}
`trained_prompts.txt` holds hashes of the prompts that the model was trained on, without a salt.
Whoever guesses a prompt can test it there: if the prompts are private, remove the file before you share the model.
"""
"""Template of a card."""
_MARKS = re.compile(r"[\\`*~$&<|\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown or mathematics in it may read as a mark; an underscore only at the edge of a word."""
_DIRECTORIES = re.compile(r"(?<=')/[^'\n]*/|(?<=\| )/[^|\n]*/|(?<![\w:./-])~?/(?:[^\s/]+/)+(?=\S)")
"""The directories of an absolute path, also of one with spaces in quotes or in a table."""


@dataclass(frozen=True)
class Card:
    """What a model card says, the README.md beside saved weights: what the model is, and how to load it.

    Attributes:
        title: the heading.
        facts: rows of the table.
        origin: lines of Markdown that say how the run was started.
        base: the model that training started from, as it was given: the front matter has the name of a hub model.
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
        """Return the card as Markdown, with the front matter that the hub reads, and no path of this machine."""
        from huggingface_hub import ModelCardData
        from jinja2 import Template

        auto = AUTO_CLASSES[self.kind]
        is_adapter = self.kind == "adapter"
        library = "peft" if is_adapter else "transformers"
        tags = [*self.tags, "lora"] if is_adapter else self.tags
        is_classifier = self.kind == "reward model"
        is_name = isinstance(self.base, str | os.PathLike) and not os.path.isdir(self.base)
        data = ModelCardData(
            library_name=library,
            base_model=os.fspath(self.base) if is_name else None,
            pipeline_tag="text-classification" if is_classifier else "text-generation",
            tags=[*tags, "tokenrl"],
        )
        template = Template(CARD, keep_trailing_newline=True)
        front = data.to_yaml().strip()
        text = template.render(card=self, front=front, library=library, auto=auto, plain=_plain)
        return _DIRECTORIES.sub("", text)


def _plain(value: Any) -> str:
    """Write a value on one line so that Markdown shows it as it is, in a table too."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _MARKS.sub(r"\\\g<0>", " ".join(text.splitlines()))
