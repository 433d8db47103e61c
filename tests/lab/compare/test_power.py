"""The numbers behind a verdict: power, and the smallest difference that a comparison can show."""

import numpy as np
import pytest

from tokenrl.lab.compare.intervals import (
    detectable_difference,
    level_of,
    mean_interval,
    power,
    seeds_to_decide,
)


def test_power_is_that_of_the_tables():
    """Cohen (1988): 34 pairs for an effect of .5, 15 for .8, at a level of .05 and a power of .8."""
    assert power(33, 0.5, 0.95) < 0.8 <= power(34, 0.5, 0.95)
    assert power(14, 0.8, 0.95) < 0.8 <= power(15, 0.8, 0.95)
    assert power(40, 50.0, 0.95) == 1, "also where the distribution of t overflows"


@pytest.mark.parametrize("pairs", [6, 40])
@pytest.mark.parametrize("comparisons", [1, 3])
def test_the_detectable_difference_has_the_power_and_scales_with_the_spread(pairs, comparisons):
    least = detectable_difference(pairs, 1.0, comparisons)
    assert power(pairs, least, level_of(comparisons)) == pytest.approx(0.8)
    assert detectable_difference(pairs, 0.01, comparisons) == pytest.approx(0.01 * least)


@pytest.mark.parametrize(("mean", "margin"), [(0.0, 0.02), (0.01, 0.02), (0.015, None)])
def test_the_seeds_that_would_decide_do_so_in_four_of_five_comparisons(mean, margin):
    rng = np.random.default_rng(0)
    decided = []
    for _ in range(60):
        seeds, wider = seeds_to_decide(rng.normal(mean, 0.01, 6), 0.95, margin)
        _, low, high = mean_interval(rng.normal(mean, 0.01, seeds))
        limit = wider or margin or 0.0
        decided.append(low > 0 or high < 0 or (-limit <= low and high <= limit))
    assert np.mean(decided) >= 0.8


def test_where_no_affordable_number_of_seeds_decides_the_margin_is_widened():
    noisy = np.array([0.5, -0.5, 0.4, -0.4, 0.3, -0.3])
    seeds, margin = seeds_to_decide(noisy, 0.95, None)
    assert seeds == 50 and margin > 0.1
    fewer, none = seeds_to_decide(noisy, 0.95, 2 * margin)
    assert 6 < fewer < 50 and none is None, "a wide margin needs fewer seeds"
    assert seeds_to_decide(noisy, 0.99, None)[1] > margin
