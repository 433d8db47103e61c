"""Computes intervals, exact tests and power for differences that are paired by seed.

All comparisons of a family share an error probability of .05: with m of them, each is tested at .05 / m
(Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, stats

ALPHA = 0.05
"""Probability of any false difference in a family."""
POWER = 0.8
LEAST_PAIRS = 6
"""Fewer pairs give no verdict: even if all of them agree in sign, that happens by chance in more than 5 %."""
LARGEST_SHIFT = 30.0
"""Upper bound of the detectable difference, in standard errors of a mean difference of six pairs or more."""
DIGITS = 12
"""Digits, relative to the largest score, that count in a difference."""

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A number with its confidence interval; the ends are nan where there is none."""

    value: float
    low: float
    high: float


def level_of(comparisons: int) -> float:
    """Return the level of each interval of a family, such as 0.9833 for three comparisons."""
    return 1 - ALPHA / max(1, comparisons)


def differences_by_seed(
    arm: Mapping[int, float], reference: Mapping[int, float]
) -> dict[int, float]:
    """Return score of the arm minus score of the reference for each seed that both have.

    They are rounded to 12 digits of the largest score, so that differences that are equal but for the
    rounding of floating-point numbers are equal (.29 - .17 is not .12 in binary).
    """
    scores = pd.DataFrame({"arm": arm, "reference": reference}, dtype=float)
    largest = scores.abs().max().max()
    decimals = DIGITS - math.floor(math.log10(largest)) if largest > 0 else DIGITS
    differences = (scores["arm"] - scores["reference"]).dropna().sort_index()
    return dict(differences.round(decimals))


def mean_interval(values: Array, level: float = 0.95) -> Estimate:
    """Return the mean of some values [n] with its Student-t interval; a single value has no ends (nan)."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    if not np.ptp(values):
        return Estimate(mean, mean, mean)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    return Estimate(mean, float(low), float(high))


@lru_cache
def failure_rate(failed: int, runs: int) -> Estimate:
    """Return the share of runs that failed, with exact limits (Clopper and Pearson).

    Each of the two limits holds with a probability of at least 95 %: if none of 6 runs failed, a failure rate
    of up to 39 % is not excluded; with 20 runs the limit is 14 %.
    """
    low, high = stats.binomtest(failed, runs).proportion_ci(1 - 2 * ALPHA, "exact")
    return Estimate(failed / runs, float(low), float(high))


@lru_cache
def failures_differ(failed: int, runs: int, other_failed: int, other_runs: int) -> float:
    """Return the two-sided p of Fisher's exact test that two arms fail equally often.

    It takes the runs of the two arms as independent. Where the same seeds make both fail, p is too large.
    """
    table = [[failed, runs - failed], [other_failed, other_runs - other_failed]]
    return float(stats.fisher_exact(table).pvalue)


def detectable_difference(pairs: int, sd: float, comparisons: int = 1) -> float:
    """Return the mean difference whose interval lies above 0 with a probability of 80 %.

    A verdict of better or worse is as probable only if no margin is set, or if the interval then also ends
    beyond it: an interval within the margin is equivalent, whether it excludes 0 or not.

    Args:
        pairs: number of pairs (seeds), at least 6.
        sd: standard deviation of a paired difference, in the units of the score.
        comparisons: number of comparisons in the family.
    """
    critical = stats.t.ppf((1 + level_of(comparisons)) / 2, pairs - 1)
    shift = optimize.brentq(
        lambda shift: stats.nct.sf(critical, pairs - 1, shift) - POWER, 0.0, LARGEST_SHIFT
    )
    return sd * float(shift) / math.sqrt(pairs)
