"""What is recorded of a run's data, so that a continuation can tell whether it is the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from tokenrl.errors import written
from tokenrl.language.tasks.sources import Row

IN_MEMORY = "in-memory:"
"""How the names of such tasks begin; a fingerprint of the rows follows. No module can have this name."""

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
FORMLESS = " whose contents cannot be compared"


def canonical(value: Any) -> Any:
    """Return a value as JSON can write it, the same for equal values in every process.

    Sets have no order of their own, and the text of an object without a `__repr__` holds its address in
    memory: in its stead stands `FORMLESS`.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: canonical(part) for key, part in value.items()}
        return sorted(_text([canonical(key), canonical(part)]) for key, part in value.items())
    if isinstance(value, list | tuple):
        return [canonical(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(_text(canonical(part)) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(canonical(getattr(value, part.name)) for part in fields(value))]
    if hasattr(value, "tolist"):  # an array of numpy, whose text leaves out most of it
        return canonical(value.tolist())
    return ADDRESS.sub(FORMLESS, written(value, str))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return warnings about values that are missing in some rows, and about those that cannot be compared."""
    columns = dict.fromkeys(name for row in rows for name in row)
    missing = {name: sum(row.get(name) is None for row in rows) for name in columns}
    partly = [f"{name} ({count:,})" for name, count in missing.items() if 0 < count < len(rows)]
    formless = [name for name in columns if any(FORMLESS in _text(canonical(row.get(name))) for row in rows)]
    warnings = []
    if partly:
        holes = f"of {len(rows):,} training rows some have no value in a column: {', '.join(partly)}"
        warnings.append(f"{holes}. Rewards get None there.")
    if formless:
        objects = f"the values of {', '.join(formless)} are objects without a __repr__ of their own"
        warnings.append(f"{objects}: if they change, a continuation of this run cannot notice it.")
    return warnings


def fingerprint(splits: Mapping[str, Sequence[Row]]) -> str:
    """Return 12 hexadecimal digits that equal rows in equal splits share, whatever object held them."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            digest.update(_text(canonical(row)).encode() + b"\n")
    return digest.hexdigest()[:12]


def described(splits: Mapping[str, Sequence[Row]]) -> tuple[str, dict[str, Any]]:
    """Return the name of data that was given from Python, and what is recorded of it."""
    columns = dict.fromkeys(name for rows in splits.values() for row in rows for name in row)
    rows = {name: len(rows) for name, rows in splits.items()}
    origin: dict[str, Any] = {"rows": rows, "columns": list(columns), "fingerprint": fingerprint(splits)}
    return IN_MEMORY + origin["fingerprint"], origin


def recorded(task: Any) -> dict[str, Any]:
    """Return what config.json says besides the name of a task.

    Args:
        task: the task, or None. Data that was given from Python is described as `task_rows`; `chat_prompts`
            says that prompts are chat messages.
    """
    origin, rows = getattr(task, "origin", None), getattr(task, "train_prompts", ())
    chats = any(not isinstance(row["prompt"], str) for row in rows)
    return ({"task_rows": origin} if origin else {}) | ({"chat_prompts": True} if chats else {})
