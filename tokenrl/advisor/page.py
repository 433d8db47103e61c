"""Shows advice as a page: printed as tables, or written as a document in GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tokenrl.runs.console import rich_console, rich_table
from tokenrl.runs.files import write_text


class Sheet(NamedTuple):
    """One table of a page: its title, the names of its columns (all empty for none), and its rows."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass
class Page:
    """What the advice says, in order.

    Attributes:
        title: the heading.
        sheets: the tables; those without rows are not shown.
        warnings: what may go wrong.
        lead: the words before the command.
        command: the command that trains with the settings advised.
    """

    title: str
    sheets: list[Sheet]
    lead: str
    command: str
    warnings: list[str] = field(default_factory=list)

    @property
    def shown(self) -> list[Sheet]:
        """The tables that have rows."""
        return [sheet for sheet in self.sheets if sheet.rows]


def print_page(page: Page) -> None:
    """Print the tables, the warnings and the command."""
    console = rich_console()
    for place, sheet in enumerate(page.shown):
        title = sheet.title if place else page.title
        table = rich_table(title, sheet.columns, show_header=any(sheet.columns), overflow="fold")
        table.columns[1].style = "bold"
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for warning in page.warnings:
        console.print(f"warning: {warning}", style="yellow")
    console.print(f"{page.lead}: {page.command}", soft_wrap=True)


def write_markdown(page: Page, path: Path) -> None:
    """Write the page as a document in GitHub's Markdown.

    Raises:
        Stopped: the file could not be written.
    """
    write_text(path, markdown(page))


def markdown(page: Page) -> str:
    """Return the page as a document in GitHub's Markdown: a section for each table, the command as code."""
    parts = [f"# {_plain(page.title)}"]
    for sheet in page.shown:
        parts += [f"## {_plain(sheet.title)}", _table(sheet)]
    if page.warnings:
        parts += ["## Warnings", "\n".join(f"- {_plain(warning)}" for warning in page.warnings)]
    parts += [f"## {_plain(page.lead)}", f"```sh\n{page.command}\n```"]
    return "\n\n".join(parts) + "\n"


def _table(sheet: Sheet) -> str:
    columns = sheet.columns if any(sheet.columns) else ("", *([""] * (len(sheet.rows[0]) - 1)))
    lines = [columns, ("---",) * len(columns), *(tuple(map(_plain, row)) for row in sheet.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Return a text on one line, in which no character is read as markup.

    A bar would end the cell of a table; the others begin code, emphasis, links and HTML.
    """
    special = r"[\\`*<|\[\]~]|(?<!\w)_|_(?!\w)"  # inside a word such as entropy_coef a _ is only itself
    return re.sub(special, r"\\\g<0>", " ".join(text.split()))
