"""Writes self-contained HTML pages made of sections: texts, tables, charts, forest plots and completions.

All pages have one template, page.html, with the style page.css and the script page.js, which sorts and
filters completions. The template escapes every text; only drawings, which come from `tokenrl.runs.plots`,
are inserted as they are. A page is complete without its script, and asks for no other file; its policy
(Content-Security-Policy) lets a browser run this script alone, and load nothing.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenrl.runs.console import message_text, number
from tokenrl.runs.files import plain, write_text
from tokenrl.runs.metric_table import Rows
from tokenrl.runs.output import harmless
from tokenrl.runs.plots import Chart, Forest, svg

if TYPE_CHECKING:
    from jinja2 import Environment

Block = dict[str, Any]
"""A part of a section: what the template needs to show it, and its `kind`."""
_OPEN = 3  # prompts of a step whose first completion is shown without a click


class Section(NamedTuple):
    """A heading and what is shown below it. A section without blocks is left out.

    Attributes:
        heading: the heading; empty for none.
        blocks: what follows it; empty ones are left out.
        closed: whether a reader opens it by a click.
    """

    heading: str
    blocks: Sequence[Block]
    closed: bool = False


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write one self-contained HTML file.

    Args:
        path: where to write it.
        title: title of the page and its first heading.
        sections: what follows the heading.

    Raises:
        Stopped: the file could not be written.
    """
    page = _templates()
    filled = [section for section in sections if any(section.blocks)]
    script = page.get_template("page.js").render()
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.get_template("page.html").render(
        title=title, sections=filled, script=script, digest=digest
    )
    write_text(path, harmless(text) + "\n")
    return path


@cache
def _templates() -> Environment:
    """Return the templates of a page, which take longer to compile than to fill."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(str(files(__package__)))
    page = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"number": number, "svg": lambda chart, size: svg(chart, *size)}
    return page


def paragraph(words: str, style: str = "") -> Block:
    """Make a paragraph; empty without words. Its style is soft for small print, strong for what matters."""
    return {"kind": "paragraph", "words": words, "style": style} if words else {}


def verdict(headline: str, sentences: Sequence[str], caveats: Sequence[str]) -> Block:
    """Make a card of a result: a headline, the sentences that say it in full, and what to keep in mind."""
    return {"kind": "verdict", "headline": headline, "sentences": sentences, "caveats": caveats}


def cards(items: Mapping[str, tuple[str, str]]) -> Block:
    """Show pairs of numbers before and after, by name; empty without any."""
    return {"kind": "cards", "items": items} if items else {}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> Block:
    """Make a table, empty without rows. On a narrow screen each row becomes a block of lines.

    Args:
        header: names of the columns; the first column names the rows.
        rows: cells as text, one row of them after the other.
        style: `words` where the last column is a sentence, `wide` where many columns may scroll, `fit` where
            cells do not wrap.
    """
    return {"kind": "table", "header": header, "rows": rows, "style": style} if rows else {}


def preformatted(value: Any) -> Block:
    """Make a block of a text, or of a value as JSON."""
    if not isinstance(value, str):
        value = json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False)
    return {"kind": "preformatted", "text": value}


def drawings(charts: Sequence[Chart | Forest]) -> Block:
    """Show charts and forest plots, large ones in one drawing for screens and one for phones; empty if none.

    Charts without any point are left out.
    """
    drawn = []
    for chart in charts:
        sizes = {"broad": (1000, 300), "narrow": (360, 230)}
        if isinstance(chart, Forest):
            height = 40 + 60 * len(chart.rows)
            sizes = {"broad": (1000, height), "narrow": (360, height)}
        elif not chart.drawn:
            continue
        elif not chart.large:
            sizes = {"small": (280, 140)}
        drawn.append((chart, sizes))
    return {"kind": "drawings", "charts": drawn} if drawn else {}


def completions(rows: Rows) -> Block:
    """Show completions with what is known of each: some of three steps, and by a click all of them.

    The steps are the first, a middle and the last one; of each, a few prompts have one completion.

    Args:
        rows: texts and numbers of each completion by name. A number that only some have is missing in others.
    """
    if not rows:
        return {}
    numeric = []
    for name in dict.fromkeys(chain.from_iterable(rows)):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and all(isinstance(value, int | float) for value in values):
            numeric.append(name)
    samples = []
    first: dict[Any, dict[str, Block]] = {}  # by step and prompt the first completion
    for row in rows:
        texts = {}  # each as messages with roles
        numbers = {}
        for name, value in row.items():
            if name in numeric and value is not None:
                numbers[harmless(name)] = plain(float(value))  # in an attribute, as JSON
            elif value is not None:
                texts[name] = _messages(str(value))
        sample = {"texts": texts, "numbers": numbers}
        samples.append(sample)
        first.setdefault(row.get("step"), {}).setdefault(str(row.get("prompt")), sample)
    steps = list(first.values())
    chosen = sorted({0, len(steps) // 2, len(steps) - 1})
    some = [list(steps[index].values())[:_OPEN] for index in chosen]
    return {"kind": "completions", "all": samples, "some": some, "numeric": numeric}


def _messages(text: str) -> list[tuple[str, str]]:
    """Return roles and contents of the chat messages that a text holds as JSON, or else the text itself."""
    if not text.startswith("[{"):
        return [("", text)]
    try:
        return [(str(message["role"]), message_text(message)) for message in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        return [("", text)]
