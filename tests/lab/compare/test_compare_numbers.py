"""The numbers behind a verdict: sign flips, Holm's adjustment, shares of wins, power."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from tokenrl.lab.compare.statistics.paired import holm, improvement, least_p, sign_flip
from tokenrl.lab.compare.statistics.power import (
    decisive_power,
    detectable_difference,
    equivalence_power,
    level_of,
    pairs_needed,
    power,
)

few = settings(max_examples=50, deadline=None)
whole = st.lists(st.integers(-20, 20), min_size=2, max_size=9)


@few
@given(whole)
def test_sign_flips_give_the_p_of_scipy(differences):
    values = np.array(differences, dtype=float)
    known = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert sign_flip(values) == pytest.approx(known.pvalue, abs=1e-12)


@few
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(-6, 6)), min_size=2, max_size=8))
def test_sign_flips_of_rounded_scores_are_counted_as_if_they_were_not_rounded(hundredths):
    """.29 - .17 is not .12 in binary; means that are equal must count as equal, also if they are 0."""
    rounded = np.array([(score + by) / 100 - score / 100 for score, by in hundredths])
    true = [Fraction(by, 100) for _, by in hundredths]
    flipped = [
        abs(sum(s * x for s, x in zip(signs, true, strict=True)))
        for signs in product((1, -1), repeat=len(true))
    ]
    assert sign_flip(rounded) == np.mean([one >= abs(sum(true)) for one in flipped])


@pytest.mark.parametrize("pairs", [1, 6, 14, 15, 40])
def test_the_smallest_p_is_that_of_pairs_that_all_agree(pairs):
    assert sign_flip(np.arange(1.0, pairs + 1)) == pytest.approx(least_p(pairs))


def test_sign_flips_that_are_drawn_agree_with_the_normal_distribution_and_are_the_same_each_time():
    values = np.random.default_rng(3).normal(0.3, 1, 40)
    z = values.sum() / np.sqrt((values**2).sum())
    assert sign_flip(values) == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01)
    assert sign_flip(values) == sign_flip(values.copy()) == sign_flip(-values)


@given(
    st.lists(st.floats(0, 1) | st.floats(0, 0.1), min_size=1, max_size=6), st.sampled_from([0.01, 0.05, 0.2])
)
def test_holm_rejects_what_the_step_down_procedure_of_the_textbook_rejects(p, alpha):
    rejected = set()
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[place] > alpha / (len(p) - rank):
            break
        rejected.add(place)
    adjusted = holm(p)
    near = {i for i, q in enumerate(adjusted) if abs(q - alpha) < 1e-12}
    assert {i for i, q in enumerate(adjusted) if q <= alpha} - near == rejected - near
    assert all(p[i] <= adjusted[i] <= 1 for i in range(len(p)))


def test_holm_gives_the_numbers_of_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("differences", "share", "counted"),
    [
        ([1, 1, 1, -1, -1, -1], 0.5, (3, 3)),
        ([1] * 6, 1.0, (6, 6)),
        ([0] + [1] * 5, 5.5 / 6, (5, 6)),
        ([-1] * 6, 0.0, (0, 0)),
    ],
)
def test_the_share_of_wins_has_the_interval_of_clopper_and_pearson(differences, share, counted):
    found = improvement(np.array(differences, dtype=float))
    low, high = (stats.binomtest(k, 6).proportion_ci(0.95, "exact") for k in counted)
    assert found == pytest.approx((share, low.low, high.high))


def test_the_level_of_a_family_shares_five_percent_among_its_comparisons():
    assert [level_of(m) for m in (1, 2, 5)] == pytest.approx([0.95, 0.975, 0.99])


def test_power_is_that_of_the_tables():
    """Cohen (1988): 34 pairs for an effect of .5, 15 for .8, at a level of .05 and a power of .8."""
    assert pairs_needed(0.5, 1.0, None, 1) == 34 and pairs_needed(0.8, 1.0, None, 1) == 15
    assert power(33, 0.5, 0.95) < 0.8 <= power(34, 0.5, 0.95)


@pytest.mark.parametrize("pairs", [6, 10, 40])
@pytest.mark.parametrize("comparisons", [1, 3])
def test_the_detectable_difference_has_the_power_and_scales_with_the_spread(pairs, comparisons):
    least = detectable_difference(pairs, 1.0, comparisons)
    assert power(pairs, least, level_of(comparisons)) == pytest.approx(0.8)
    assert detectable_difference(pairs, 0.01, comparisons) == pytest.approx(0.01 * least)
    assert detectable_difference(pairs, 1.0, comparisons, 0.9) > least


@pytest.mark.parametrize("pairs", [6, 10, 40])
@pytest.mark.parametrize(("effect", "margin"), [(0.0, 1.5), (0.3, 1.0), (-1.0, 2.0), (2.0, 1.0)])
def test_the_power_of_equivalence_is_the_integral_over_what_the_spread_may_be(pairs, effect, margin):
    root, t = np.sqrt(pairs), stats.t.ppf((1 + level_of(3)) / 2, pairs - 1)

    def within(spread: float) -> float:
        room = max(0.0, margin * root - t * spread)
        return stats.norm.cdf(room - effect * root) - stats.norm.cdf(-room - effect * root)

    known = stats.chi(pairs - 1, scale=1 / np.sqrt(pairs - 1)).expect(within)
    assert equivalence_power(pairs, effect, margin, level_of(3)) == pytest.approx(known, abs=0.002)


@few
@given(st.floats(0.01, 3), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(6, 60))
def test_the_power_to_decide_is_that_of_either_verdict(effect, margin, pairs):
    level = level_of(3)
    parts = power(pairs, effect, level), equivalence_power(pairs, effect, margin, level)
    found = decisive_power(pairs, effect, margin, level)
    assert max(parts) - 0.001 <= found <= min(1.0, sum(parts)) + 0.001


@few
@given(st.floats(-3, 3), st.floats(0.3, 3), st.sampled_from([None, 0.5, 2.0]))
def test_the_pairs_that_are_needed_are_the_fewest_that_reach_the_power(mean, sd, margin):
    found = pairs_needed(mean, sd, margin, 3)
    reached = (
        n for n in range(6, 400) if decisive_power(n, mean / sd, (margin or 0) / sd, level_of(3)) >= 0.8
    )
    fewest = next(reached, None)
    assert found == fewest or (fewest is None and (found is None or found >= 400))


@pytest.mark.parametrize(
    ("mean", "margin", "needed"), [(0.1, None, 6), (0.0, 0.1, 6), (0.0, None, None), (0.5, 0.1, 6)]
)
def test_without_any_spread_the_fewest_pairs_decide_what_can_be_decided(mean, margin, needed):
    assert pairs_needed(mean, 0.0, margin, 3) == needed


def test_a_difference_that_is_next_to_none_needs_more_pairs_than_can_be_asked_for():
    assert pairs_needed(1e-4, 1.0, None, 1) is None
