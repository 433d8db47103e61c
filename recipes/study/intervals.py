"""Intervals of the study's differences: Student's, and simulated ones where rates are chosen on the same runs.

In questions 7, 12 and 13 every rate has a run on every unit (a seed, a base model or a task), and an arm's score in
a unit is the one at the rate that is best in the other units. Student's t is too small a critical value for such
scores. Where all units choose one rate, the spread of the scores holds nothing of the choice. Where they do not,
each score depends on the other units.

So the critical value is simulated. Units are drawn from a normal distribution with the means and the covariance
of the measured scores, rates are chosen again, and |t| is compared with its quantile at the level of the family.
How far apart an arm's rates truly lie is not known: their measured gaps are simulated, parts of these gaps, and
equal rates. The largest quantile counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

MARGIN = 0.02
SHARES = (1, 0.75, 0.5, 0.25, 0)
"""Parts of the measured gaps between the rates of an arm that are simulated."""
DRAWS = 50_000
Score = Callable[[np.ndarray], np.ndarray]
"""Takes the scores of an arm, [kinds, rates, ..., units], at the rate that it chooses: [..., units]."""


class Interval(NamedTuple):
    """A mean with the ends of its interval."""

    mean: float
    low: float
    high: float

    def verdict(self, margin: float = MARGIN) -> str:
        """Return better, worse, equivalent within the margin, or undecided."""
        if max(-self.low, self.high) <= margin:
            return "equivalent"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "undecided"

    def text(self, form: str = ".3f") -> str:
        """Return the mean, with the ends in brackets."""
        mean, low, high = (format(number, form) for number in self)
        return f"{mean} [{low}, {high}]"

    def cell(self, margin: float = MARGIN) -> str:
        """Return the numbers and the verdict."""
        return f"{self.text('.3g')} {self.verdict(margin)}"


def around(mean: float, half: float) -> Interval:
    """Return the interval of this half-width around a mean."""
    return Interval(mean, mean - half, mean + half)


def half_width(spread: float, pairs: int, comparisons: int) -> float:
    """Return the half-width of a Student-t interval from a standard deviation, at 5 % shared by the comparisons."""
    return stats.t.ppf(1 - 0.025 / comparisons, pairs - 1) * spread / np.sqrt(pairs)


def student(values: pd.Series, comparisons: int = 1) -> Interval:
    """Return the mean of some values with its Student-t interval, at 5 % shared by the comparisons."""
    return around(values.mean(), half_width(values.std(), len(values), comparisons))


def bases_at_large(table: np.ndarray) -> tuple[Interval, np.ndarray]:
    """Split differences by base and seed, [bases, seeds], as zero_sort_digits.yaml says.

    Returns:
        The interval of the mean; and the variances of bases, of seeds and of the rest.
    """
    bases, seeds = table.shape
    mean, of_base, of_seed = table.mean(), table.mean(1), table.mean(0)
    rest = table - of_base[:, None] - of_seed + mean
    freedom = np.array([bases - 1, seeds - 1, (bases - 1) * (seeds - 1)])
    residual = (rest**2).sum() / freedom[2]
    squares = np.array([seeds * of_base.var(ddof=1), bases * of_seed.var(ddof=1), residual])
    total = squares[0] + squares[1] - squares[2]
    degrees = total**2 / (squares**2 / freedom).sum()
    if total < squares[0]:
        total, degrees = squares[0], freedom[0]
    half = stats.t.ppf(1 - 0.05 / 4, degrees) * np.sqrt(total / table.size)
    variances = np.append(np.maximum(squares[:2] - squares[2], 0) / (seeds, bases), squares[2])
    return around(mean, half), variances


def at_largest(scores: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return the last of scores [kinds, rates, ..., units] at the rate where sums [rates, ..., units] are largest."""
    return np.take_along_axis(scores[-1], sums.argmax(0)[None], 0)[0]


def at_best_rates_of_others(scores: np.ndarray) -> np.ndarray:
    """Return an arm's score in each unit, at the rate that is best in the other units.

    Args:
        scores: [kinds, rates, ..., units]; the first kind of score decides which rate is best, the last counts.
    """
    return at_largest(scores, scores[0].sum(-1, keepdims=True) - scores[0])


def at_one_rate(scores: np.ndarray) -> np.ndarray:
    """Return an arm's score in each unit, at the one rate that is best over all units; [kinds, rates, ..., units]."""
    sums = np.broadcast_to(scores[0].sum(-1, keepdims=True), scores[0].shape)
    return at_largest(scores, sums)


def at_own_rates(scores: np.ndarray) -> np.ndarray:
    """Return an arm's score in each unit, at the rate that is best in this unit; [kinds, rates, ..., units]."""
    return at_largest(scores, scores[0])


def differences(arms: Iterable[np.ndarray], score: Score = at_best_rates_of_others) -> np.ndarray:
    """Return each later arm's score minus that of the first, [arms - 1, ..., units]."""
    reference, *others = map(score, arms)
    return np.array(others) - reference


def redrawn(scores: np.ndarray, normals: np.ndarray, share: float = 1) -> np.ndarray:
    """Draw units anew, with scores relative to the true score of the arm at its best rate.

    Args:
        scores: [kinds, rates, units].
        normals: standard normal numbers, [units, draws, units drawn].
        share: the part of the measured gaps between rates that is true.
    """
    means = scores.mean(-1, keepdims=True)
    gaps = share * (means - means[:, [means[0].argmax()]])
    noise = np.tensordot(scores - means, normals, 1) / np.sqrt(len(normals) - 1)
    return gaps[..., None] + noise


def half_widths(
    arms: Collection[np.ndarray], times: int = 1, score: Score = at_best_rates_of_others
) -> np.ndarray:
    """Return half the width of each later arm's interval if there were so many times the units, equally spread.

    It is the |t| that chance exceeds in a comparison's part of 5 %, times the standard error.
    """
    gaps = differences(arms, score)
    units = times * gaps.shape[1]
    normals = np.random.default_rng(0).standard_normal((gaps.shape[1], DRAWS, units))
    critical = []
    for share in SHARES:
        drawn = differences((redrawn(scores, normals, share) for scores in arms), score)
        t = np.abs(stats.ttest_1samp(drawn, 0, axis=-1).statistic)
        critical.append(np.quantile(t, 1 - 0.05 / len(gaps), axis=-1))
    return np.max(critical, axis=0) * gaps.std(1, ddof=1) / np.sqrt(units)


def chosen(
    arms: Mapping[str, np.ndarray], score: Score = at_best_rates_of_others
) -> dict[str, Interval]:
    """Return the interval of each arm minus the first, with simulated critical values."""
    means = differences(arms.values(), score).mean(1)
    halves = half_widths(arms.values(), score=score)
    return dict(zip([*arms][1:], map(around, means, halves), strict=True))


def resampled(values: np.ndarray) -> str:
    """Return the first number, with the 95 % interval of the others."""
    return Interval(values[0], *np.quantile(values[1:], [0.025, 0.975])).text(".3g")


def side(low: float, high: float) -> int:
    """Return on which side of 0 an interval lies: 1, -1, or 0 if it contains 0."""
    return int(low > 0) - int(high < 0)


def pairs_needed(differences: pd.Series) -> int:
    """Return how many pairs of this spread give intervals of .25 to either side, where six share 5 %."""
    return next(n for n in count(2) if half_width(differences.std(), n, 6) <= 0.25)


def peak(rates: pd.Index, areas: np.ndarray) -> float:
    """Return the rate at the top of the parabola through the best point and its neighbours, over log2."""
    top = int(np.argmax(areas))
    if top in (0, len(areas) - 1):
        return rates[top]
    before, highest, after = areas[top - 1 : top + 2]
    return rates[top] * 2 ** (0.5 * (before - after) / (before - 2 * highest + after))


def fit_curve(table: pd.DataFrame) -> np.ndarray:
    """Return -a and b of the curve R = -a exp(H) + b through evaluations, by least squares."""
    return np.polyfit(np.exp(table["entropy"]), table["reward"], 1)
