"""One table of what runs and evaluations record: names, units and meanings. Imports no torch.

The rows stand in metric_table.txt. The console, pages, evaluations, rules and comparisons read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""What a run records by names: the metrics of a step, a completion, its summary."""
Rows = Sequence[Row]


class Metric(NamedTuple):
    """A row of the table; a column that does not apply is empty.

    Attributes:
        name: its name, in which braces stand for any name or number, as in `rewards/{name}/mean`.
        unit: its unit, such as `nats per token`.
        better: `more` or `less`; empty where neither is better by itself.
        panel: the charts that show it: reward, loss, accuracy or health.
        meaning: what it is, in a few words.
        part: the part of the table that it stands in, such as `rewards`.
    """

    name: str
    unit: str = ""
    better: str = ""
    panel: str = ""
    meaning: str = ""
    part: str = ""

    @property
    def caption(self) -> str:
        """Unit and meaning."""
        return ": ".join(filter(None, (self.unit, self.meaning)))

    @property
    def row(self) -> int:
        """The place of the row in the table; those that are not in it come last."""
        rows = all_metrics()
        return rows.index(self) if self in rows else len(rows)


@cache
def all_metrics() -> tuple[Metric, ...]:
    """Return the rows of the table, in its order."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    rows = []
    for part in text.replace("| - ", "|  ").split("\n# ")[1:]:
        heading, *lines = part.strip().splitlines()
        rows += [Metric(*map(str.strip, [*line.split("|"), heading])) for line in lines]
    return tuple(rows)


def metric_of(name: str) -> Metric:
    """Return the row of a recorded number, such as `eval_pass@4_stderr`; an unknown number has a name alone."""
    name = re.sub("^eval_|_stderr$", "", name)
    rows = (metric for metric in all_metrics() if fits(name, metric.name))
    return next(rows, Metric(name))


def fits(name: str, row: str) -> bool:
    """Return whether a name is that of a row, in which braces stand for any name."""
    pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(row))
    return bool(re.fullmatch(pattern, name))


def is_rounding(error: float, value: float) -> bool:
    """Return whether an error is no more than the rounding of numbers of the size of a value, or of 1."""
    return error <= 1e-14 * max(1.0, abs(value))


def exceeds(value: float, limit: float, margin: float = 0.0) -> bool:
    """Return whether a value is above another by more than a margin and the rounding of their difference."""
    difference = value - limit
    return difference > margin and not is_rounding(difference, limit)


def reaches(value: Any, mark: float) -> Any:
    """Return whether a mean, or which of the rewards in an array, is at least a mark, but for rounding.

    The sum of .6, .3 and .1 is below 1.
    """
    return value >= mark - 1e-6 * abs(mark)


def finite(value: Any) -> float:
    """Return a value of a file as a number; nan if it is none, or not finite."""
    number = math.nan
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value)
    return number if math.isfinite(number) else math.nan
