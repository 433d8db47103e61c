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
    "a name, a task object, a datasets.Dataset, a list of rows (a row is a dict, such as "
    '{"prompt": ..., "answer": ...}), or splits of such data: a DatasetDict, or a dict '
    '{"train": ..., "test": ...}'
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
    if not isinstance(data, Mapping):
        return {"train": _rows(data, "task")}
    if not all(isinstance(name, str) for name in data):
        raise Refused(f"task is a dict whose keys are not all names of splits; give {FORMS}.")
    if data and not any(_holds_rows(value) for value in data.values()):
        raise Refused(
            f"task is a dict with the keys {', '.join(data)}, which do not hold rows. If they are columns, "
            "give datasets.Dataset.from_dict(task); if it is one row, give [task]. A dict of splits is "
            '{"train": rows, "test": rows}.'
        )
    return {name: _rows(value, f"task, split '{name}'") for name, value in data.items()}


def _holds_rows(value: Any) -> bool:
    """Whether a value in a dict can be a split. A column is a list too, but of values that are no rows."""
    if isinstance(value, list | tuple):
        return not value or isinstance(value[0], Mapping)
    return hasattr(value, "column_names") or _is_frame(value)


def _is_frame(value: Any) -> bool:
    return type(value).__name__ == "DataFrame"


def _rows(data: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(data, list | tuple):
        _check_rows(data, where)
        return [dict(row) for row in data]
    import datasets

    if isinstance(data, datasets.Dataset):
        if data.format["type"] == "custom":  # a function that with_transform applies to rows that are read
            return [dict(row) for row in data]
        return data.to_list()  # type: ignore[no-any-return]
    if isinstance(data, datasets.IterableDataset):
        raise Refused(
            f"{where} is an IterableDataset, a stream, but here some prompts are held out and the others "
            "are shuffled, which needs all of them. Take N rows: "
            "datasets.Dataset.from_list(list(data.take(N)))."
        )
    if _is_frame(data):
        library = type(data).__module__.partition(".")[0]
        maker = "from_polars(df)" if library == "polars" else "from_pandas(df, preserve_index=False)"
        raise Refused(f"{where} is a DataFrame of {library}: give datasets.Dataset.{maker}.")
    raise Refused(f"{where} is {data!r:.100} ({type(data).__name__}); it must be {FORMS}.")


def _check_rows(rows: Sequence[Any], where: str) -> None:
    """Refuse rows that are no mappings, or that do not all have the same columns."""
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise Refused(
                f"{where}, row {index} is {row!r:.100} ({type(row).__name__}); a row is a dict. Make rows of "
                'plain prompts with [{"prompt": text} for text in texts].'
            )
        if not all(isinstance(name, str) for name in row):
            raise Refused(f"{where}, row {index}: the columns {list(row)!r:.100} are not all text.")
        if row.keys() != rows[0].keys():
            differ = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise Refused(
                f"{where}: row {index} and row 0 do not have the same columns; only one has {differ}. "
                "Give every row every column, with None where there is no value."
            )


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


def refuse_replay(name: str) -> None:
    """Refuse the name of data that was given from Python, which stands in the config.json of such a run.

    Raises:
        Refused: it is such a name.
    """
    if name.startswith(IN_MEMORY):
        raise Refused(
            f"task '{name}' was data given from Python, which a configuration cannot hold; `task_rows` in "
            "the config.json of that run says how many rows and which columns it had. Give the same data "
            "from Python again, tokenrl.train(task=dataset), or save it once with "
            "dataset.to_json('data.jsonl') and give --task data.jsonl."
        )
