"""Takes prompts that are given from Python: a `datasets.Dataset`, splits of such data, or a list of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenrl.errors import Refused
from tokenrl.language.tasks.sources import Row

IN_MEMORY = "in-memory:"
"""How the names of such tasks begin; a fingerprint of the rows follows. No module can have this name."""

FORMS = (
    "a name, a task object, a datasets.Dataset (from_pandas, from_dict, from_list; of a stream "
    'from_list(list(data.take(N)))), a list of rows, such as [{"prompt": ...}], or a dict of splits of these'
)


def memory_splits(data: Any) -> dict[str, list[dict[str, Any]]]:
    """Copy all splits of data that was given from Python.

    Args:
        data: a `datasets.Dataset`, a list of rows, or a mapping of splits to one of these.

    Returns:
        The rows of each split, by the name of the split. Data without splits is the split "train".

    Raises:
        Refused: the data is streamed or of another type, a row is no mapping, or rows have different columns.
    """
    if isinstance(data, Mapping):
        return {str(name): _rows(value, f"task, split '{name}'") for name, value in data.items()}
    return {"train": _rows(data, "task")}


def _rows(data: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(data, list | tuple):
        import datasets

        if isinstance(data, datasets.Dataset):
            # A function that with_transform applies to rows is applied where they are read one by one.
            custom = data.format["type"] == "custom"
            return [dict(row) for row in data] if custom else data.to_list()  # type: ignore[return-value]
        what = " ".join(repr(data).split())
        raise Refused(f"{where} is {what:.100} ({type(data).__name__}); it must be {FORMS}.")
    for index, row in enumerate(data):
        if not isinstance(row, Mapping):
            what = f"{where}, row {index} is {row!r:.100} ({type(row).__name__})"
            raise Refused(f"{what}; a row is a dict, and the task must be {FORMS}.")
        if row.keys() != data[0].keys():
            differ = ", ".join(sorted(map(str, row.keys() ^ data[0].keys())))
            rows = f"row {index} and row 0 do not have the same columns; only one has {differ}"
            raise Refused(f"{where}: {rows}. Give None where there is no value.")
    return [dict(row) for row in data]


def fingerprint(splits: Mapping[str, Sequence[Row]]) -> str:
    """Return 12 hexadecimal digits that equal rows in equal splits share, whatever object held them."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:12]


def description(splits: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Describe rows for config.json, which cannot hold them: their number, their columns, a fingerprint."""
    columns = dict.fromkeys(name for rows in splits.values() for row in rows for name in row)
    rows = {name: len(rows) for name, rows in splits.items()}
    return {"rows": rows, "columns": list(columns), "fingerprint": fingerprint(splits)}


def recorded(task: Any) -> dict[str, Any]:
    """Return what config.json says besides the name of a task: of data given from Python, its description."""
    origin = getattr(task, "origin", None)
    return {"task_rows": origin} if origin else {}
