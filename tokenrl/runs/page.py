"""Makes HTML pages that need no other file and no network. Every text is escaped unless it is `Html`.

The style and the script of a page lie beside this module. The script sorts and filters completions; a page
is complete without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenrl.runs.files import plain, write_text

_VOID = ("meta", "input")  # elements without content and without an end


class Html(str):
    """Text that is HTML already."""


def tag(element: str, /, *content: str, **attributes: object) -> Html:
    """Make an element. Content and attributes are escaped, except content that is `Html`.

    Args:
        element: name of the element.
        *content: what it holds.
        **attributes: a trailing underscore of a name is dropped and the others become hyphens; an attribute
            that is None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(part if isinstance(part, Html) else escape(part) for part in content)
    return Html(f"<{element}{written}>" if element in _VOID else f"<{element}{written}>{inside}</{element}>")


def section(heading: str, *content: str, closed: bool = False) -> Html:
    """Make a part of a page below a heading; empty without content. A closed one is opened by a click."""
    if not any(content):
        return Html()
    if closed:
        return tag("details", tag("summary", tag("h2", heading)), *content)
    return tag("section", tag("h2", heading), *content)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """Make a table. Its first column names the rows; on a narrow screen each row becomes a block of lines.

    Args:
        header: names of the columns.
        rows: cells as text, one row of them after the other.
    """
    head = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = []
    for first, *others in rows:
        cells = [tag("td", cell, data_label=name) for name, cell in zip(header[1:], others, strict=True)]
        body.append(tag("tr", tag("th", first, scope="row", data_label=header[0]), *cells))
    return tag("table", tag("thead", head), tag("tbody", *body)) if rows else Html()


def preformatted(value: Any) -> Html:
    """Make a block of a text, or of a value as JSON."""
    text = value if isinstance(value, str) else json.dumps(
        plain(value), indent=2, sort_keys=True, ensure_ascii=False
    )  # fmt: skip
    return tag("pre", text)


def write_page(path: Path, title: str, *content: str) -> Path:
    """Write one self-contained HTML file.

    Args:
        path: where to write it.
        title: title of the page and its first heading.
        *content: what follows the heading.

    Raises:
        Stopped: the file could not be written.
    """
    style, script = (
        Html(files(__package__).joinpath(name).read_text("utf-8")) for name in ("page.css", "page.js")
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    body = tag("body", tag("h1", title), *content, tag("script", script))
    write_text(path, Html("<!doctype html>") + tag("html", head, body, lang="en") + "\n")
    return path
