"""Compares the cells of tables that a question prints with those that are computed again."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

COPY = re.compile(r" [=≈] [a-z]\w*")
"""The mark of an arm whose gradient is that of another arm, up to a factor."""


def sections(page: Path) -> dict[str, str]:
    """Return the text of each question of a page, by its number."""
    _, *parts = re.split(r"^## (\d+)\. ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the cells that are not empty of each row of the tables in a text, without the marks of copies."""
    rows = {}
    for line in re.findall(r"^\| (.*) \|$", COPY.sub("", text), re.MULTILINE):
        label, *cells = re.split(r" *\| *", line.replace("`", ""))
        rows[label] = [cell for cell in cells if cell]
    return rows


def bare(cells: list[str]) -> list[str]:
    """Return cells without the + and the 0 before the point of numbers."""
    return [re.sub(r"\+(?=[\d.])|\b0(?=\.)", "", cell) for cell in cells]


def wrong_rows(question: str, text: str, numbers: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yield a line for each row of a question's text that does not have the numbers of the raw tables."""
    computed = defaultdict(list)
    for row, *cells in numbers:
        computed[row] += cells
    below_mark = rows_of(text.partition("<!-- table")[2].partition("\n\n")[0])
    for row in [*below_mark][2:]:
        if row not in computed:
            yield f"question {question}, {row}: nothing is computed for this row"
    printed = rows_of(text)
    for row, cells in computed.items():
        if bare(printed.get(row, [])) != bare(cells):
            there = printed.get(row)
            yield f"question {question}, {row}: the raw tables have {cells}, the page {there}"


def manifest(tables: Path) -> str:
    """Return a line for each raw table: its file, the number of its rows, and the SHA-256 of its bytes."""
    lines = ["file,rows,sha256"]
    for path in sorted(tables.rglob("*.csv")):
        if path.name != "manifest.csv":
            content = path.read_bytes()
            rows, digest = content.count(b"\n") - 1, hashlib.sha256(content).hexdigest()
            lines.append(f"{path.relative_to(tables).as_posix()},{rows},{digest}")
    return "\n".join(lines) + "\n"
