import math
import re

import pytest

from runs.pages import EVIL, Page
from tokenrl.runs.charts import Curve, chart
from tokenrl.runs.panels import compared_curves, learning_curves


def points(page, kind="polyline", of=None):
    """The points of the curves, or of other elements, as pairs of numbers."""
    found = [a["points"] for a in page.all(kind, of) if of is not None or a.get("class") is None]
    return [[tuple(map(int, pair.split(","))) for pair in one.split()] for one in found]


def test_a_curve_is_drawn_where_its_numbers_are():
    page = Page(chart("n", "u", [Curve([0, 5, 10], [0.0, 1.0, 0.5], dots=True)]))
    ((first, middle, last),) = points(page)
    assert (first, middle[0], last[0]) == ((0, 1000), 500, 1000)
    assert 1000 - last[1] == pytest.approx((1000 - middle[1]) / 2, abs=1)
    assert len(page.all("path", "dot")) == 3 and "5: 1" in page.text
    assert [a["style"] for a in page.all("span", "x")] == [f"left:{place}.0%" for place in (0, 30, 60, 90)]


def test_a_band_holds_one_standard_error_and_nothing_where_it_is_unknown():
    page = Page(chart("n", "u", [Curve([0, 1], [1.0, 1.0], errors=[0.5, math.nan], dots=True)]))
    ((left, right),), (band,) = points(page), points(page, "polygon", "band")
    half = (1000 - left[1]) / 2  # the chart starts at 0
    assert band[1:3] == [right, right] and [x for x, _ in band] == [0, 1000, 1000, 0]
    assert [band[0][1], band[3][1]] == pytest.approx([left[1] - half, left[1] + half], abs=1)
    assert "0: 1.00 ± 0.50" in page.text and "1: 1" in page.text


def test_no_peak_is_lost_in_a_long_curve():
    values = [0.0] * 5000
    values[1234], values[4321] = 7.0, 3.0
    (faint,) = points(Page(chart("n", "u", [Curve(range(5000), values)])), of="faint")
    heights = sorted(1000 - y for _, y in faint)
    assert len(heights) <= 310 and heights[-1] / heights[-2] == pytest.approx(7 / 3, rel=0.01)


@pytest.mark.parametrize(
    "curve", [Curve([3], [0.0]), Curve([3], [-2.0]), Curve([1, 2], [5.0, 5.0]), Curve([1, 2], [-1e-9, 1e9])]
)
def test_any_range_has_a_frame_with_ticks(curve):
    page = Page(chart("n", "u", [curve], mark=("solved", 0.5)))
    places = [xy for line in points(page) for xy in line]
    assert places and all(0 <= v <= 1000 for xy in places for v in xy)
    assert len(page.all("span", "x")) >= 2 and len(page.all("span", "y")) >= 1 and "solved: 0.5" in page.text


def test_nothing_to_draw_is_no_chart_and_names_are_escaped():
    assert chart("n", "u", [Curve([], [])], mark=("solved", 1.0)) == "" == learning_curves([], "train", None)
    assert "<script" not in chart(EVIL, EVIL, [Curve([1], [1.0], EVIL)], mark=(EVIL, 1.0))


ROWS = [{"step": 0, "eval_reward": 0.2, "eval_reward_stderr": 0.1, "eval_reward_greedy": 0.3},
        *({"step": s, "reward": s / 4, "reward_stderr": 0.1, "loss": 1 / s, "grad_norm": 1.0, "entropy": 2.0}
          for s in (1, 2)),
        {"step": 2, "eval_reward": 0.4, "eval_reward_stderr": 0.1}]  # fmt: skip


def test_the_kind_of_a_run_decides_what_is_drawn():
    for kind, large, legend in (
        ("train", 1, ["training 0.5", "held-out sampled 0.40 ± 0.10", "held-out greedy 0.3"]),
        ("sft", 2, ["training 0.5", "training 0.5", "held-out sampled 0.40 ± 0.10", "held-out greedy 0.3"]),
        ("reward-model", 0, []),
    ):
        html = learning_curves(ROWS, kind, None)
        page = Page(html)
        assert len(page.all("figure", "large")) == large and len(page.all("figure")) == large + 2
        assert [Page(one).text for one in re.findall("<li.*?</li>", html)] == legend
    assert len(page.all("polygon", "band")) == 0
    assert "loss" not in Page(learning_curves(ROWS, "train", None)).text


def test_numbers_near_the_largest_one_are_drawn_too():
    rows = [{"step": i, "reward": 1.7e308 * (-1) ** (i // 60)} for i in range(120)]
    places = [xy for line in points(Page(learning_curves(rows, "train", None))) for xy in line]
    assert places and all(0 <= v <= 1000 for xy in places for v in xy)


def test_runs_are_overlaid_each_in_a_look_of_its_own():
    runs = {f"run_{place}": ROWS for place in range(8)}
    page = Page(compared_curves(runs, "train", ("solved", 0.9)))
    assert len(page.all("figure", "large")) == 3 and len(page.all("figure")) == 5
    looks = [(a["class"], a["style"]) for a in page.all("g", "curve")][:8]
    assert len(set(looks)) == 8 and looks[6] == ("curve dashed", "--colour:var(--c1)")
    assert len(page.all("polygon", "band")) == 8 and page.text.count("run_7") == 3
    assert page.text.count("solved: 0.9") == 3
