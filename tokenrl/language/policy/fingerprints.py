"""Tells weights and tokenizers apart by hashes that are the same in every process and on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, describe

BASE = "base.json"
"""In the folder of an adapter: the fingerprint of the base that it was trained on."""


def fingerprint(model: nn.Module) -> str:
    """Hash the names, precisions, shapes and bytes of all weights and saved buffers of a model.

    Returns:
        A SHA-256 in hexadecimal digits.
    """
    return _hash_of(model.state_dict().items())


def frozen_fingerprint(model: nn.Module) -> str:
    """Hash, like `fingerprint`, the parameters that are not trained: under an adapter those of its base."""
    return _hash_of((name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what decides how a tokenizer writes text as ids, and ids as text.

    That is the vocabulary with its merges and every rule of a fast tokenizer, the special tokens, and the
    chat template. Padding and truncation, which each use may set anew, do not count.

    Returns:
        A SHA-256 in hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    for passing in ("padding", "truncation"):
        rules.pop(passing, None)
    known = {
        "rules": rules,
        "vocabulary": tokenizer.get_vocab() if backend is None else None,
        "special tokens": tokenizer.special_tokens_map,
        "special ids": sorted(tokenizer.all_special_ids),
        "chat template": getattr(tokenizer, "chat_template", None),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def base_of(model: nn.Module) -> dict[str, Any]:
    """Return what tells the base under an adapter apart from others: its fingerprint and its precision."""
    return {"sha256": frozen_fingerprint(model), "dtypes": _frozen_dtypes(model)}


def check_base_is_named(config: Path) -> None:
    """Check that the adapter_config.json of an adapter says which base to load; peft would ask for "None".

    Raises:
        Refused: it does not, or it is damaged.
    """
    if config.is_file() and not _read(config).get("base_model_name_or_path"):
        raise Refused(
            f"{config} does not name the base model that the adapter belongs to: the base was given in "
            "memory. Give the run's model/, in which base and adapter are merged, or write the directory or "
            "hub name of the base there, as base_model_name_or_path."
        )


def check_base(model: Any, folder: Path) -> None:
    """Check that an adapter has been put on the base that it was trained on, if its folder tells.

    A base in another precision has other bytes, so then nothing can be said.

    Args:
        model: the model with the adapter.
        folder: what `write_adapter` wrote.

    Raises:
        Refused: the weights of the base differ, or the fingerprint is damaged.
    """
    file = folder / BASE
    if not file.is_file():  # written by peft itself
        return
    known = _read(file)
    if known.get("dtypes") == _frozen_dtypes(model) and known != base_of(model):
        name = getattr(model.get_base_model(), "name_or_path", "") or "in memory"
        raise Refused(
            f"The adapter in {folder} was trained on another base than the model {name}: their weights "
            "differ. The base may have been given in memory, warm-started, merged with an earlier adapter or "
            "changed since. Give the run's model/, in which base and adapter are merged, or load the adapter "
            "onto its base yourself."
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{file} is damaged ({describe(error)}). Give another copy of the adapter.") from error


def _hash_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _frozen_dtypes(model: nn.Module) -> list[str]:
    return sorted({str(p.dtype) for p in model.parameters() if not p.requires_grad})
