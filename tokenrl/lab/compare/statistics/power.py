"""Computes how many pairs a difference needs, and how small a difference a number of pairs can show.

All of it concerns paired t-tests at the level of a family: with m comparisons each is tested at .05 / m
(Bonferroni), so that the probability of any false difference in the family is at most .05.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

ALPHA = 0.05
"""Probability of any false difference in a family."""
POWER = 0.8
MOST_PAIRS = 10_000


def level_of(comparisons: int) -> float:
    """Return the level of each interval of a family, such as 0.9833 for three comparisons."""
    return 1 - ALPHA / max(1, comparisons)


@lru_cache
def critical(pairs: int, level: float) -> float:
    """Return the half-width of a t-interval in standard errors: the quantile of Student's t."""
    return float(stats.t.ppf((1 + level) / 2, pairs - 1))


def power(pairs: int, effect: float, level: float) -> float:
    """Return the probability that the interval of a mean difference excludes 0 on its own side.

    Args:
        pairs: number of pairs, at least 2.
        effect: the true mean difference over the standard deviation of a difference.
        level: level of the two-sided interval.
    """
    noncentrality = abs(effect) * math.sqrt(pairs)
    found = float(stats.nct.sf(critical(pairs, level), pairs - 1, noncentrality))
    if math.isfinite(found):
        return found
    return float(stats.norm.sf(critical(pairs, level) - noncentrality))  # far out in the tail


def equivalence_power(pairs: int, effect: float, margin: float, level: float) -> float:
    """Return the probability that the interval lies within the margin.

    Args:
        pairs: number of pairs, at least 2.
        effect: the true mean difference over the standard deviation of a difference.
        margin: the margin over the same standard deviation.
        level: level of the two-sided interval.
    """
    center, room = effect * math.sqrt(pairs), _room(pairs, margin, level)
    return float((special.ndtr(room - center) - special.ndtr(-room - center)).mean())


def decisive_power(pairs: int, effect: float, margin: float, level: float) -> float:
    """Return the probability that the interval excludes 0 on its own side or lies within the margin.

    The arguments are those of `equivalence_power`; a margin of 0 means that equivalence is not judged.
    """
    center, room = abs(effect) * math.sqrt(pairs), _room(pairs, margin, level)
    far = np.maximum(room, critical(pairs, level) * _spreads(pairs - 1))
    inside = special.ndtr(room - center) - special.ndtr(-room - center)
    return float((inside + special.ndtr(center - far)).mean())


def _room(pairs: int, margin: float, level: float) -> NDArray[np.float64]:
    """Return how far from 0 a mean may lie that is still equivalent, in true standard errors.

    It depends on the sample's standard deviation, so it has an entry for each of its quantiles.
    """
    return np.maximum(0.0, margin * math.sqrt(pairs) - critical(pairs, level) * _spreads(pairs - 1))


@lru_cache
def _spreads(degrees: int) -> NDArray[np.float64]:
    """Return the sample's standard deviation over the true one, at 64 evenly spaced quantiles."""
    quantiles = (np.arange(64) + 0.5) / 64
    return np.asarray(np.sqrt(stats.chi2.ppf(quantiles, degrees) / degrees))


def detectable_difference(pairs: int, sd: float, comparisons: int = 1, power_wanted: float = POWER) -> float:
    """Return the smallest mean difference that a comparison finds with the wanted power.

    Args:
        pairs: number of pairs (seeds), at least 2.
        sd: standard deviation of a paired difference, in the units of the score.
        comparisons: number of comparisons in the family.
        power_wanted: the probability with which it is to be found.
    """
    level = level_of(comparisons)
    high = 1.0
    while power(pairs, high, level) < power_wanted:
        high *= 2
    found = optimize.brentq(lambda effect: power(pairs, effect, level) - power_wanted, 0.0, high)
    return sd * float(found)


def pairs_needed(
    mean: float, sd: float, margin: float | None, comparisons: int, least: int = 6
) -> int | None:
    """Return the number of pairs with which a verdict is reached with a power of 80 %.

    The verdict is a difference of the true sign, or equivalence.

    Args:
        mean: the true mean difference.
        sd: the true standard deviation of a difference; 0 needs no more than the least number.
        margin: the margin of equivalence, in the same units; None where it is not judged.
        comparisons: number of comparisons in the family.
        least: the smallest number of pairs that gives a verdict.

    Returns:
        The number, or None if 10,000 pairs are not enough.
    """
    level = level_of(comparisons)
    if sd <= 0:
        return least if mean or margin is not None else None

    def enough(pairs: int) -> bool:
        return decisive_power(pairs, mean / sd, (margin or 0.0) / sd, level) >= POWER

    if not enough(MOST_PAIRS):
        return None
    low, high = least - 1, MOST_PAIRS  # low is not enough, unless it is below the least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
