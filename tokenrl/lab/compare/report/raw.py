"""Shows the raw numbers of a comparison: every difference, every run, and completions of each arm."""

from __future__ import annotations

import math
from typing import Any

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.tables import comparison_rows, run_rows
from tokenrl.runs.page import Html, table, tag
from tokenrl.runs.samples import sample_list

COMPLETIONS = 4
"""Completions of each arm on each problem, from its first run."""


def differences_table(found: Comparison) -> Html:
    """Show every paired difference, in the metric that decides and in those beside it."""
    note = (
        "The sign-flip p is exact; its smallest value depends on the number of pairs alone. Holm's "
        "adjustment is over the differences on one problem. Metrics that do not decide have no verdict."
    )
    rows = [
        {name: value for name, value in row.items() if name != "margin"} for row in comparison_rows(found)
    ]
    for row in rows:
        if row["decides"] == "no":
            row |= {"verdict": "", "seeds_needed": None}
    return Html(tag("p", note, class_="soft") + _table(rows)) if rows else Html()


def runs_table(found: Comparison) -> Html:
    """Show one row for each run, those of the tuning too."""
    return _table(run_rows(found.records))


def completions(found: Comparison) -> Html:
    """Show some completions of the first run of each arm on each problem, to sort and to filter."""
    kept, rows = set(), []
    for record in found.records:
        key = (record.run.problem, record.run.arm)
        if record.run.role != "comparison" or not record.completions or key in kept:
            continue
        kept.add(key)
        one = {"problem": key[0], "arm": key[1], "seed": record.run.seed}
        step = max(1, len(record.completions) // COMPLETIONS)
        rows += [{**one, **row} for row in record.completions[::step][:COMPLETIONS]]
    return sample_list(rows)


def _table(rows: list[dict[str, Any]]) -> Html:
    """Make a wide table of rows that all have the same columns."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    return tag("div", table(list(rows[0]), cells), class_="wide") if rows else Html()


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
