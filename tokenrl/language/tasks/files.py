"""Reads JSON and CSV files value by value, so that a reward gets what stands in the file.

`datasets` reads both through tables whose columns have one type each. There a text that looks like a date
becomes a date, one fraction makes fractions of all whole numbers beside it, `007` becomes 7, and the texts
`NA` and `None` become missing values: a right completion then earns 0.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenrl.errors import Placed

SPACE = re.compile(r"[ \t\r\n]*")
HALF_OF_PAIR = re.compile("[\ud800-\udfff]")
MAX_CELL_CHARACTERS = 2**31 - 1


def read_rows(files: Sequence[Path], kind: str) -> list[dict[str, Any]]:
    """Read the files of a split.

    Of JSON, a list of objects or objects one after another (JSON Lines), each value is what `json.loads`
    gives. Of CSV a column holds numbers if each of its cells is just how Python writes that number, and else
    the texts that stand there; an empty cell is None. A row without one of the columns has None there.

    Args:
        files: their paths.
        kind: json or csv.

    Returns:
        The rows, all with the same columns. Each knows its line, or its item in a list of JSON.

    Raises:
        ValueError: a file is no UTF-8 or is not of this kind; the message names the line or the item.
    """
    rows: list[Placed] = []
    read = _csv_rows if kind == "csv" else _json_rows
    for file in files:
        for location, row in read(_text(file), file):
            rows.append(Placed(row, location if len(files) == 1 else f"{location} of {file.name}"))
    empty: dict[str, None] = {}
    for row in rows:
        empty |= dict.fromkeys(row)
    complete = [Placed(empty | row, row.location) for row in rows]
    if kind == "csv":
        change_columns(complete, lambda _, cells: _column(cells))
    return list(complete)


def change_columns(
    rows: Sequence[dict[str, Any]], change: Callable[[str, list[Any]], list[Any]]
) -> None:
    """Replace the values of each column, in place, by what a function of its name and values returns."""
    for name in rows[0] if rows else ():
        column = change(name, [row[name] for row in rows])
        for row, value in zip(rows, column, strict=True):
            row[name] = value


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} of {file} is no UTF-8") from error


def _json_rows(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON list, or those that follow each other in a text, with their locations."""
    has_escapes = "\\u" in text  # only an escape can write half of a surrogate pair
    for location, value in _json_values(text):
        if not isinstance(value, dict):
            raise ValueError(
                f"{location} of {file} is {json.dumps(value):.60}: a row is an object; remove it"
            )
        if has_escapes and HALF_OF_PAIR.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError(f"{location} of {file} is no UTF-8: it holds half of a surrogate pair")
        yield location, value


def _json_values(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the location of each value, and the value."""
    if text.lstrip().startswith("["):
        for number, value in enumerate(json.loads(text), start=1):
            yield f"item {number}", value
        return
    decoder = json.JSONDecoder()
    end = 0
    line = 1
    while text[end : end + 1]:
        start = SPACE.match(text, end).end()  # type: ignore[union-attr]  # also matches no space
        line += text.count("\n", end, start)
        end = start
        if start < len(text):
            value, end = decoder.raw_decode(text, start)
            yield f"line {line}", value
            line += text.count("\n", start, end)


def _csv_rows(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a CSV file as texts, with their locations; lines without any cell are skipped."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    names = next(filter(None, lines), [])
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two columns of {file} are called {name!r}: name each by itself")
    first = lines.line_num + 1
    for cells in lines:
        if len(cells) > len(names):
            raise ValueError(
                f"line {first} of {file} has {len(cells)} cells, and there are {len(names)} columns: write a "
                'cell with a comma in quotes, "like, this"'
            )
        if cells:
            yield f"line {first}", dict(zip_longest(names, cells))
        first = lines.line_num + 1


def _column(cells: Sequence[str | None]) -> list[Any]:
    """Return the values of a column of CSV: numbers if each cell is one, else texts."""
    numbers = {cell: _number(cell) for cell in cells if cell}
    if None in numbers.values():
        return [cell or None for cell in cells]
    return [numbers[cell] if cell else None for cell in cells]


def _number(cell: str) -> int | float | None:
    """Return the number that Python writes just as this cell; None if there is none."""
    for kind in (int, float):
        with suppress(ValueError):
            number = kind(cell)
            if str(number) == cell and math.isfinite(number):
                return number
    return None
