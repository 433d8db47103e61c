"""The numbers behind a verdict: power, and the smallest difference that a comparison can show."""

import re

import numpy as np
import pytest
from folders import RECIPES
from scipy import stats

from tokenrl.lab.compare.intervals import detectable_difference, level_of


def test_power_is_that_of_the_tables():
    """Cohen (1988): 34 pairs for an effect of .5, 15 for .8, at a level of .05 and a power of .8."""
    assert detectable_difference(34, 1.0) <= 0.5 < detectable_difference(33, 1.0)
    assert detectable_difference(15, 1.0) <= 0.8 < detectable_difference(14, 1.0)


def same_arms(pairs, comparisons):
    """The lower and the upper ends of intervals of arms that are the same, in standard deviations."""
    differences = np.random.default_rng(pairs).standard_normal((100_000, pairs))
    intervals = stats.ttest_1samp(differences, 0, axis=1).confidence_interval(level_of(comparisons))
    return intervals.low, intervals.high


def test_the_guide_says_what_seeds_show():
    """Told from 0 are intervals above 0, better those that also end beyond the margin."""
    text = (RECIPES / "pages" / "guides" / "compare.md").read_text()
    rows = re.findall(r"^\| (\d+) \|" + r" ([\d.]+) \|" * 4 + "$", text, re.MULTILINE)
    assert len(rows) == 3
    for pairs, *numbers in rows:
        for column, comparisons in enumerate((1, 3)):
            low, high = same_arms(int(pairs), comparisons)
            told, margin = np.quantile([-low, np.maximum(-low, high)], 0.8, axis=1)
            assert [*map(float, numbers[column::2])] == pytest.approx([told, margin], abs=0.05)
            least = detectable_difference(int(pairs), 0.01, comparisons)
            assert least == pytest.approx(0.01 * told, rel=0.02)
