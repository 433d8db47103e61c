"""Writes self-contained HTML pages from templates: run.html for a run, comparison.html for several runs or arms.

Both are made of the parts in page.html, with the style page.css and the script page.js, which sorts and
filters completions. The templates escape every text; only drawings, which come from `tokenrl.runs.plots`, and
tables, which pandas escapes, are inserted as they are. A page is complete without its script, and asks for no
other file; its policy (Content-Security-Policy) lets a browser run this script alone, and load nothing.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenrl.files import plain, write_text
from tokenrl.runs.metric_table import Row, Rows
from tokenrl.runs.output import harmless, measured, message_text, number
from tokenrl.runs.plots import svg

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Write one self-contained HTML file.

    Args:
        path: where to write it.
        template: `run.html` or `comparison.html`.
        **content: what the template shows, such as its `title`.

    Raises:
        Stopped: the file could not be written.
    """
    write_text(path, harmless(_templates().get_template(template).render(content)) + "\n")
    return path


@cache
def _templates() -> Environment:
    """Return the templates of a page, which take longer to compile than to fill."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(str(files(__package__)))
    page = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {
        "number": number,
        "numbers": _numbers,
        "messages": _messages,
        "names": _names_of_tokens,
        "tokens": _tokens,
        "heaviest": _heaviest,
        "table": _table,
        "indented": _indented,
        "last": _last,
        "digest": lambda text: b64encode(hashlib.sha256(text.encode()).digest()).decode(),
        "svg": lambda drawing, size: svg(drawing, *size),
    }
    return page


def _table(frame: pd.DataFrame) -> str:
    """Return a table as HTML, its numbers with four figures."""
    import pandas as pd

    cells = frame.astype(object).where(frame.notna(), "-").rename_axis(None)
    with pd.option_context("display.max_colwidth", None):
        return str(cells.to_html(border=0, float_format="{:.4g}".format))


def _last(curve: pd.DataFrame) -> str:
    """Return the last value of a curve, with its standard error where there is a column of them."""
    last = curve.iloc[-1]
    return measured(last["value"], last.get("error"))


def _indented(value: Any) -> str:
    """Return a text as it is, and another value as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False)


def _numbers(row: Row) -> dict[str, float]:
    """Return what is a number in a row, for JSON in an attribute."""
    return {
        harmless(name): plain(float(value))
        for name, value in row.items()
        if isinstance(value, int | float)
    }


def _messages(text: str) -> list[tuple[str, str]]:
    """Return roles and contents of the chat messages that a text holds as JSON, or else the text itself."""
    if not text.startswith("[{"):
        return [("", text)]
    try:
        return [(str(message["role"]), message_text(message)) for message in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        return [("", text)]


def _names_of_tokens(table: pd.DataFrame) -> list[str]:
    """Return the columns of a table of tokens that hold numbers."""
    return [name for name in table if name not in ("text", "special")]


def _tokens(table: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Yield each token's text, `special` or `given` by an environment or neither, and its numbers in words."""
    numbers = table[_names_of_tokens(table)].itertuples(index=False)
    kinds = np.select([table["special"], table["logprob"].isna()], ["special", "given"], "")
    for text, kind, values in zip(table["text"], kinds, numbers, strict=True):
        yield text, kind, " ".join(f"{value:.4g}" for value in values)


def _heaviest(rows: Rows) -> list[Row]:
    """Return the three completions that have tokens with the largest weights in the gradient."""
    read = [row for row in rows if row.get("tokens") is not None]
    return sorted(read, key=lambda row: -row["tokens"]["weight"].abs().max())[:3]
