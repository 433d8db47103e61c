"""The numbers behind a verdict: power, and the smallest difference that a comparison can show."""

import pytest

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


@pytest.mark.parametrize("pairs", [6, 40])
@pytest.mark.parametrize("comparisons", [1, 3])
def test_the_detectable_difference_has_the_power_and_scales_with_the_spread(pairs, comparisons):
    least = detectable_difference(pairs, 1.0, comparisons)
    assert power(pairs, least, level_of(comparisons)) == pytest.approx(0.8)
    assert detectable_difference(pairs, 0.01, comparisons) == pytest.approx(0.01 * least)
