"""Shows the sampled completions of a run on a page, where a script sorts and filters them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrl.runs.console import harmless, number
from tokenrl.runs.files import plain
from tokenrl.runs.metrics import read_completions
from tokenrl.runs.page import Html, section, tag

_STEPS, _ROWS = 8, 16  # most steps, and most completions of each, on a page


def completions_section(folder: Path) -> Html:
    """Show completions of the first step that was kept, of the last one and of some between them.

    Args:
        folder: `completions/` of a run directory; it may be missing.
    """
    files = [file for file in folder.glob("step_*.parquet") if file.stem[5:].isdecimal()]
    files.sort(key=lambda file: int(file.stem[5:]))
    apart = (len(files) - 1) / (_STEPS - 1)
    kept = files if apart <= 1 else [files[round(i * apart)] for i in range(_STEPS)]
    rows = [
        {"step": int(file.stem[5:]), **row, "characters": _characters(row)}
        for file in kept
        for row in read_completions(file)[:_ROWS]
    ]
    return section("Completions", sample_list(rows)) if rows else Html()


def sample_list(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Show completions with what is known of each, and controls to sort and filter them; empty without any.

    Args:
        rows: texts and numbers of each completion by name. A number that only some have is missing in others.
    """
    if not rows:
        return Html()
    names = dict.fromkeys(name for row in rows for name in row)
    numbers = (int, float, type(None))
    numeric = [name for name in names if all(isinstance(row.get(name), numbers) for row in rows)]
    items = tag("div", *(_sample(row, numeric) for row in rows), class_="list")
    return tag("div", _form(numeric), items, class_="samples")


def _characters(row: Mapping[str, Any]) -> int:
    """Return the length of what was completed: all texts but the prompt."""
    return sum(len(text) for name, text in row.items() if isinstance(text, str) and name != "prompt")


def _sample(row: Mapping[str, Any], numeric: Sequence[str]) -> Html:
    texts = [
        tag("div", tag("span", name, class_="label"), _text(str(value)))
        for name, value in row.items()
        if name not in numeric and value is not None
    ]
    shown = {name: row[name] for name in numeric if row.get(name) is not None}
    numbers = [tag("span", tag("span", f"{n} ", class_="label"), number(v)) for n, v in shown.items()]
    return tag(
        "article",
        tag("div", *texts, class_="texts"),
        tag("div", *numbers, class_="numbers"),
        class_="sample",
        data_numbers=json.dumps({name: plain(float(value)) for name, value in shown.items()}),
    )


def _text(text: str) -> Html:
    """Show a text, or the messages of a chat with their roles."""
    messages = _messages(text)
    if messages is None:
        return tag("div", harmless(text), class_="text")
    parts = []
    for message in messages:
        content = message["content"]
        words = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        role = tag("span", str(message["role"]), class_="label")
        parts.append(tag("div", role, tag("div", harmless(words), class_="text"), class_="message"))
    return tag("div", *parts)


def _messages(text: str) -> list[dict[str, Any]] | None:
    """Return the chat messages that a text holds as JSON, or None if it is no such list."""
    if not text.startswith("[{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found) else None


def _form(numeric: Sequence[str]) -> Html:
    """Make the controls of the script; they are hidden without it."""

    def choice(name: str, options: Sequence[str], label: str) -> Html:
        return tag("select", *(tag("option", option) for option in options), name=name, aria_label=label)

    def bound(name: str, label: str) -> Html:
        return tag("input", type="number", step="any", name=name, placeholder=label, aria_label=label)

    search = tag("input", type="search", name="search", placeholder="text", aria_label="text to search for")
    order = choice("order", ("ascending", "descending"), "order")
    return tag(
        "form",
        tag("span", "Sort by ", choice("by", numeric, "sort by"), " ", order),
        tag("span", "Search ", search),
        tag("span", "Only ", choice("column", numeric, "number to filter by"), " ",
            bound("least", "at least"), " ", bound("most", "at most")),
        tag("output"),
        hidden="",
    )  # fmt: skip
