"""Computes intervals, tests and verdicts from paired differences: the numbers, without names and tables.

The functions take arrays whose last axis runs over pairs, so that many studies can be judged at once.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tokenrl.lab.compare.statistics.found import Interval, Verdict
from tokenrl.lab.compare.statistics.power import critical

Array = NDArray[np.float64]
LEAST_PAIRS = 6
"""Fewer pairs give no verdict: even if all of them agree, the sign-flip test stays above .05."""
EXACT_PAIRS = 14
"""Up to this many pairs all 2^n sign flips are enumerated."""
DRAWN = 9_999
"""Sign flips that are drawn for more pairs."""


def half_width(differences: Array, level: float) -> Array:
    """Return the half-width of the Student-t interval of the mean; nan for a single pair.

    Args:
        differences: paired differences [..., n].
        level: level of the interval.
    """
    n = differences.shape[-1]
    if n < 2:
        return np.full(differences.shape[:-1], np.nan)
    spread = differences.std(axis=-1, ddof=1)
    return np.asarray(critical(n, level) * spread / math.sqrt(n))


def interval(values: Array, level: float = 0.95) -> Interval:
    """Return the mean of some values [n] with its Student-t interval; a single value has no ends (nan)."""
    mean, half = float(values.mean()), float(half_width(values, level))
    return Interval(mean, mean - half, mean + half)


def verdicts(low: Array, high: Array, margin: float | None) -> NDArray[np.int64]:
    """Return a verdict for each interval: 2 equivalent, 1 better, -1 worse, 0 undecided.

    An interval within the margin is equivalent also if it excludes 0: then there is a difference, and it is
    smaller than what counts as one.

    Args:
        low: lower ends.
        high: upper ends.
        margin: the margin; None where equivalence is not judged.
    """
    found = np.where(low > 0, 1, np.where(high < 0, -1, 0))
    if margin is not None:
        found = np.where((low >= -margin) & (high <= margin), 2, found)
    return np.asarray(found)


WORDS: dict[int, Verdict] = {2: "equivalent", 1: "better", -1: "worse", 0: "undecided"}


def verdict(found: Interval, margin: float | None) -> Verdict:
    """Return the verdict of one interval."""
    return WORDS[int(verdicts(np.array(found.low), np.array(found.high), margin))]


def sign_flip(differences: Array) -> float:
    """Return the two-sided p of the sign-flip test: the share of sign flips with as large a mean.

    Under the hypothesis that arm and reference could be exchanged, every pattern of signs is equally
    probable. All of them are enumerated up to 14 pairs; for more, 9,999 are drawn with a fixed seed.

    Args:
        differences: paired differences [n].
    """
    sums = np.abs(_signs(len(differences)) @ differences)
    # Scores such as .29 and .17 are rounded, so that means that are equal differ in their last digits.
    rounding = 1e-12 * np.abs(differences).sum()
    as_large = sums >= abs(differences.sum()) - rounding
    return float(as_large.mean())


@lru_cache(maxsize=4)
def _signs(pairs: int) -> Array:
    """Return patterns of signs [patterns, pairs], the observed one (no flip) first.

    Half of all patterns are enough: the others are their opposites, whose means are as large.
    """
    if pairs <= EXACT_PAIRS:
        bits = np.arange(2 ** (pairs - 1))[:, None] >> np.arange(pairs) & 1
    else:
        bits = np.random.default_rng(0).integers(0, 2, (DRAWN + 1, pairs))
        bits[0] = 0
    return np.asarray(1.0 - 2.0 * bits, dtype=np.float64)


def least_p(pairs: int) -> float:
    """Return the smallest p that the sign-flip test can give with this many pairs."""
    return 2.0 ** (1 - pairs) if pairs <= EXACT_PAIRS else 1 / (DRAWN + 1)


def holm(p: list[float]) -> list[float]:
    """Return p-values adjusted for being several, by Holm's step-down method (Holm 1979)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def improvement(differences: Array) -> Interval:
    """Return the share of pairs in which the arm is better, with a 95 % interval (Clopper and Pearson).

    Ties count half; the interval is that of the wins and half of the ties, rounded to whole pairs outwards.

    Args:
        differences: paired differences [n].
    """
    n = len(differences)
    wins = float((differences > 0).sum() + 0.5 * (differences == 0).sum())
    fewest, most = math.floor(wins), math.ceil(wins)
    low = stats.beta.ppf(0.025, fewest, n - fewest + 1) if fewest else 0.0
    high = stats.beta.ppf(0.975, most + 1, n - most) if most < n else 1.0
    return Interval(wins / n, float(low), float(high))
