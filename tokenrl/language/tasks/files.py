"""Reads JSON and CSV files value by value, so that a reward gets what stands in the file.

`datasets` reads both through tables whose columns have one type each. There a text that looks like a date
becomes a date, one fraction makes fractions of all whole numbers beside it, `007` becomes 7, and the texts
`NA` and `None` become missing values: a right completion then earns 0.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenrl.configuration import UNIQUE_KEYS
from tokenrl.errors import Placed, Refused
from tokenrl.language.tasks.rows import Rows

SPACE = re.compile(r"[ \t\r\n]*")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""How a file in UTF-16 begins, which Excel writes as Unicode text."""
HEADER = (
    "If lines stand above the one that names the columns, leave them out: two by tail -n +3 FILE > NEW, or from "
    "Python by task=pandas.read_csv(FILE, sep=';', skiprows=2, dtype=str)."
)
HALF_OF_PAIR = re.compile("[\ud800-\udfff]")
MAX_CELL_CHARACTERS = 2**31 - 1
SEPARATORS = ",;\t|"
"""What may stand between two cells of CSV."""
QUOTED = re.compile(rf'(^|[\r\n{SEPARATORS}]) *"[^"]*(?:""[^"]*)*"')
"""A cell in quotes, with what stands in front of it."""
OPENED = re.compile(r'(^|[\t\r\n])(?! *"(?:[^"\t\r\n]|"")*"(?:[\t\r\n]|$))( *"[^\t\r\n]*)')
"""A cell between tabs that begins with a quote and does not end with it, and what stands in front of it."""


def _zstandard(file: Path, mode: str) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(file), compression="zstd")


COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
"""By the ending of a compressed file, how it is opened."""


def format_of(path: Path) -> str:
    """Return the ending that says how a file is written, which stands before that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def read_rows(
    splits: Mapping[str, Sequence[Path]], kind: str, separator: str = ","
) -> dict[str, Rows]:
    """Read the files of each split.

    Of JSON, a list of objects or objects one after another (JSON Lines), each value is what `json.loads`
    gives. Of CSV each value is the text of its cell, also where that is a number; an empty cell is None. A row
    without one of the columns has None there.

    Args:
        splits: the files of each split.
        kind: json or csv.
        separator: the character between two cells of CSV; for a comma any of `SEPARATORS` may stand, see
            `separator_of`.

    Returns:
        The rows of each split, all with the same columns. Each knows its line, or its item in a list of JSON.

    Raises:
        Refused: a file is neither UTF-8 nor marked as UTF-16, or the header of CSV does not fit its lines; the
            message names the line.
        ValueError: a file is not of this kind, or an object of JSON has a key twice; the message names the line
            or the item.
    """
    read = partial(_csv_rows, separator=separator) if kind == "csv" else _json_rows
    return {split: Rows.of(_rows_of(files, read)) for split, files in splits.items()}


def _rows_of(files: Sequence[Path], read: Callable[..., Any]) -> Iterator[Placed]:
    """Yield the rows of a split."""
    for file in files:
        ending = f" of {file.name}" if len(files) > 1 else ""
        for location, row in read(_text(file), file):
            yield Placed(row, f"{location}{ending}")


def _text(file: Path) -> str:
    """Return the text of a file, which is UTF-8 unless it begins with a mark of UTF-16.

    No other encoding is sure: bytes that are no UTF-8 are letters in each of those with one byte a character.
    """
    with COMPRESSED.get(file.suffix, Path.open)(file, "rb") as stream:
        content: bytes = stream.read()
    if content.startswith(UTF_16):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        words = content[: error.start + 1].rpartition(b"\n")[2][-30:].decode("cp1252", "replace")
        raise Refused(
            f"Line {line} of {file} is no UTF-8. In Windows-1252 (Latin-1) there stands {words!r}. If that is right, "
            "convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW, or from Python Path(NEW).write_text("
            "Path(FILE).read_text('cp1252'), 'utf-8'). If not, name the encoding that it has there."
        ) from None


def _json_rows(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON list, or those that follow each other in a text, with their locations."""
    has_escapes = "\\u" in text  # only an escape can write half of a surrogate pair
    for location, value in _json_values(text, file):
        if not isinstance(value, dict):
            raise ValueError(
                f"{location} of {file} is {json.dumps(value):.60}: a row is an object; remove it"
            )
        if has_escapes and HALF_OF_PAIR.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError(f"{location} of {file} is no UTF-8: it holds half of a surrogate pair")
        yield location, value


def _json_values(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the location of each value, and the value."""
    if text.lstrip().startswith("["):
        for number, value in enumerate(UNIQUE_KEYS.decode(text), start=1):
            yield f"item {number}", value
        return
    line = 1
    counted = end = 0
    while (start := SPACE.match(text, end).end()) < len(text):  # type: ignore[union-attr]  # no space matches too
        line += text.count("\n", counted, start)
        counted = start
        try:
            value, end = UNIQUE_KEYS.raw_decode(text, start)
        except ValueError as error:
            row = line if format_of(file) != ".json" else getattr(error, "lineno", line)
            words = getattr(error, "msg", error)
            raise ValueError(f"line {row} of {file} is no JSON: {words}") from None
        yield f"line {line}", value


def _csv_rows(text: str, file: Path, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a CSV file as texts, with their locations; lines without any cell are skipped."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    if separator == ",":
        separator = separator_of(text)
    # Most programs that write tabs write no quotes. Where all lines have as many cells between tabs, a quote in
    # front of a cell is a part of it, and must not swallow what follows.
    counts = {line.count("\t") for line in re.split("[\r\n]+", text) if line}
    if separator == "\t" and len(counts) == 1 and counts != {0}:
        text = OPENED.sub(lambda cell: f"{cell[1]}{_quoted(cell[2])}", text)
    lines = _csv_lines(text, separator, strict=True)
    columns: list[str] = next(filter(None, lines), [])
    for column in columns:
        if columns.count(column) > 1:
            raise Refused(
                f"Two columns of {file} are called {column!r}: name each by itself. {HEADER}"
            )
    first = lines.line_num + 1
    for cells in lines:
        if len(cells) > len(columns):
            raise Refused(
                f"Line {first} of {file} has {len(cells)} cells, and there are {len(columns)} columns, "
                f'{columns}: write a cell with {separator!r} in quotes, "like{separator}this". {HEADER}'
            )
        if cells:
            values = [cell or None for cell in cells]
            yield f"line {first}", dict(zip_longest(columns, values))
        first = lines.line_num + 1


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def _csv_lines(text: str, separator: str, *, strict: bool) -> Any:
    """Return the reader of the lines of CSV, each a list of cells."""
    # Blanks behind a separator belong to the cell, but not those in front of a quote.
    before = rf'(^|[\r\n{re.escape(separator)}]) *("[^"]*(?:""[^"]*)*")'
    content = io.StringIO(re.sub(before, r"\1\2", text), newline="")
    return csv.reader(content, delimiter=separator, strict=strict)


def separator_of(text: str) -> str:
    """Return the character that divides the cells of a CSV file.

    It stands in the header outside of quotes. If several do, such as one within the name of a column, it is the
    one with which most lines have as many cells as the header, and of several such the one with most cells.
    """
    header = re.split("[\r\n]", QUOTED.sub(r"\1", text.lstrip()))[0]
    candidates = [separator for separator in SEPARATORS if separator in header]

    def fit(separator: str) -> tuple[int, int]:
        sizes = [len(cells) for cells in _csv_lines(text, separator, strict=False) if cells]
        return sizes.count(sizes[0]), sizes[0]

    return max(candidates, key=fit) if len(candidates) > 1 else "".join(candidates) or ","
