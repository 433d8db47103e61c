"""Samples and seconds to a threshold, with runs that never reach it."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from tokenrl.lab.compare.statistics.survival import Curve, default_threshold, first_reached, to_threshold

SAMPLES = (0.0, 100.0, 200.0, 300.0, 400.0)


def curve(*values: float, pace: float = 0.1) -> Curve:
    return Curve(SAMPLES, tuple(pace * s for s in SAMPLES), values)


def test_the_place_is_interpolated_between_two_evaluations_and_is_the_first():
    assert first_reached(curve(0.0, 0.2, 0.6, 0.9, 1.0), 0.4, 400) == pytest.approx((150.0, 15.0))
    assert first_reached(curve(0.0, 0.5, 0.2, 0.9, 1.0), 0.4, 400) == pytest.approx((80.0, 8.0)), (
        "the first time"
    )
    assert first_reached(curve(0.0, 0.2, 0.4, 0.9, 1.0), 0.4, 400) == pytest.approx((200.0, 20.0)), (
        "equal reaches"
    )
    assert first_reached(curve(0.5, 0.2, 0.4, 0.9, 1.0), 0.4, 400) == (0.0, 0.0), "before training"
    assert first_reached(curve(0.0, 0.1, 0.2, 0.3, 0.3), 0.4, 400) is None
    assert first_reached(curve(0.0, 0.1, 0.2, 0.3, 0.9), 0.4, 300) is None, "beyond the budget"
    assert first_reached(curve(0.0, math.nan, 0.8, 0.9, 0.9), 0.4, 400) == (200.0, 20.0), (
        "nothing to interpolate"
    )
    assert first_reached(Curve((), (), ()), 0.4, 400) is None


def test_runs_that_never_reach_the_threshold_count_with_the_budget():
    fast = curve(0.0, 1.0, 1.0, 1.0, 1.0)
    never = curve(0.0, 0.1, 0.1, 0.1, 0.1)
    (found,) = to_threshold({"rloo": {0: fast, 1: curve(0, 0, 1, 1, 1), 2: never}}, 0.5, 400)
    assert found.samples == {0: 50.0, 1: 150.0, 2: None}
    assert found.restricted_mean.value == pytest.approx((50 + 150 + 400) / 3)
    spread = np.std([50, 150, 400], ddof=1) / math.sqrt(3)
    low, high = stats.t.interval(0.95, 2, loc=200, scale=spread)
    assert low < 0 and high > 400, "so that both ends are cut"
    assert found.restricted_mean[1:] == (0.0, 400.0)
    assert found.median == 150.0
    assert found.seconds == {0: 5.0, 1: 15.0, 2: None} and found.budget == 400


def test_the_interval_is_students():
    values = {seed: curve(0.0, end, 1.0, 1.0, 1.0) for seed, end in enumerate((0.9, 0.8, 1.0, 0.95))}
    (found,) = to_threshold({"a": values}, 0.5, 400)
    needed = np.array([50 / 0.9, 50 / 0.8, 50.0, 50 / 0.95])
    ends = stats.t.interval(0.95, 3, loc=needed.mean(), scale=stats.sem(needed))
    assert found.restricted_mean == pytest.approx((needed.mean(), *ends))


def test_an_arm_that_never_reaches_the_threshold_has_a_number_without_an_interval():
    (found,) = to_threshold({"a": {s: curve(0, 0, 0, 0, 0.1) for s in range(6)}}, 0.5, 400, "reward_greedy")
    assert found.metric == "reward_greedy"
    assert found.restricted_mean.value == 400 and math.isnan(found.restricted_mean.low)
    assert found.median is None
    (empty,) = to_threshold({"a": {0: Curve((), (), ())}}, 0.5, 400)
    assert empty.restricted_mean.value == 400 and math.isnan(empty.restricted_seconds.value)


def test_seconds_are_limited_to_what_the_fastest_arm_with_a_run_that_fails_had_for_its_budget():
    never = (0.0, 0.1, 0.1, 0.1, 0.1)
    quick = {0: curve(*never, pace=0.1), 1: curve(0, 0, 1, 1, 1, pace=0.1)}
    slow = {0: curve(0, 0, 0, 0, 1, pace=0.5), 1: curve(0, 1, 1, 1, 1, pace=0.5)}
    found = {x.arm: x for x in to_threshold({"quick": quick, "slow": slow}, 0.5, 400)}
    assert {x.seconds_limit for x in found.values()} == {40.0}
    assert found["slow"].seconds == {0: 175.0, 1: 25.0}
    assert found["slow"].restricted_seconds.value == pytest.approx((40 + 25) / 2)
    assert found["quick"].restricted_seconds.value == pytest.approx((40 + 15) / 2)


def test_a_run_that_crashed_early_makes_no_arm_look_fast():
    crashed = Curve(SAMPLES, (0.0, 1.0, 1.0, 1.0, 1.0), (0.0, 0.1, 0.1, 0.1, 0.1))
    arms = {
        "a": {0: crashed, 1: curve(0, 0, 0, 0, 0.1)},
        "b": {0: curve(0, 0, 1, 1, 1), 1: curve(0, 0, 1, 1, 1)},
    }
    found = {x.arm: x for x in to_threshold(arms, 0.5, 400)}
    assert found["a"].restricted_seconds.value == 40.0, "not the one second after which it crashed"
    assert found["b"].restricted_seconds.value == 15.0


def test_where_every_run_reaches_the_threshold_the_seconds_are_not_cut():
    arms = {"a": {0: curve(0, 1, 1, 1, 1), 1: curve(0, 1, 1, 1, 1)}, "b": {0: curve(0, 0, 0, 0, 1, pace=2.0)}}
    found = {x.arm: x for x in to_threshold(arms, 0.5, 400)}
    assert found["b"].restricted_seconds.value == found["b"].seconds[0] == 700.0


@given(st.lists(st.one_of(st.none(), st.integers(1, 399)), min_size=1, max_size=15))
def test_the_median_is_that_of_kaplan_and_meier(needed):
    curves = {
        seed: Curve((0.0, 400.0), (0.0, 4.0), (0.0, 200.0 / x if x else 0.0)) for seed, x in enumerate(needed)
    }
    (found,) = to_threshold({"a": curves}, 0.5 * 1.0, 400)
    times = [found.samples[seed] or 400.0 for seed in range(len(needed))]
    survival = stats.ecdf(stats.CensoredData.right_censored(times, [x is None for x in needed])).sf
    half = survival.quantiles[survival.probabilities <= 0.5 + 1e-9]
    expected = next((q for q in half if any(q == t and x for t, x in zip(times, needed, strict=True))), None)
    assert found.median == expected


def test_the_default_threshold_is_half_way_from_the_start_to_the_best_arms_end():
    arms = {
        "good": {0: curve(0.2, 0, 0, 0, 0.8), 1: curve(0.0, 0, 0, 0, 1.0)},
        "bad": {0: curve(0.1, 0, 0, 0, 0.3), 1: Curve((), (), ())},
    }
    assert default_threshold(arms) == pytest.approx((0.1 + 0.9) / 2)
    assert default_threshold({"bad": {0: curve(0.5, 0, 0, 0, 0.4)}}) is None, "nothing was learned"
    assert default_threshold({}) is None and default_threshold({"a": {}}) is None
    ruined = {"a": {0: curve(0.2, 0, 0, 0, math.nan)}}
    assert default_threshold(ruined) is None
    assert default_threshold(ruined | {"b": {0: curve(0.2, 0, 0, 0, 0.6)}}) == pytest.approx(0.4)
