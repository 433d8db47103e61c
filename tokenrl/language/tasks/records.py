"""What is recorded of a run's data, so that a continuation can tell whether it is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenrl.files import canonical
from tokenrl.language.policy.saving import fingerprint as model_fingerprint, tokenizer_fingerprint
from tokenrl.language.tasks.rows import Rows, digits
from tokenrl.language.tasks.sources import IN_MEMORY
from tokenrl.runs.resume import Provenance


def remarks(rows: Rows) -> list[str]:
    """Return a warning about values that are missing in some rows, if there are any."""
    partly = []
    for name, values in rows.columns.items():
        missing = values.count(None)
        if 0 < missing < len(rows):
            partly.append(f"{name} ({missing:,})")
    if not partly:
        return []
    return [
        f"of {len(rows):,} training rows some have no value in a column: {', '.join(partly)}. Rewards get None "
        "there."
    ]


def fingerprint(splits: Mapping[str, Rows]) -> str:
    """Return 12 hexadecimal digits that equal rows in equal splits share, whatever object held them."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            digest.update(canonical(row).encode() + b"\n")
    return digest.hexdigest()[:12]


def described(splits: Mapping[str, Rows]) -> tuple[str, dict[str, Any]]:
    """Return the name of data that was given from Python, and what is recorded of it."""
    digits = fingerprint(splits)
    return IN_MEMORY + digits, {
        "rows": {split: len(rows) for split, rows in splits.items()},
        "columns": [*dict.fromkeys(name for rows in splits.values() for name in rows.columns)],
        "fingerprint": digits,
    }


def recorded(task: Any) -> dict[str, Any]:
    """Return what config.json says besides the name of a task.

    Args:
        task: the task. Data that was given from Python is described as `task_rows`; `chat_prompts`
            says that prompts are chat messages.
    """
    facts = {}
    if task.origin:
        facts["task_rows"] = task.origin
    if any(not isinstance(prompt, str) for prompt in task.train_prompts.columns["prompt"]):
        facts["chat_prompts"] = True
    return facts


def provenance_of(
    policy: Any, rows: Mapping[str, Rows], accelerator: Any = None, task: Any = None
) -> Provenance:
    """Return the provenance of a run, before its first step; only a run of the same can continue it.

    Args:
        policy: the policy or the reward model, with the weights that it starts from.
        rows: all rows of data that decide what is learnt, in named parts; the first part is trained on.
        accelerator: accelerate's handle of device and processes; None for one process without it.
        task: the task, if its own rewards or its environment count.
    """
    fingerprints = {
        "data": fingerprint(rows),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "base model": model_fingerprint(policy.model),
    }
    where = policy.model if accelerator is None else accelerator
    processes = getattr(where, "num_processes", 1)
    trained = policy.trained_prompts.union(digits(np.unique(next(iter(rows.values())).keys)))
    kind = where.device.type
    objects = {} if task is None else {"reward": task.reward, "environment": task.environment}
    return Provenance(fingerprints, processes, kind, trained, fingerprints, objects=objects)
