"""Copies data that was given from Python: rows, or tables of `datasets`, value by value as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenrl.errors import Refused
from tokenrl.language.tasks.rows import Rows
from tokenrl.settings import shown
from tokenrl.user_code import guarded

FORMS = (
    "a name, a task object, a datasets.Dataset (from_dict, from_list; of a stream from_list(list(data.take(N)))), "
    'a pandas.DataFrame, a list of rows, such as [{"prompt": ...}], an object with __len__ and __getitem__ whose '
    "items are dicts, or a dict of splits of these. Of a table of polars give frame.to_dicts(), of pyarrow "
    "table.to_pylist()"
)


def memory_splits(data: Any) -> dict[str, Rows]:
    """Copy all splits of data that was given from Python.

    Args:
        data: a `datasets.Dataset`, a pandas `DataFrame`, a list of rows, another object whose items are rows
            (`__len__` and `__getitem__`, as of torch and reasoning-gym), or a mapping of splits to one of these.
            A missing value of pandas (NaN, NA, NaT) is None; an index without a name is left out.

    Returns:
        The rows of each split, by the name of the split. Data without splits is the split "train".

    Raises:
        Refused: the data is streamed or of another type, or a row is no mapping.
    """
    if not isinstance(data, Mapping):
        return {"train": _rows(data, "task")}
    if "prompt" in data:
        raise Refused(
            "task is a dict with the key 'prompt', and the keys of a dict are names of splits: write "
            "task=[row] for a row, Dataset.from_dict(columns) for columns."
        )
    return {str(name): _rows(rows, f"task, split '{name}'") for name, rows in data.items()}


def _rows(data: Any, source: str) -> Rows:
    if isinstance(data, list | tuple):
        rows = Rows.of(data, source)
        columns = {name: [*map(without_arrays, values)] for name, values in rows.columns.items()}
        return Rows(columns, rows.locations)
    import datasets
    import pandas

    schema = None
    if isinstance(data, pandas.DataFrame):
        columns = _of_frame(data, source)
    elif not isinstance(data, datasets.Dataset):
        columns = _of_items(data, source)
    elif data.format["type"] == "custom":  # a function changes rows where they are read
        columns = Rows.of(data, source).columns
    else:
        columns = data.to_dict()
        schema = data.features.arrow_schema
    written = {name: _before_arrow(schema, name, values) for name, values in columns.items()}
    return Rows(written, [f"row {number}" for number in range(len(data))])


def _of_items(data: Any, source: str) -> dict[str, list[Any]]:
    """Return the columns of an object whose items are rows, each read once."""
    fault = f"{source} is {shown(data, 100)} ({type(data).__name__}); it must be {FORMS}"
    if hasattr(data, "__getitem__"):
        with guarded(fault, Refused):
            items = (data[number] for number in range(len(data)))
            first = next(items, None)
            if isinstance(first, Mapping):
                return Rows.of([first, *items], source).columns
    raise Refused(f"{fault}.")


def _of_frame(frame: Any, source: str) -> dict[str, list[Any]]:
    """Return the columns of a pandas DataFrame, with fractions in the precision of their columns."""
    if frame.index.names != [None]:
        frame = frame.reset_index()
    columns = {}
    for name, column in frame.items():
        pairs = zip(column.array, column.isna(), strict=True)
        cells = [None if is_missing else cell for cell, is_missing in pairs]
        if hasattr(column.dtype, "pyarrow_dtype"):
            cells = [_shortest(cell, column.dtype.pyarrow_dtype) for cell in cells]
        columns[str(name)] = cells
    if len(columns) < frame.shape[1]:
        raise Refused(
            f"{source} has two columns of one name: {[*frame.columns]}. Name each by itself."
        )
    return columns


def without_arrays(value: Any) -> Any:
    """Return a value with lists and numbers in place of numpy's arrays and scalars, at any depth.

    pandas reads lists of a Parquet file, such as chat messages, as arrays. A fraction of fewer than 64 bits is
    read as it is written, 7.1 and not 7.099999904632568.
    """
    if type(value).__module__ == "numpy" and value.dtype.kind not in "mM":  # no times
        if value.dtype.kind == "f":
            value = value.astype(str).astype(float)
        value = value.tolist()
    if type(value) is list:
        return [*map(without_arrays, value)]
    if type(value) is dict:
        return {key: without_arrays(part) for key, part in value.items()}
    return value


def _before_arrow(schema: Any, name: str, column: list[Any]) -> list[Any]:
    """Return the values of a column as they were before they came into a table of Arrow or pandas.

    Arrow gives every mapping of a column the keys of all of them, with None where it had none, and a chat
    template would write these keys; so they leave messages and tools. A number of fewer than 64 bits is read
    as it is written, 7.1 and not 7.099999904632568.

    Args:
        schema: the types of Arrow's columns; None behind pandas or a function of the user, whose values may be
            numpy's.
        name: the name of the column.
        column: its values.
    """
    if schema is None:
        column = [*map(without_arrays, column)]
    elif "float" in str(kind := schema.field(name).type):
        column = [_shortest(value, kind) for value in column]
    if name == "tools" or any(map(_is_chat, column)):
        return [_without_padding(value) for value in column]
    return column


def _shortest(value: Any, kind: Any) -> Any:
    """Return a value of an Arrow type with the shortest fractions that its precision tells apart."""
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_shortest(part, kind.value_type) for part in value]
    if isinstance(value, dict):
        return {part.name: _shortest(value[part.name], part.type) for part in kind}
    if value is None or not str(kind).endswith("float"):  # of 16 or 32 bits; one of 64 is a double
        return value
    return without_arrays(kind.to_pandas_dtype()(value))


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and any("role" in part for part in value if type(part) is dict)


def _without_padding(value: Any) -> Any:
    """Return a value of messages or of tools without the keys that are None, at any depth."""
    if isinstance(value, list):
        return [_without_padding(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _without_padding(part) for key, part in value.items() if part is not None}
    return value
