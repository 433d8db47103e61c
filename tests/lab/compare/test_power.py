"""The numbers behind a verdict: power, and the smallest difference that a comparison can show."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tokenrl.lab.compare.intervals import (
    detectable_difference,
    level_of,
    power,
)


def test_power_is_that_of_the_tables():
    """Cohen (1988): 34 pairs for an effect of .5, 15 for .8, at a level of .05 and a power of .8."""
    assert power(33, 0.5, 0.95) < 0.8 <= power(34, 0.5, 0.95)
    assert power(14, 0.8, 0.95) < 0.8 <= power(15, 0.8, 0.95)
    assert power(40, 50.0, 0.95) == 1, "also where the distribution of t overflows"


ROOT = Path(__file__).parents[3]
SPREADS = np.linspace(0.002, 0.011, 10)
"""Standard deviations of a paired difference, as on the toy tasks."""


@pytest.mark.parametrize("pairs", [6, 40])
@pytest.mark.parametrize("comparisons", [1, 3])
def test_the_detectable_difference_has_the_power_and_scales_with_the_spread(pairs, comparisons):
    least = detectable_difference(pairs, 1.0, comparisons)
    assert power(pairs, least, level_of(comparisons)) == pytest.approx(0.8)
    assert detectable_difference(pairs, 0.01, comparisons) == pytest.approx(0.01 * least)


def same_arms(pairs, comparisons):
    """The lower and the upper ends of intervals of arms that are the same, in standard deviations."""
    differences = np.random.default_rng(pairs).standard_normal((100_000, pairs))
    intervals = stats.ttest_1samp(differences, 0, axis=1).confidence_interval(level_of(comparisons))
    return intervals.low, intervals.high


def test_the_guide_says_what_seeds_show():
    text = (ROOT / "recipes" / "pages" / "guides" / "compare.md").read_text()
    rows = re.findall(r"^\| (\d+) \|" + r" ([\d.]+) \|" * 4 + "$", text, re.MULTILINE)
    assert len(rows) == 3
    for pairs, *numbers in rows:
        for column, comparisons in enumerate((1, 3)):
            told, margin = map(float, numbers[column::2])
            assert told == pytest.approx(
                detectable_difference(int(pairs), 1, comparisons), abs=0.05
            )
            low, high = same_arms(int(pairs), comparisons)
            assert margin == pytest.approx(np.quantile(np.maximum(-low, high), 0.8), abs=0.05)
    low, high = same_arms(6, 1)
    # An arm is better if the interval lies above 0 and ends beyond the margin.
    least = [np.quantile(np.maximum(-low * sd, 0.02 - high * sd), 0.8) for sd in SPREADS]
    assert f"of {min(least):.3f} to {max(least):.3f} is called".replace("0.", ".") in text
