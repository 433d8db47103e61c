"""Computes the numbers of the study's pages again from the raw tables, and says which of them do not hold.

    python recipes/study/verify.py     each cell of the tables, and many sentences, in a minute

This is a second way to the verdicts. It shares nothing with `tokenrl compare`: intervals are scipy's, and the rates
of questions 7, 12 and 13 have simulated critical values (`intervals.py`).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import first_questions as first
import later_questions as later
import tyro
from first_questions import TABLES, Numbers

PAGES: dict[str, Callable[[], Numbers]] = {
    "README": later.summary,
    "paper": later.summary,
    "questions/1_rates": first.tuned_rates,
    "questions/2_division": first.division,
    "questions/3_entropy": first.entropy,
    "questions/4_signs": first.signs,
    "questions/5_clipping": first.clipping,
    "questions/6_noise": first.noise,
    "questions/7_lora": first.lora,
    "questions/8_actions": first.agents,
    "questions/9_zero": later.zero,
    "questions/10_unclipped": later.unclipped,
    "questions/11_learned": later.learned,
    "questions/12_bases": later.bases,
    "questions/13_molecules": later.molecules,
}
"""What computes the numbers of each page."""
COPY = re.compile(r" [=≈] [a-z]\w*")
"""The mark of an arm whose gradient is that of another arm, up to a factor."""


def manifest(tables: Path) -> str:
    """Return a line for each raw table: its file, the number of its rows, and the SHA-256 of its bytes."""
    lines = ["file,rows,sha256"]
    for path in sorted(tables.rglob("*.csv")):
        if path.name != "manifest.csv":
            content = path.read_bytes()
            rows = content.count(b"\n") - 1
            digest = hashlib.sha256(content).hexdigest()
            lines.append(f"{path.relative_to(tables).as_posix()},{rows},{digest}")
    return "\n".join(lines) + "\n"


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the cells that are not empty of each row of the tables in a page, without the marks of copies."""
    rows = {}
    for line in re.findall(r"^\| (.*) \|$", COPY.sub("", text), re.MULTILINE):
        label, *cells = re.split(r" *\| *", line.replace("`", ""))
        rows[label] = [cell for cell in cells if cell]
    return rows


def wrong_numbers(page: Path, numbers: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each row or sentence of a page that does not have the numbers of the raw tables."""
    text = page.read_text()
    one_line = " ".join(text.split())
    computed = defaultdict(list)
    for row, words in numbers:
        if row:
            computed[row].append(words)
        elif words not in one_line:
            yield f"{page.name} does not say what the raw tables do: {words}"
    printed = rows_of(text)
    below_mark = rows_of(text.partition("<!-- table")[2].partition("\n\n")[0])
    for row in [*below_mark][2:]:
        if row not in computed:
            yield f"{page.name}, {row}: nothing is computed for this row"
    for row, cells in computed.items():
        if printed.get(row) != cells:
            yield f"{page.name}, {row}: the raw tables have {cells}, the page {printed.get(row)}"


def main() -> None:
    """Verify the pages of the study."""
    wrong = []
    if manifest(TABLES) != (TABLES / "manifest.csv").read_text():
        wrong.append("manifest.csv does not list the raw tables as they are")
    for name, numbers in PAGES.items():
        wrong += wrong_numbers(TABLES.parent / f"{name}.md", numbers())
    if wrong:
        raise SystemExit("\n".join(wrong))
    print("Each row and each sentence that was computed holds.")


if __name__ == "__main__":
    tyro.cli(main)
