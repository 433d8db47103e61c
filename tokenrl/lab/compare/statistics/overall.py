"""Summarises the scores of arms over several problems: interquartile mean and performance profile.

Both describe each arm by itself. They are not paired by seed, so two arms whose intervals overlap may still
differ; what decides are the paired differences on each problem.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tokenrl.errors import Refused
from tokenrl.lab.compare.statistics.found import Interval

LEVEL = 0.95
RESAMPLES = 9_999
LEAST_FOR_BCA = 10
"""Number of runs on each problem from which BCa intervals are used."""
POINTS = 101

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Overall:
    """The arms over all problems, unpaired.

    Scores are normalised: 0 is the least reward that a problem declares, 1 the greatest.

    Attributes:
        arms: by arm, the interquartile mean (the mean of the middle half) of the normalised scores of all
            runs on all problems, with a bootstrap interval; without ends (nan) if a problem has one run only.
        profiles: by arm, its performance profile: pairs of a normalised score and the share of runs that
            reach at least that score, each problem weighing the same. The scores are the same for every arm.
        level: level of the intervals.
        method: how the intervals were made, in words.
    """

    arms: dict[str, Interval]
    profiles: dict[str, tuple[tuple[float, float], ...]]
    level: float
    method: str


def overall(
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
    ranges: Mapping[str, tuple[float, float]],
    *,
    seed: int = 0,
) -> Overall:
    """Summarise the scores of arms over problems.

    The bootstrap is stratified: runs are drawn again within each problem. Its intervals are BCa
    (bias-corrected and accelerated) if every arm has 10 runs or more on each problem, else percentile
    intervals. In a simulation with two problems, normal scores and 3, 6, 10 and 20 runs, about 85, 91, 92 and
    94 % of these 95 % intervals held the true value: with few runs they are too narrow.

    Args:
        scores: scores by problem, arm and seed, in the units of the reward; the arms are the same everywhere.
        ranges: by problem, the least and the greatest reward that it declares.
        seed: seed of the bootstrap.

    Raises:
        Refused: a problem has no range, or an arm has no scores on it.
    """
    normalised = {
        arm: _normalised(arm, scores, ranges) for arm in dict.fromkeys(a for s in scores.values() for a in s)
    }
    fewest = min(len(runs) for problems in normalised.values() for runs in problems)
    bca = fewest >= LEAST_FOR_BCA
    arms = {arm: _interquartile(problems, bca, seed) for arm, problems in normalised.items()}
    if bca and any(math.isnan(interval.low) for interval in arms.values()):
        bca = False  # too many equal scores for the acceleration to be defined
        arms = {arm: _interquartile(problems, bca, seed) for arm, problems in normalised.items()}
    return Overall(arms, _profiles(normalised), LEVEL, _method(bca, fewest))


def _normalised(
    arm: str,
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
    ranges: Mapping[str, tuple[float, float]],
) -> list[Array]:
    """Return an arm's normalised scores, one array [runs] per problem."""
    found = []
    for problem, arms in scores.items():
        low, high = ranges.get(problem, (0.0, 0.0))
        if not high > low:
            raise Refused(
                f"The problem {problem!r} has no range of rewards ({low:g} to {high:g}), so its scores "
                "cannot be put beside those of others. Declare the range of its reward, or leave it out."
            )
        runs = np.array(list(arms.get(arm, {}).values()), dtype=np.float64)
        if not len(runs):
            raise Refused(
                f"The arm {arm!r} has no scores on {problem!r}; give its scores on every problem, or on none."
            )
        found.append((runs - low) / (high - low))
    return found


def _pooled_mean(*problems: Array, axis: int = -1) -> Array:
    """Return the interquartile mean of all problems' runs together."""
    pooled = np.concatenate(problems, axis=axis)
    return np.asarray(stats.trim_mean(pooled, 0.25, axis=axis))


def _interquartile(problems: list[Array], bca: bool, seed: int) -> Interval:
    value = float(_pooled_mean(*problems))
    if min(map(len, problems)) < 2:
        return Interval(value, math.nan, math.nan)
    if all((runs == runs[0]).all() for runs in problems):
        return Interval(value, value, value)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", stats.DegenerateDataWarning
        )  # it is seen from the ends, which are nan
        found = stats.bootstrap(
            problems,
            _pooled_mean,
            vectorized=True,
            confidence_level=LEVEL,
            n_resamples=RESAMPLES,
            method="BCa" if bca else "percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def _profiles(normalised: Mapping[str, list[Array]]) -> dict[str, tuple[tuple[float, float], ...]]:
    everything = np.concatenate([runs for problems in normalised.values() for runs in problems])
    grid = np.linspace(min(0.0, everything.min()), max(1.0, everything.max()), POINTS)
    reach = grid - 1e-9 * (
        grid[-1] - grid[0]
    )  # a score equal to a point of the grid but for rounding reaches it
    return {
        arm: tuple(
            (float(point), float(np.mean([(runs >= least).mean() for runs in problems])))
            for point, least in zip(grid, reach, strict=True)
        )
        for arm, problems in normalised.items()
    }


def _method(bca: bool, fewest: int) -> str:
    """Say how the intervals were made."""
    kind = "BCa" if bca else "percentile"
    how = f"unpaired; {kind} bootstrap, stratified by problem, {RESAMPLES:,} resamples"
    if fewest < 2:
        return f"{how}; a problem has one run of an arm only, which gives no interval"
    if fewest >= LEAST_FOR_BCA:
        return how
    return f"{how}; with {fewest} runs on a problem they are too narrow and cover less than {LEVEL:.0%}"
