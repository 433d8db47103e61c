"""The numbers behind a verdict: sign flips, failures, shares of wins, power."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy import stats

from tokenrl.lab.compare.paired import (
    detectable_difference,
    improvement,
    level_of,
    paired_differences,
    pairs_needed,
    power,
    sign_flip,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(-6, 6)), min_size=2, max_size=8))
@example([(0, by) for by in (0, 0, 0, 0, 2, -6, 5, -1)])  # the mean of these floats is 1e-19 and not 0
def test_sign_flips_of_rounded_scores_are_counted_as_if_they_were_not_rounded(hundredths):
    """.29 - .17 is not .12 in binary; means that are equal must count as equal, also if they are 0."""
    arm = {place: (score + by) / 100 for place, (score, by) in enumerate(hundredths)}
    reference = {place: score / 100 for place, (score, by) in enumerate(hundredths)}
    true = [Fraction(by, 100) for _, by in hundredths]
    flipped = [
        abs(sum(s * x for s, x in zip(signs, true, strict=True)))
        for signs in product((1, -1), repeat=len(true))
    ]
    values = np.array(list(paired_differences(arm, reference).values()))
    assert sign_flip(values) == pytest.approx(np.mean([one >= abs(sum(true)) for one in flipped]))


@pytest.mark.parametrize("pairs", [6, 13])
def test_the_smallest_p_is_that_of_pairs_that_all_agree(pairs):
    assert sign_flip(np.arange(1.0, pairs + 1)) == pytest.approx(2.0 ** (1 - pairs))


def test_sign_flips_that_are_drawn_agree_with_the_normal_distribution_and_are_the_same_each_time():
    values = np.random.default_rng(3).normal(0.3, 1, 40)
    z = values.sum() / np.sqrt((values**2).sum())
    assert sign_flip(values) == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.015)
    assert sign_flip(values) == sign_flip(values.copy())


@pytest.mark.parametrize(("wins", "counted"), [(3.0, (3, 3)), (6.0, (6, 6)), (5.5, (5, 6)), (0.0, (0, 0))])
def test_the_share_of_wins_has_the_interval_of_clopper_and_pearson(wins, counted):
    low, high = (stats.binomtest(k, 6).proportion_ci(0.95, "exact") for k in counted)
    assert improvement(wins, 6) == pytest.approx((wins / 6, low.low, high.high))


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


def test_the_seeds_that_are_needed_allow_for_a_spread_that_was_underestimated():
    values = np.array([1.5, -1.0, 1.0, -0.5, 0.5, 0.3])
    plug_in = next(n for n in range(6, 999) if power(n, values.mean() / values.std(ddof=1), 0.95) >= 0.8)
    needed = pairs_needed(values, None, 0.95)
    assert 1.8 * plug_in < needed < 2.6 * plug_in
    assert pairs_needed(values * 1e-3, 0.05, 0.95) == 7, "equivalence is seen with one pair more"
    assert pairs_needed(values - values.mean() + 1e-4, None, 0.95) is None
    assert pairs_needed(np.zeros(6), None, 0.95) is None
