"""What is recorded of a run's data, so that a continuation can tell whether it is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from tokenrl.language.policy.saving import fingerprint as model_fingerprint, tokenizer_fingerprint
from tokenrl.language.tasks.held_out import trained_prompts
from tokenrl.language.tasks.sources import Row
from tokenrl.runs.files import canonical
from tokenrl.runs.resume import Provenance

IN_MEMORY = "in-memory:"
"""How the names of such tasks begin; a fingerprint of the rows follows. No module can have this name."""


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return a warning about values that are missing in some rows, if there are any."""
    columns = dict.fromkeys(name for row in rows for name in row)
    missing = {name: sum(row.get(name) is None for row in rows) for name in columns}
    partly = [f"{name} ({count:,})" for name, count in missing.items() if 0 < count < len(rows)]
    if not partly:
        return []
    return [
        f"of {len(rows):,} training rows some have no value in a column: {', '.join(partly)}. Rewards get None "
        "there."
    ]


def fingerprint(splits: Mapping[str, Sequence[Row]]) -> str:
    """Return 12 hexadecimal digits that equal rows in equal splits share, whatever object held them."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            digest.update(canonical(row).encode() + b"\n")
    return digest.hexdigest()[:12]


def described(splits: Mapping[str, Sequence[Row]]) -> tuple[str, dict[str, Any]]:
    """Return the name of data that was given from Python, and what is recorded of it."""
    digits = fingerprint(splits)
    rows = chain.from_iterable(splits.values())
    return IN_MEMORY + digits, {
        "rows": {split: len(rows) for split, rows in splits.items()},
        "columns": [*dict.fromkeys(chain.from_iterable(rows))],
        "fingerprint": digits,
    }


def recorded(task: Any) -> dict[str, Any]:
    """Return what config.json says besides the name of a task.

    Args:
        task: the task. Data that was given from Python is described as `task_rows`; `chat_prompts`
            says that prompts are chat messages.
    """
    facts: dict[str, Any] = {}
    if task.origin:
        facts["task_rows"] = task.origin
    if any(not isinstance(row["prompt"], str) for row in task.train_prompts):
        facts["chat_prompts"] = True
    return facts


def provenance_of(
    policy: Any, rows: Mapping[str, Sequence[Any]], accelerator: Any = None, task: Any = None
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
    trained = policy.trained_prompts | trained_prompts(next(iter(rows.values())))
    kind = where.device.type
    objects = {} if task is None else {"reward": task.reward, "environment": task.environment}
    return Provenance(fingerprints, processes, kind, objects, trained, fingerprints)
