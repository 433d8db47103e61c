import math
import re
import subprocess
import sys

import numpy as np
import pytest

from tokenrl.runs.plots import Bars, Chart, Curve, Forest, extremes, svg

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


@pytest.mark.parametrize("values", RANGES.values(), ids=RANGES)
def test_any_values_are_drawn_inside_the_picture_with_a_scale(values):
    short = len(values) < 9
    band = (values, values) if short else None
    curve = Curve(range(len(values)), values, "name", dots=short, band=band)
    drawn = svg(Chart("n", "u", [curve, Curve([], [])], mark=("solved", 0.5)), 400, 200)
    points = numbers(drawn)
    assert len(points) > 4 and all(-1 <= x <= 401 and -1 <= y <= 201 for x, y in points)
    assert len(re.findall("<text", drawn)) >= 4 and ">solved: 0.5</text>" in drawn
    assert len(drawn) < 30_000 and ('fill-opacity: 0.2"' in drawn) == short
    if values[0] == 0:  # the peak of the long curve is not lost; the plot begins at 10
        assert min(y for _, y in points if y > 0) < 30


def test_a_long_curve_has_the_extremes_of_each_column_of_pixels_and_no_more():
    y = np.random.default_rng(0).normal(size=100_000)
    y[[777, 50_000]] = 90, -80
    places = extremes(range(len(y)), [y, y**3], 50)
    assert len(places) < 110 and places == sorted({*places, 0, 777, 50_000, len(y) - 1})
    columns = np.arange(len(y)) * 50 // (len(y) - 1)
    for column in range(50):
        inside, whole = y[[i for i in places if columns[i] == column]], y[columns == column]
        assert (inside.min(), inside.max()) == (whole.min(), whole.max())
    curve = Curve(range(len(y)), y.tolist(), dots=True, band=((y - 1).tolist(), (y + 1).tolist()))
    assert len(svg(Chart("n", "u", [curve]), 400, 200)) < 100_000


def test_a_forest_plot_has_a_line_for_each_difference_and_escapes_its_texts():
    rows = [
        Bars("<b>$one$", "better: 0.5 & more", 0.5, (0.4, 0.6), (0.3, 0.7), [0.2, 0.8], colour=3),
        Bars("two", "too few runs", 0.0, (math.nan, math.nan), (-math.inf, math.inf)),
    ]
    drawn = svg(Forest("n", "u", rows, margin=0.1), 400, 160)
    assert (
        "&lt;b&gt;$one$</text>" in drawn and "0.5 &amp; more</text>" in drawn and "<b>" not in drawn
    )
    assert ">two</text>" in drawn and "nan" not in drawn and "inf" not in drawn
    assert drawn != svg(Forest("n", "u", rows), 400, 160)
    rows[0] = rows[0]._replace(inner=(0.45, 0.55))
    assert drawn != svg(Forest("n", "u", rows, margin=0.1), 400, 160)
    assert all(-1 <= x <= 401 and -1 <= y <= 161 for x, y in numbers(drawn))


def test_matplotlib_is_loaded_when_something_is_drawn_and_pyplot_never():
    code = (
        "import sys, tokenrl; from tokenrl.runs import markup, plots, report\n"
        "assert not {'matplotlib', 'jinja2', 'pandas'} & set(sys.modules)\n"
        "plots.svg(plots.Chart('n', 'u', [plots.Curve([0, 1], [0, 1])]), 400, 200)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
