"""Writes self-contained HTML pages made of sections: texts, tables, charts, forest plots and completions.

All pages have one template, page.html, with the style page.css and the script page.js, which sorts and
filters completions. The template escapes every text; only drawings, which come from `tokenrl.runs.plots`,
are inserted as they are. A page is complete without its script, and asks for no other file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.runs.console import harmless, number
from tokenrl.runs.files import plain, write_text
from tokenrl.runs.plots import Chart, Curve, Forest, svg

Block = dict[str, Any]
"""A part of a section: what the template needs to show it, and its `kind`."""
_OPEN = 4  # completions that are shown without a click


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
    from jinja2 import Environment, FileSystemLoader

    kept = [section._replace(blocks=[block for block in section.blocks if block]) for section in sections]
    loader = FileSystemLoader(str(files(__package__)))
    page = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    shown = page.get_template("page.html").render(title=title, sections=[s for s in kept if s.blocks])
    write_text(path, shown + "\n")
    return path


def paragraph(words: str, style: str = "") -> Block:
    """Make a paragraph; empty without words. Its style is soft for small print, strong for what matters."""
    return {"kind": "paragraph", "words": words, "style": style} if words else {}


def verdict(headline: str, sentences: Sequence[str], caveats: Sequence[str]) -> Block:
    """Make a card of a result: a headline, the sentences that say it in full, and what to keep in mind."""
    return {"kind": "verdict", "headline": headline, "sentences": sentences, "caveats": caveats}


def run_list(names: Mapping[str, str], links: Mapping[str, str]) -> Block:
    """List names in the colours of their curves, with words on each, and links for those that have one."""
    items = [
        {"name": name, "words": words, "link": links.get(name), "curve": Curve((), (), colour=place)}
        for place, (name, words) in enumerate(names.items(), start=1)
    ]
    return {"kind": "runs", "items": items}


def cards(items: Mapping[str, tuple[str, str]]) -> Block:
    """Show pairs of numbers before and after, by name; empty without any."""
    return {"kind": "cards", "items": items} if items else {}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> Block:
    """Make a table, empty without rows. On a narrow screen each row becomes a block of lines.

    Args:
        header: names of the columns, of which the first one names the rows.
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
    shown = [chart for chart in charts if isinstance(chart, Forest) or chart.drawn]
    return {"kind": "drawings", "items": [_drawing(chart) for chart in shown]} if shown else {}


def _drawing(chart: Chart | Forest) -> dict[str, Any]:
    if isinstance(chart, Forest):
        height = 40 + 60 * len(chart.rows)
        sizes = {"broad": (1000, height), "narrow": (360, height)}
    else:
        sizes = {"broad": (1000, 300), "narrow": (360, 230)} if chart.large else {"small": (280, 140)}
    legend = [] if isinstance(chart, Forest) else [curve for curve in chart.drawn if curve.name]
    return {
        "chart": chart,
        "legend": legend,
        "told": isinstance(chart, Chart) and chart.last,
        "pictures": {name: svg(chart, *size) for name, size in sizes.items()},
    }


def completions(rows: Sequence[Mapping[str, Any]]) -> Block:
    """Show completions with what is known of each: some of the last step, and by a click all of them.

    Args:
        rows: texts and numbers of each completion by name. A number that only some have is missing in others.
    """
    if not rows:
        return {}
    names = dict.fromkeys(name for row in rows for name in row)
    numbers = (int, float, type(None))
    numeric = [name for name in names if all(isinstance(row.get(name), numbers) for row in rows)]
    samples = [_sample(row, numeric) for row in rows]
    last = [one for one, row in zip(samples, rows, strict=True) if row.get("step") == rows[-1].get("step")]
    return {"kind": "completions", "all": samples, "some": last[:_OPEN], "numeric": numeric}


def _sample(row: Mapping[str, Any], numeric: Sequence[str]) -> dict[str, Any]:
    """Return the texts of a completion, each as messages with roles, and its numbers as text and as JSON."""
    texts = {
        name: _messages(str(value))
        for name, value in row.items()
        if name not in numeric and value is not None
    }
    known = {name: row[name] for name in numeric if row.get(name) is not None}
    return {
        "texts": texts,
        "numbers": {name: number(value) for name, value in known.items()},
        "data": json.dumps({name: plain(float(value)) for name, value in known.items()}),
    }


def _messages(text: str) -> list[tuple[str, str]]:
    """Return roles and contents of the chat messages that a text holds as JSON, or else the text itself."""
    try:
        found = json.loads(text) if text.startswith("[{") else None
        messages = [(str(message["role"]), message["content"]) for message in found or ()]
    except (ValueError, TypeError, KeyError):
        messages = []
    whole = [
        (role, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
        for role, content in messages or [("", text)]
    ]
    return [(harmless(role), harmless(content)) for role, content in whole]
