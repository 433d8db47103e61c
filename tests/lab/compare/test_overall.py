"""The summary over problems: interquartile mean, its bootstrap, performance profiles."""

import numpy as np
import pandas as pd
import pytest

from tokenrl.lab import judge_scores
from tokenrl.lab.compare import overall as room
from tokenrl.lab.compare.judgement import Judgement

RANGES = {"sort": (0.0, 1.0), "length": (-1.0, 0.0)}


def overall(table, ranges=RANGES, judgement=None):
    return room.overall(table, ranges, judgement or Judgement("score", ()))


def table(scores):
    rows = [(p, arm, x) for p, arms in scores.items() for arm, runs in arms.items() for x in runs]
    return pd.DataFrame(rows, columns=["problem", "arm", "score"])


def made(runs, spread=0.02):
    rng = np.random.default_rng(4)
    return table(
        {
            problem: {
                a: low + 0.6 + by + spread * rng.standard_normal(runs) for a, by in (("a", 0), ("b", 0.1))
            }
            for problem, (low, _) in RANGES.items()
        }
    )


def test_the_interquartile_mean_pools_scores_that_are_normalised_to_the_range_of_the_reward():
    found = overall(table({"sort": {"a": [0, 0.25, 0.5, 1]}, "length": {"a": [-1, -0.6, -0.4, 0]}}))
    # 0, 0, .25, .4, .5, .6, 1, 1: the middle four
    assert found["a"]["iqm"].value == pytest.approx((0.25 + 0.4 + 0.5 + 0.6) / 4)


def test_a_profile_is_the_share_of_runs_with_at_least_a_score_and_every_problem_weighs_the_same():
    found = overall(table({"sort": {"a": [0.3, 0.3, 0.7, 0.7]}, "length": {"a": [-0.5, -1.0]}}))
    at = {round(x, 6): (share, low, high) for x, share, low, high in found["a"]["profile"]}
    assert at[0.0] == (1, 1, 1) and at[1.0] == (0, 0, 0)
    assert at[0.3][0] == pytest.approx((1 + 0.5) / 2), "a score equal to the point but for rounding counts"
    assert at[0.32][0] == pytest.approx((0.5 + 0.5) / 2) and at[0.52][0] == pytest.approx((0.5 + 0) / 2)
    assert all(low <= share <= high for share, low, high in at.values())
    assert at[0.32][1] < at[0.32][0] < at[0.32][2], "with a band"


def test_intervals_are_drawn_within_each_problem_and_are_the_same_each_time():
    found = overall(made(6))
    assert found["a"]["iqm"].low < found["a"]["iqm"].value < found["a"]["iqm"].high < found["b"]["iqm"].low
    assert overall(made(6)) == found
    rng = np.random.default_rng(0)
    apart = {p: {"a": x + 0.001 * rng.standard_normal(6)} for p, x in (("sort", 0.1), ("length", -0.1))}
    low, high = overall(table(apart))["a"]["iqm"][1:]
    assert high - low < 0.01, "drawn from all twelve at once, its width would be about .6"


def test_the_probability_of_improvement_is_over_pairs_and_every_problem_weighs_the_same():
    wins = {"sort": [1, 1, -1, 0], "length": [1, 1, 1, 1]}
    rows = [("ref", s, 0.5, p) for p, each in wins.items() for s, _ in enumerate(each)]
    rows += [("a", s, 0.5 + w / 8, p) for p, each in wins.items() for s, w in enumerate(each)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "score", "problem"])
    found = overall(frame, judgement=judge_scores(rows))["a"]["improvement"]
    assert found.value == pytest.approx((2.5 / 4 + 1) / 2) and found.low < found.value < found.high <= 1


def test_nothing_is_summarised_without_all_ranges_all_scores_or_several_problems():
    few = made(3)
    assert overall(few, {"sort": (0.0, 1.0), "length": None}) == {}
    assert overall(few[(few["arm"] == "a") | (few["problem"] == "sort")]) == {}
    assert overall(few[few["problem"] == "sort"]) == {}


@pytest.mark.slow
def test_intervals_cover_about_as_often_as_the_docstring_says():
    """100 studies of two problems: 6 runs cover about 91 %, 10 about 92 %, 3 only about 85 %."""
    rng = np.random.default_rng(7)
    centre = {"sort": 0.5, "length": -0.3}  # normalised .5 and .7; the interquartile mean of both is .6
    for runs, least, most in ((3, 0.74, 0.93), (6, 0.82, 0.98), (10, 0.84, 0.99)):
        studies = [
            table({p: {"a": rng.normal(m, 0.05, runs)} for p, m in centre.items()}) for _ in range(100)
        ]
        ends = [overall(one)["a"]["iqm"] for one in studies]
        assert least < np.mean([end.low <= 0.6 <= end.high for end in ends]) < most, runs
