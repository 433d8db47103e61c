"""Draws curves and forest plots with matplotlib as SVG, whose colours follow the page around it.

matplotlib is imported when something is drawn, and never pyplot, which would change the state of the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenrl.runs.console import measured, number
from tokenrl.runs.output import harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The palette of Okabe and Ito, darkened so that it can be read as text; it differs for every colour vision.
PALETTE = {"ink": "#1d1d1f", "soft": "#5f5f66", "line": "#dcdce0", "c0": "#77777f", "c1": "#0072b2",
           "c2": "#c24e00", "c3": "#007a58", "c4": "#9b3d7a", "c5": "#806200", "c6": "#3b4cc0"}  # fmt: skip
"""Colours on white by the names that page.css gives them; c0 is grey, c1 to c6 tell curves apart."""
COLOURS = 6
MARKER = 5  # pixels of a dot


def _variable(colour: int) -> str:
    """Return the name of a colour in the palette; 0 is grey."""
    if colour == 0:
        return "c0"
    return f"c{(colour - 1) % COLOURS + 1}"


class Curve(NamedTuple):
    """One curve of a chart.

    Attributes:
        x: places of the points, ascending.
        y: their values, all finite.
        name: its name in the legend; a curve without a name is in no legend.
        colour: place in the palette, from 1; those beyond the palette are dashed. 0 is grey.
        dots: draw each value as a dot and join them; else draw the values faintly, and their running mean.
        band: the lower and the upper edge of a band around the values.
        error: the standard error of the last value.
    """

    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    colour: int = 1
    dots: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None
    error: float | None = None

    @property
    def dashed(self) -> bool:
        """Whether the curve repeats a colour of the palette, and is dashed to tell the two apart."""
        return self.colour > COLOURS

    @property
    def variable(self) -> str:
        """The name of the curve's colour in the palette."""
        return _variable(self.colour)

    @property
    def last(self) -> str:
        """The last value with its standard error, as text."""
        return measured(self.y[-1], self.error)

    def draw(self, axes: Axes) -> None:
        """Draw the band, and the values or their running mean, as far as a screen shows them apart."""
        import numpy as np

        look: dict[str, Any] = {"color": PALETTE[self.variable], "clip_on": False}
        columns = axes.bbox.width / (MARKER if self.dots else 1)
        places = extremes(self.x, [self.y, *(self.band or ())], columns)
        x, y = np.take([self.x, self.y], places, 1)
        if self.band is not None:
            low, high = np.take(self.band, places, 1)
            axes.fill_between(x, low, high, alpha=0.2, linewidth=0, **look)
        if not self.dots:
            axes.plot(x, y, linewidth=1, alpha=0.35, **look)
            window = 2 * (len(self.y) // 40) + 1  # odd, and about a twentieth of the run
            y = smooth(self.y, window, places)
        (line,) = axes.plot(x, y, linewidth=2, **look)
        if self.dashed:
            line.set_linestyle((0, (4, 2)))
        if self.dots or len(self.y) == 1:  # a line through one point would not be seen
            line.set(marker="o", markersize=MARKER, markeredgewidth=0)


class Chart(NamedTuple):
    """Curves over a common axis.

    Attributes:
        name: heading of the chart.
        unit: unit or meaning of the values.
        curves: the curves; those without points are not drawn.
        large: as wide as the page, else one of several in a row.
        mark: name and value of a horizontal line.
        whole: whether x counts something from 0, such as steps.
        ticks: texts below the x axis by their positions; None for numbers.
        last: whether the legend tells the last value of each curve.
    """

    name: str
    unit: str
    curves: Sequence[Curve]
    large: bool = False
    mark: tuple[str, float] | None = None
    whole: bool = True
    ticks: Mapping[float, str] | None = None
    last: bool = True

    @property
    def drawn(self) -> list[Curve]:
        """The curves that have points."""
        return [curve for curve in self.curves if len(curve.x)]

    def draw(self, axes: Axes) -> None:
        """Draw scales, curves and mark; a scale of values that are never negative starts at 0."""
        _scale(axes, "y", 5 if self.large else 4)
        _scale(axes, "x", 8 if self.large else 4, self.whole)
        axes.margins(0, 0.06)
        if self.ticks is not None:
            axes.set_xticks(list(self.ticks), list(self.ticks.values()))
        for curve in self.drawn:
            curve.draw(axes)
        if self.mark is not None:
            name, mark = self.mark
            axes.axhline(
                mark, color=PALETTE["c3"], linewidth=1.5, linestyle=(0, (5, 3)), clip_on=False
            )
            _write(axes, f"{name}: {number(mark)}", mark, (4, 4), "c3")
        if self.whole:
            axes.set_xlim(left=0)
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(bottom=0)


class Bars(NamedTuple):
    """One line of a forest plot.

    Attributes:
        name: what is compared.
        result: the result in words, with its numbers.
        value: the mean difference.
        inner: ends of its thick bar.
        outer: ends of its thin bar, which decides.
        points: single differences, drawn as small dots.
        colour: place in the palette of `Curve`; 0 is grey.
    """

    name: str
    result: str
    value: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    points: Sequence[float] = ()
    colour: int = 0

    def draw(self, axes: Axes, line: float) -> None:
        """Draw name and result above the bars, in the line of a forest plot that begins at a height."""
        colour = _variable(self.colour)
        _write(axes, self.name, line, (0, -14), "ink", weight="bold")
        _write(axes, self.result, line, (0, -29), colour)
        look: dict[str, Any] = {"color": PALETTE[colour], "clip_on": False, "markeredgewidth": 0}
        height = line + 0.72
        axes.plot(self.outer, [height, height], linewidth=2, **look)
        axes.plot(self.inner, [height, height], linewidth=6, alpha=0.55, **look)
        axes.plot(self.value, height, "o", markersize=9, **look)
        for point in self.points:
            axes.plot(point, line + 0.9, "o", markersize=4, alpha=0.5, **look)


class Forest(NamedTuple):
    """A forest plot: one line for each difference, with its intervals and single values.

    Attributes:
        name: heading of the plot.
        unit: what the differences are of, and what the bars show.
        rows: the differences, from the top.
        margin: differences up to this size count as equivalent, drawn as a band; None for none.
    """

    name: str
    unit: str
    rows: Sequence[Bars]
    margin: float | None = None
    large: bool = True

    def draw(self, axes: Axes) -> None:
        """Draw each difference below its name and its result; ends that are not finite are left out."""
        axes.set_ylim(len(self.rows), 0)
        axes.margins(x=0.05)
        _scale(axes, "x", 5)
        axes.set_yticks([])
        if self.margin is not None:
            axes.axvspan(-self.margin, self.margin, color=PALETTE["line"], alpha=0.6, linewidth=0)
        axes.axvline(0, color=PALETTE["soft"], linewidth=1)
        for line, row in enumerate(self.rows):
            row.draw(axes, line)


def svg(drawing: Chart | Forest, width: int, height: int) -> str:
    """Draw a chart or a forest plot as an SVG element that names its colours as page.css does.

    Args:
        drawing: what to draw.
        width: its width in pixels; the element itself fits any width.
        height: its height in pixels.
    """
    from matplotlib import rc_context, rc_params_from_file
    from matplotlib.figure import Figure

    margin = 44 if isinstance(drawing, Chart) else 4  # at the left, in pixels
    box = (margin / width, 24 / height, 1 - (margin + 14) / width, 1 - 34 / height)
    file = StringIO()
    look = rc_params_from_file(
        Path(__file__).with_name("page.mplstyle"), use_default_template=False
    )
    with rc_context(look):
        figure = Figure((width / 72, height / 72), dpi=72)
        drawing.draw(figure.add_axes(box))
        unnamed = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=unnamed)
    inside = file.getvalue().partition("<svg")[2].partition(">")[2]
    for name, colour in PALETTE.items():
        inside = inside.replace(colour, f"var(--{name})")
    inside = re.sub(r"<g id=[^>]*?(/?)>", r"<g\1>", inside)
    return f'<svg viewBox="0 0 {width} {height}">{inside}'


def extremes(x: Sequence[float], curves: Iterable[Sequence[float]], columns: float) -> list[int]:
    """Return the places of the points that a picture shows apart, in ascending order.

    Args:
        x: the points, ascending.
        curves: values at these points; the least and the greatest of each in every column are kept.
        columns: how many columns of pixels the picture has.
    """
    import numpy as np

    last = len(x) - 1
    column = np.floor((np.asarray(x) - x[0]) * (columns / max(x[-1] - x[0], 1e-300)))
    indices = {0, last}
    for values in curves:
        order = np.lexsort((np.asarray(values), column))  # by column, and in it by value
        ends = np.flatnonzero(np.diff(column[order]))
        indices.update(order[[0, *(ends + 1), *ends, last]].tolist())
    return sorted(indices)


def smooth(
    values: Sequence[float], window: int, places: Iterable[int] | None = None
) -> list[float]:
    """Return the centred running mean over `window` values (odd); the window shrinks at the ends.

    Args:
        values: the values.
        window: how many of them a mean has.
        places: where means are wanted; None for everywhere.
    """
    half = window // 2
    return [
        fmean(values[max(0, index - half) : index + half + 1])
        for index in (range(len(values)) if places is None else places)
    ]


def _scale(axes: Axes, axis: Any, count: int, whole: bool = False) -> None:
    """Let an axis name about `count` round numbers, or whole numbers only."""
    axes.locator_params(axis, nbins=count, integer=whole)
    getattr(axes, f"{axis}axis").set_major_formatter("{x:g}")


def _write(
    axes: Axes, text: str, height: float, shift: tuple[float, float], colour: str, **look: Any
) -> None:
    """Write a text at the left end of a height of the data, shifted by points to the right and up."""
    axes.annotate(
        harmless(text).replace("$", r"\$"),  # which matplotlib would read as mathematics
        (0, height),
        shift,
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        annotation_clip=False,
        color=PALETTE[colour],
        **look,
    )
