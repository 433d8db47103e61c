import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tokenrl.runs import plots
from tokenrl.runs.plots import Chart, Forest, svg

RANGES = {
    "one point": [3.0],
    "constant": [5.0, 5.0],
    "negative": [-200.0, -201.0, -202.0],
    "far apart": [-1e-9, 1e9],
    "near the largest number": [1e300 * (-1) ** (i // 60) for i in range(120)],
    "long": [0.0] * 20_000 + [7.0] + [0.0] * 20_000,
}


def numbers(drawn):
    """All coordinates of the lines of a drawing, as (x, y)."""
    paths = " ".join(re.findall(r'<path d="(M[^"]*)"', drawn))
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", paths)]


def curve(values, band=None):
    frame = pd.DataFrame({"value": values})
    return (
        frame
        if band is None
        else frame.assign(low=frame["value"] - band, high=frame["value"] + band)
    )


@pytest.mark.parametrize("values", RANGES.values(), ids=RANGES)
def test_any_values_are_drawn_inside_the_picture_with_a_scale(values):
    short = len(values) < 9
    chart = Chart("n", "u", {"name": curve(values, 0.0 if short else None)}, mark=("solved", 0.5))
    drawn = svg(chart, 400, 200)
    points = numbers(drawn)
    assert len(points) > 4 and all(-1 <= x <= 401 and -1 <= y <= 201 for x, y in points)
    assert len(re.findall("<text", drawn)) >= 4 and ">solved: 0.5</text>" in drawn
    assert len(drawn) < 30_000 and ("fill-opacity: 0.2" in drawn) == short
    if values[0] == 0:  # the peak of the long curve is not lost; the plot begins at 10
        assert min(y for _, y in points if y > 0) < 30


def test_a_long_curve_has_its_extremes_and_no_more_than_a_screen_shows():
    y = np.random.default_rng(0).normal(size=100_000)
    y[[777, 50_000]] = 90, -80
    drawn = svg(Chart("n", "u", {"": curve(y)}), 400, 200)
    (values,) = re.findall(r'<path d="M[^>]*#0072b2; stroke-opacity', drawn)
    heights = [height for _, height in numbers(values)]
    # The plot has 166 pixels below the tenth, and 6 % of the range at both ends.
    margin = 166 * 0.06 / 1.12
    assert len(drawn) < 100_000
    assert (min(heights), max(heights)) == pytest.approx((10 + margin, 176 - margin), abs=0.1)


def test_colours_tell_twelve_curves_apart_and_are_those_of_the_legend():
    chart = Chart("n", "u", {str(place): curve([place, place]) for place in range(12)})
    drawn = svg(chart, 400, 200)
    looks = re.findall(r'M [^"]*" style="fill: none; (.*?)stroke: (#\w+)', drawn)
    assert len({(bool(dashes), colour) for dashes, colour in looks if colour != "#808080"}) >= 12
    css = (Path(plots.__file__).parent / "page.css").read_text()
    colours = re.findall(r"li:nth-child\(.*\) \{ color: (#\w+)", css)
    drawn_colours = re.findall(r"stroke: (#\w+); stroke-width: 2", drawn)
    assert list(dict.fromkeys(drawn_colours)) == colours and len(colours) == 6


def test_a_forest_plot_has_a_line_for_each_difference_and_escapes_its_texts():
    rows = pd.DataFrame(
        [
            ["<b>$one$", "better: 0.5 & more", "better", 0.5, 0.3, 0.7, [0.2, 0.8]],
            ["two", "too few runs", "descriptive", 0.0, math.nan, math.inf, []],
        ],
        columns=["name", "result", "verdict", "value", "low", "high", "points"],
    )
    drawn = svg(Forest("n", "u", rows, margin=0.1), 400, 160)
    assert (
        "&lt;b&gt;$one$</text>" in drawn and "0.5 &amp; more</text>" in drawn and "<b>" not in drawn
    )
    assert ">two</text>" in drawn and "nan" not in drawn and "inf" not in drawn
    assert drawn != svg(Forest("n", "u", rows), 400, 160)
    assert drawn != svg(Forest("n", "u", rows.assign(low=0.45), margin=0.1), 400, 160)
    assert all(-1 <= x <= 401 and -1 <= y <= 161 for x, y in numbers(drawn))
