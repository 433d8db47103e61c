"""Draws curves and forest plots with matplotlib as SVG, in the look of page.mplstyle.

On a dark page, page.css inverts them. matplotlib and pandas are imported when something is drawn, and never
pyplot, which would change the state of the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenrl.runs.output import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FEW = 50
"""Points of a curve up to which each is a dot; a curve of more is drawn faintly, with its running mean."""

COLOURS = {"better": "C2", "worse": "C1", "equivalent": "C0"}
"""Colours of verdicts by their places in the cycle of colours; the others are grey."""


class Chart(NamedTuple):
    """Curves over a common axis.

    Attributes:
        name: heading of the chart.
        unit: unit or meaning of the values.
        curves: the curves by their names in the legend. Each has a `value` by step, or by whatever x counts.
            The columns `low` and `high` are the edges of a band; `error` is the standard error of the value.
        large: as wide as the page, else one of several in a row.
        mark: name and value of a horizontal line.
        log: whether x is a rate, whose values are named and have equal ratios, instead of a count from 0.
    """

    name: str
    unit: str
    curves: Mapping[str, pd.DataFrame]
    large: bool = True
    mark: tuple[str, float] | None = None
    log: bool = False

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Width and height in pixels on a screen and on a phone."""
        return {"broad": (1000, 300), "narrow": (360, 230)} if self.large else {"small": (280, 140)}

    def draw(self, axes: Axes) -> None:
        """Draw scales, curves and mark; a scale of values that are never negative starts at 0."""
        _scale(axes, "y", 5 if self.large else 4)
        _scale(axes, "x", 8 if self.large else 4, integer=True)
        for curve in self.curves.values():
            _draw_curve(axes, curve)
        if self.log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(curve.index, [f"{rate:.3g}" for rate in curve.index])
        else:
            axes.set_xlim(left=0)
        if self.mark is not None:
            name, height = self.mark
            axes.axhline(height, color="0.35", linewidth=1.5, linestyle=(0, (5, 3)), clip_on=False)
            _write(axes, f"{name}: {number(height)}", height, (4, 4), color="0.35")
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(bottom=0)


class Forest(NamedTuple):
    """A forest plot: one line for each difference, with its intervals and single values.

    Attributes:
        name: heading of the plot.
        unit: what the differences are of, and what the bars show.
        rows: the differences from the top. `name` says what is compared, `result` is the result in words, and
            the `verdict` gives the colour. The `value` is a dot, `points` are single differences. The bar reaches
            from `low` to `high`.
        margin: differences up to this size count as equivalent, drawn as a band; None for none.
    """

    name: str
    unit: str
    rows: pd.DataFrame
    margin: float | None = None
    large: bool = True

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Width and height in pixels on a screen and on a phone."""
        height = 40 + 60 * len(self.rows)
        return {"broad": (1000, height), "narrow": (360, height)}

    def draw(self, axes: Axes) -> None:
        """Draw each difference below its name and its result; ends that are not finite are left out."""
        axes.set_ylim(len(self.rows), 0)
        axes.margins(x=0.05)
        _scale(axes, "x", 5)
        axes.set_yticks([])
        if self.margin is not None:
            axes.axvspan(-self.margin, self.margin, color="0.85", alpha=0.6, linewidth=0)
        axes.axvline(0, color="0.35", linewidth=1)
        for line, row in enumerate(self.rows.itertuples()):
            look: dict[str, Any] = {"color": COLOURS.get(row.verdict, "0.45"), "clip_on": False}
            _write(axes, str(row.name), line, (0, -14), weight="bold")
            _write(axes, str(row.result), line, (0, -29), color=look["color"])
            ends = [row.low, row.value, row.high]
            axes.plot(ends, [line + 0.72] * 3, "-o", markevery=[1], markersize=9, **look)
            for point in row.points:
                axes.plot(point, line + 0.9, "o", markersize=4, alpha=0.5, **look)


def svg(drawing: Chart | Forest, width: int, height: int) -> str:
    """Draw a chart or a forest plot as an SVG element, which fits any width.

    Args:
        drawing: what to draw.
        width: its width in pixels.
        height: its height in pixels.
    """
    from matplotlib import rc_context, rc_params_from_file
    from matplotlib.figure import Figure

    style = Path(__file__).with_name("page.mplstyle")
    left = 44 if isinstance(drawing, Chart) else 4  # pixels of a margin
    file = StringIO()
    with rc_context(rc_params_from_file(style, use_default_template=False)):
        figure = Figure((width / 72, height / 72), dpi=72)
        box = (left / width, 24 / height, 1 - (left + 14) / width, 1 - 34 / height)
        drawing.draw(figure.add_axes(box))
        unnamed = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=unnamed)
    return file.getvalue()[file.getvalue().index("<svg") :]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the centred running mean over `window` values (odd); the window shrinks at the ends."""
    import pandas as pd

    return list(pd.Series(values).rolling(window, center=True, min_periods=1).mean())


def _draw_curve(axes: Axes, curve: pd.DataFrame) -> None:
    """Draw the band, and the values as dots or with their running mean, in the next colour."""
    values = curve["value"].tolist()
    few = len(values) <= FEW
    window = 2 * (len(values) // 40) + 1  # odd, and about a twentieth of the run
    line = values if few else smooth(values, window)
    (drawn,) = axes.plot(curve.index, line, marker="o" if few else "", clip_on=False)
    look: dict[str, Any] = {"color": drawn.get_color(), "clip_on": False}
    if not few:
        axes.plot(curve.index, values, "-", linewidth=1, alpha=0.35, **look)
    if "low" in curve:
        axes.fill_between(curve.index, curve["low"], curve["high"], alpha=0.2, linewidth=0, **look)


def _scale(axes: Axes, axis: Any, count: int, integer: bool = False) -> None:
    """Let an axis name about `count` round numbers, or whole numbers only."""
    axes.locator_params(axis, nbins=count, integer=integer)
    getattr(axes, f"{axis}axis").set_major_formatter("{x:g}")


def _write(axes: Axes, text: str, height: float, shift: tuple[int, int], **look: Any) -> None:
    """Write a text at the left end of a height of the data, shifted by points to the right and up."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (0, height), shift, **place, **look)
