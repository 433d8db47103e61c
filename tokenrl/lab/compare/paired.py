"""Computes intervals, exact tests and power for differences that are paired by seed.

All comparisons of a family share an error probability of .05: with m of them, each is tested at .05 / m
(Bonferroni).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

ALPHA = 0.05
"""Probability of any false difference in a family."""
POWER = 0.8
LEAST_PAIRS = 6
"""Fewer pairs give no verdict: even if all of them agree, the sign-flip test stays above .05."""
MOST_PAIRS, LARGEST = 10_000, 1_000.0
"""Beyond so many pairs, and so many standard deviations of a difference, nothing is looked for."""
FLIPS = 2**13
"""Patterns of signs that are tried; up to 13 pairs these are all of them."""
DIGITS = 12
"""Digits, relative to the largest score, that count in a difference."""

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A number with its confidence interval; the ends are nan where there is none."""

    value: float
    low: float
    high: float

    @property
    def excludes_0(self) -> bool:
        """Whether both ends lie on the same side of 0."""
        return self.low > 0 or self.high < 0


def level_of(comparisons: int) -> float:
    """Return the level of each interval of a family, such as 0.9833 for three comparisons."""
    return 1 - ALPHA / max(1, comparisons)


def paired_differences(arm: Mapping[int, float], reference: Mapping[int, float]) -> dict[int, float]:
    """Return score of the arm minus score of the reference for each seed that both have.

    They are rounded to 12 digits of the largest score, so that differences that are equal but for the
    rounding of floating-point numbers are equal (.29 - .17 is not .12 in binary).
    """
    largest = max((abs(score) for score in (*arm.values(), *reference.values())), default=0.0)
    digits = DIGITS - (math.floor(math.log10(largest)) if largest else 0)
    return {
        seed: round(arm[seed] - reference[seed], digits) for seed in sorted(arm.keys() & reference.keys())
    }


def mean_interval(values: Array, level: float = 0.95) -> Interval:
    """Return the mean of some values [n] with its Student-t interval; a single value has no ends (nan)."""
    if len(values) < 2:
        return Interval(float(values.sum()) if len(values) else math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if not np.ptp(values):
        return Interval(mean, mean, mean)
    ends = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    return Interval(mean, float(ends.low), float(ends.high))


def sign_flip(differences: Array) -> float:
    """Return the two-sided p of the sign-flip test: the share of patterns of signs with as large a mean.

    If arm and reference could be exchanged, every pattern of signs would be equally probable. Up to 13 pairs
    all patterns are tried; for more, 8,192 are drawn with a fixed seed. Its smallest value is therefore
    2 ** (1 - n) for n pairs.

    Args:
        differences: paired differences [n].
    """
    if len(differences) < 2 or not differences.any():
        return 1.0
    test = stats.permutation_test(
        (differences / np.abs(differences).max(),),
        lambda signed, axis: np.round(np.mean(signed, axis), DIGITS),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


@lru_cache
def failure_rate(failed: int, runs: int) -> Interval:
    """Return the share of runs that failed, with exact limits (Clopper and Pearson).

    Each of the two limits holds with a probability of at least 95 %: if none of 6 runs failed, a failure rate
    of up to 39 % is not excluded, and with 20 runs one of up to 14 %.
    """
    ends = stats.binomtest(failed, runs).proportion_ci(1 - 2 * ALPHA, "exact")
    return Interval(failed / runs, float(ends.low), float(ends.high))


@lru_cache
def failures_differ(failed: int, runs: int, other_failed: int, other_runs: int) -> float:
    """Return the two-sided p of Fisher's exact test that two arms fail equally often.

    It takes the runs of the two arms as independent. Where the same seeds make both fail, p is too large.
    """
    table = [[failed, runs - failed], [other_failed, other_runs - other_failed]]
    return float(stats.fisher_exact(table).pvalue)


@lru_cache
def improvement(wins: float, pairs: int) -> Interval:
    """Return the share of pairs in which the arm is better, with an exact 95 % interval.

    Args:
        wins: pairs in which the arm is better; a tie counts half. The interval is that of the wins and half
            of the ties, rounded to whole pairs outwards.
        pairs: number of pairs.
    """
    fewest, most = (stats.binomtest(k, pairs).proportion_ci() for k in (math.floor(wins), math.ceil(wins)))
    return Interval(wins / pairs, float(fewest.low), float(most.high))


def power(pairs: int, effect: float, level: float) -> float:
    """Return the probability that the interval of a mean difference lies above 0.

    Args:
        pairs: number of pairs, at least 2.
        effect: the true mean difference over the standard deviation of a difference.
        level: level of the two-sided interval.
    """
    critical, shift = float(stats.t.ppf((1 + level) / 2, pairs - 1)), effect * math.sqrt(pairs)
    found = float(stats.nct.sf(critical, pairs - 1, shift))
    return found if math.isfinite(found) else float(stats.norm.sf(critical - shift))  # far out in the tail


def decisive_power(pairs: int, effect: float, margin: float, level: float) -> float:
    """Return a lower bound of the probability that an interval excludes 0 or lies within the margin.

    It is the larger of the two probabilities. The second is bounded from below by those of its two ends.

    Args:
        pairs: number of pairs, at least 2.
        effect: the true mean difference over the standard deviation of a difference.
        margin: the margin over the same; 0 if equivalence is not judged.
        level: level of the two-sided interval.
    """
    within = power(pairs, margin - effect, level) + power(pairs, margin + effect, level) - 1
    return max(power(pairs, abs(effect), level), within)


def detectable_difference(pairs: int, sd: float, comparisons: int = 1) -> float:
    """Return the smallest mean difference that a comparison finds with a power of 80 %.

    Args:
        pairs: number of pairs (seeds), at least 2.
        sd: standard deviation of a paired difference, in the units of the score.
        comparisons: number of comparisons in the family.
    """
    level = level_of(comparisons)
    return sd * float(optimize.brentq(lambda effect: power(pairs, effect, level) - POWER, 0.0, LARGEST))


def pairs_needed(differences: Array, margin: float | None, level: float) -> int | None:
    """Return how many pairs at least would decide, judged from the pairs that there are.

    It is the number with a power of 80 % if the mean difference is as found and the standard deviation is as
    large as may well be: its upper limit at a level of 80 %, because a few pairs often underestimate it.

    Args:
        differences: paired differences [n].
        margin: the margin of equivalence; None where it is not judged.
        level: level of the interval.

    Returns:
        The number, more than n and at least 6. None if all differences are equal, which says nothing of their
        spread, or if 10,000 pairs would not be enough.
    """
    n = len(differences)
    if n < 2 or np.ptp(differences) == 0:
        return None
    sd = float(np.std(differences, ddof=1)) * math.sqrt((n - 1) / stats.chi2.ppf(1 - POWER, n - 1))
    effect, room = float(np.mean(differences)) / sd, (margin or 0.0) / sd
    found = bisect_left(
        range(MOST_PAIRS + 1),
        True,
        lo=max(LEAST_PAIRS, n + 1),
        key=lambda pairs: decisive_power(pairs, effect, room, level) >= POWER,
    )
    return found if found <= MOST_PAIRS else None
