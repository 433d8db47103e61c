"""Shares the error of a comparison between several looks at it, which were fixed before its first run.

Who looks at scores, adds seeds and looks again errs more often than each look says. Here the error that has been
spent by a look follows a function of the share of the seeds (Lan and DeMets 1983, Biometrika 70, 659), whatever the
earlier looks showed; a look may be left out. The function is that of O'Brien and Fleming (1979, Biometrics 35, 549):
hardly anything at first, nearly all at the end.

The levels are those of sums of normal numbers. A look compares a Student-t statistic with its quantile at the level
of the look (Jennison and Turnbull 2000, Group Sequential Methods, 4.4), which is exact for many pairs. With few, normal
scores and no margin, looks at 6, 12 and 18 pairs err in 5.1 % of comparisons, and looks at each number from 6 to 12
in 5.6 %. recipes/study/looks.py simulates other scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import integrate, optimize, stats

from tokenrl.errors import Refused
from tokenrl.lab.compare.intervals import ALPHA, Array
from tokenrl.settings import Count, checked, shown

GRID = 801
"""Points at which the density of the sums that go on is held; it must be odd."""
FARTHEST = 40.0
"""Standard deviations from 0 beyond which a normal number has no probability in double precision."""


def check_looks(name: str, looks: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of seeds after which arms are looked at, as plain numbers.

    Raises:
        Refused: there are none, they are no whole numbers, or do not rise.
    """
    whole = tuple(checked(name, looks, tuple[Count, ...]))
    if not whole or [*whole] != sorted({*whole}):
        raise Refused(
            f"{name} was given as {shown(looks)}; give the number of runs of each arm, or several that rise, such as "
            "8 12 16, after which the arms are judged."
        )
    return whole


def looked_twice(before: int, now: int) -> str:
    """Say how often equal arms are called different by who looks twice, each time as if it were the only look."""
    return (
        f"Who looks after {before} seeds, and again after {now}, calls equal arms different in "
        f"{error_of_looks((before, now), ALPHA):.1%} of comparisons instead of {ALPHA:.0%}; looks that are given "
        f"before share the error (--seeds {before} {now})."
    )


def spent(share: float, alpha: float) -> float:
    """Return the two-sided error that is spent when a share of the pairs, above 0 and at most 1, has been seen.

    Each side spends `2 - 2 Phi(z_{alpha / 4} / sqrt(share))` of its alpha / 2.
    """
    return float(4 * stats.norm.sf(stats.norm.isf(alpha / 4) / math.sqrt(share)))


@lru_cache
def levels_of_looks(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """Return for each look the two-sided level at which it is tested alone, so that all spend alpha together.

    With one look the level is alpha.

    Args:
        looks: the numbers of pairs at the looks, which rise; the last is that of all pairs.
        alpha: the error of all looks together.
    """
    if len(looks) == 1:
        return (alpha,)
    levels = []
    sums = Sums()
    total = 0.0
    for pairs in looks:
        goal = spent(pairs / looks[-1], alpha)
        level = sums.level(pairs, goal - total)
        total += sums.stop(pairs, level)
        levels.append(level)
    return tuple(levels)


def error_of_looks(looks: Sequence[int], level: float) -> float:
    """Return the error of all looks together if each is made at the same two-sided level."""
    sums = Sums()
    return sum(sums.stop(pairs, level) for pairs in looks)


class Sums:
    """The density of a sum of standard normal numbers that no look has stopped so far, on a grid.

    It is integrated from look to look (Armitage, McPherson and Rowe 1969, J. R. Statist. Soc. A 132, 235).
    """

    def __init__(self) -> None:
        """Begin before the first look, where the sum is 0."""
        self.pairs = 0
        self.points = np.zeros(1)
        self.density = np.ones(1)

    def stop(self, pairs: int, level: float) -> float:
        """Stop what is beyond the bound of a look at a level; return its probability."""
        bound = min(FARTHEST, stats.norm.isf(level / 2)) * math.sqrt(pairs)
        probability = self.beyond(pairs, bound)
        points = np.linspace(-bound, bound, GRID)
        steps = stats.norm.pdf(points[:, None] - self.points, scale=math.sqrt(pairs - self.pairs))
        self.density = self._integral(steps)
        self.points, self.pairs = points, pairs
        return probability

    def level(self, pairs: int, probability: float) -> float:
        """Return the level of a look that stops a share of all sums with this probability."""
        root = math.sqrt(pairs)
        bound = optimize.brentq(
            lambda z: self.beyond(pairs, z * root) - probability, 0.0, FARTHEST, xtol=1e-10
        )
        return float(2 * stats.norm.sf(bound))

    def beyond(self, pairs: int, bound: float) -> float:
        """Return the probability that a sum goes on to a look and is beyond its bound there, on either side."""
        scale = math.sqrt(pairs - self.pairs)
        tails = stats.norm.sf(bound - self.points, scale=scale) + stats.norm.cdf(
            -bound - self.points, scale=scale
        )
        return float(self._integral(tails))

    def _integral(self, values: Array) -> Array:
        """Return the integral over the grid of values [..., points] times the density."""
        weighted = values * self.density
        if len(self.points) == 1:
            return np.asarray(weighted[..., 0])
        return np.asarray(integrate.simpson(weighted, x=self.points, axis=-1))
