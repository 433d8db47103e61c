"""Draws charts for the pages of reports, as SVG that fits any width and follows the browser's dark mode.

The curves are drawn in a box of 1000 x 1000 units that the browser stretches, while lines keep their width
and all text is HTML beside the box; so a chart is as legible on a phone as on a large screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tokenrl.runs.console import measured, number
from tokenrl.runs.page import Html, tag
from tokenrl.runs.plots import smooth

COLOURS = 6  # --c1 to --c6 of page.css; --c0 is grey
_MOST = 300  # points of a curve that are drawn


class Curve(NamedTuple):
    """One curve of a chart.

    Attributes:
        x: places of the points, ascending.
        y: their values, all finite.
        name: shown beside the last value; without it the curve is in no legend.
        errors: standard errors of the values, drawn as a band; nan where there is none. May be empty.
        colour: place in the palette; those beyond it are dashed. 0 is grey.
        dots: draw each value as a dot with its numbers, and join them; else draw the values faintly, and
            their running mean.
    """

    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    errors: Sequence[float] = ()
    colour: int = 1
    dots: bool = False

    @property
    def look(self) -> dict[str, str]:
        """Class and style of the elements that belong to this curve."""
        turn, place = divmod(self.colour - 1, COLOURS)
        variable = "--c0" if self.colour == 0 else f"--c{place + 1}"
        return {"class_": "curve dashed" if turn > 0 else "curve", "style": f"--colour:var({variable})"}

    def at(self, place: int) -> str:
        """Return a value with its standard error, as text."""
        return measured(self.y[place], self.errors[place] if self.errors else None)


class _Frame(NamedTuple):
    """The ranges of both axes."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> str:
        """Return the place of a point in the box, whose origin is at its top left."""
        across, up = ((v - low) / (high - low) for v, (low, high) in zip((x, y), self, strict=True))
        return f"{1000 * across:.0f},{1000 * (1 - up):.0f}"

    def line(self, x: Sequence[float], y: Sequence[float]) -> str:
        return " ".join(map(self.place, x, y))


def chart(
    name: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    large: bool = False,
    mark: tuple[str, float] | None = None,
    whole: bool = True,
    places: Mapping[float, str] | None = None,
    last: bool = True,
) -> Html:
    """Draw curves in one chart; empty if there is no point.

    Args:
        name: heading of the chart.
        unit: unit or meaning of the values.
        curves: the curves; those without points are left out.
        large: as wide as the page, else one of several in a row.
        mark: name and value of a horizontal line.
        whole: whether x counts something from 0, such as steps.
        places: texts below the x axis by their places; None for numbers.
        last: whether the legend tells the last value of each curve.
    """
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return Html()
    frame = _frame(curves, mark, whole)
    across = places or {tick: f"{tick:g}" for tick in ticks(*frame.x, 8 if large else 4, whole)}
    up = {tick: f"{tick:g}" for tick in ticks(*frame.y, 5 if large else 3)}
    labels = [*_labels("x", "left", frame.x, across), *_labels("y", "bottom", frame.y, up)]
    parts = [tag("polyline", points=frame.line(frame.x, (tick, tick)), class_="grid") for tick in up]
    if mark is not None:
        green = Curve((), (), colour=3).look["style"]
        ends = frame.line(frame.x, (mark[1],) * 2)
        parts.append(tag("polyline", points=ends, class_="dashed", style=green))
        height = 100 * (mark[1] - frame.y[0]) / (frame.y[1] - frame.y[0])
        words = f"{mark[0]}: {number(mark[1])}"
        labels.append(tag("span", words, class_="mark", style=f"bottom:{height:.1f}%;{green}"))
    parts += [tag("g", *_drawn(curve, frame), **curve.look) for curve in curves]
    drawing = tag("svg", *parts, viewBox="0 0 1000 1000", preserveAspectRatio="none", role="img",
                  aria_label=f"{name}, {unit}")  # fmt: skip
    legend = [tag("li", f"{c.name} ", *[tag("b", c.at(-1))] * last, **c.look) for c in curves if c.name]
    caption = tag(
        "figcaption",
        tag("b", name),
        " ",
        tag("span", unit, class_="soft"),
        *([tag("ul", *legend)] * bool(legend)),
    )
    return tag(
        "figure",
        caption,
        tag("div", drawing, *labels, class_="plot"),
        class_="chart large" if large else "chart",
    )


def _labels(axis: str, side: str, ends: tuple[float, float], words: Mapping[float, str]) -> Iterator[Html]:
    for place, text in words.items():
        share = 100 * (place - ends[0]) / (ends[1] - ends[0])
        yield tag("span", text, class_=axis, style=f"{side}:{share:.1f}%")


def _frame(curves: Sequence[Curve], mark: tuple[str, float] | None, whole: bool) -> _Frame:
    """Return ranges that hold all points, bands and the mark; values that are never negative start at 0."""
    x = [value for curve in curves for value in curve.x]
    y = [value for curve in curves for value in curve.y] + ([] if mark is None else [mark[1]])
    low, high = min(y), max(y)
    for curve in curves:
        for edge in _band(curve):
            low, high = min(low, *edge), max(high, *edge)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    left, right = 0 if whole else min(x), max(x)
    bottom = 0 if min(y) >= 0 else low - margin
    return _Frame((left, right if right > left else left + 1), (bottom, high + margin))


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Return round numbers for an axis.

    Args:
        low: the least value of the axis.
        high: the greatest one.
        most: about how many numbers at most.
        whole: whether only whole numbers will do.
    """
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(most, integer=whole).tick_values(low, high)
    return [tick for tick in map(float, found) if low <= tick <= high]


def _band(curve: Curve) -> tuple[list[float], list[float]]:
    """Return the lower and the upper edge of the band; without a standard error both are at the value."""
    errors = [0.0 if math.isnan(error) else error for error in curve.errors or [0.0] * len(curve.y)]
    both = list(zip(curve.y, errors, strict=True))
    return [y - e for y, e in both], [y + e for y, e in both]


def _drawn(curve: Curve, frame: _Frame) -> Iterator[Html]:
    if curve.errors:
        low, high = ([max(frame.y[0], min(y, frame.y[1])) for y in edge] for edge in _band(curve))
        edge = frame.line(curve.x, high) + " " + frame.line(curve.x[::-1], low[::-1])
        yield tag("polygon", points=edge, class_="band")
    averaged = curve.y if curve.dots else smooth(curve.y, 2 * (len(curve.y) // 40) + 1)
    if not curve.dots:
        yield tag("polyline", points=frame.line(*_thinned(curve.x, curve.y)), class_="faint")
    dashed = "dashed" if "dashed" in curve.look["class_"] else None
    yield tag("polyline", points=frame.line(*_thinned(curve.x, averaged)), class_=dashed)
    for i, x in enumerate(curve.x if curve.dots or len(curve.x) == 1 else ()):
        point = frame.place(x, curve.y[i])
        yield tag("path", tag("title", f"{number(x)}: {curve.at(i)}"), d=f"M{point}h0", class_="dot")


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Keep the lowest and the highest point of each stretch of a long curve, so that no peak is lost."""
    length = max(1, math.ceil(2 * len(x) / _MOST))
    kept: list[int] = []
    for start in range(0, len(x), length):
        stretch = range(start, min(start + length, len(x)))
        kept += sorted({min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)})
    return [x[i] for i in kept], [y[i] for i in kept]
