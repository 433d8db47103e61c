"""Measures how many samples and seconds runs need to reach a reward, with runs that never reach it counted.

A run that does not reach the threshold within its budget is censored: it would need more than the budget, and
nobody knows how much more. A mean over the runs that reach it would flatter the arms that often fail. Two
numbers take such runs into account: the restricted mean, in which a run counts with the budget if it does not
reach the threshold before, and the median after Kaplan and Meier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from tokenrl.lab.compare.statistics.found import Interval


class Curve(NamedTuple):
    """The evaluations of one run; all three have the same length.

    Attributes:
        samples: samples generated up to each evaluation; the first evaluation is before training, at 0.
        seconds: seconds of training up to each evaluation.
        values: what each evaluation found, such as the held-out reward.
    """

    samples: Sequence[float]
    seconds: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class ToThreshold:
    """Samples and seconds that the runs of one arm need until an evaluation first reaches a threshold.

    Attributes:
        arm: its label.
        metric: what is evaluated.
        threshold: the value to reach.
        samples: by seed, the samples needed; None for a run that never reaches the threshold.
        restricted_mean: mean over seeds of the samples needed, but at most the budget, with a 95 % Student-t
            interval kept between 0 and the budget; without ends (nan) if no run reaches the threshold.
        median: samples by which half of the runs have reached the threshold (the Kaplan-Meier median); None
            if fewer than half ever do.
        seconds: by seed, the seconds needed; None for a run that never reaches the threshold.
        restricted_seconds: mean over seeds of the seconds needed, but at most `seconds_limit`, likewise.
        budget: the samples that each run may generate.
        seconds_limit: the same number for every arm: the seconds in which the budget is used by the fastest
            of the arms that have a run which never reaches the threshold; if all runs reach it, the seconds
            of the longest run.
    """

    arm: str
    metric: str
    threshold: float
    samples: dict[int, float | None]
    restricted_mean: Interval
    median: float | None
    seconds: dict[int, float | None]
    restricted_seconds: Interval
    budget: float
    seconds_limit: float


def to_threshold(
    curves: Mapping[str, Mapping[int, Curve]], threshold: float, budget: float, metric: str = "reward"
) -> tuple[ToThreshold, ...]:
    """Return for each arm the samples and seconds until its runs first reach a threshold.

    The place is interpolated linearly between the first evaluation that reaches the threshold and the one
    before. A curve that falls below the threshold again has reached it all the same.

    Args:
        curves: the evaluations by arm and seed; a run without evaluations never reaches the threshold.
        threshold: the value to reach.
        budget: the samples that each run may generate.
        metric: name of what is evaluated.
    """
    reached = {
        arm: {seed: first_reached(curve, threshold, budget) for seed, curve in runs.items()}
        for arm, runs in curves.items()
    }
    totals = {
        arm: max((curve.seconds[-1] for curve in runs.values() if curve.seconds), default=math.nan)
        for arm, runs in curves.items()
    }
    censored = [totals[arm] for arm, runs in reached.items() if None in runs.values() and totals[arm] > 0]
    limit = min(censored) if censored else max((t for t in totals.values() if t > 0), default=math.nan)
    return tuple(_of_arm(arm, runs, metric, threshold, budget, limit) for arm, runs in reached.items())


def default_threshold(curves: Mapping[str, Mapping[int, Curve]]) -> float | None:
    """Return a threshold for a task that declares none: half way from the start to the best arm's end.

    The start is the mean over all runs of the first evaluation; the end is the greatest mean over seeds of an
    arm's last evaluation. The threshold is thus chosen after the results are known, so whatever is measured
    with it is exploratory.

    Args:
        curves: the evaluations by arm and seed; the greater their values, the better.

    Returns:
        The threshold, or None if no arm ends above the start.
    """
    runs = [[c.values for c in of.values() if len(c.values)] for of in curves.values()]
    ends = [float(np.mean([values[-1] for values in of])) for of in runs if of]
    ends = [end for end in ends if math.isfinite(end)]
    if not ends:
        return None
    start, end = float(np.mean([values[0] for of in runs for values in of])), max(ends)
    return (start + end) / 2 if end > start else None


def first_reached(curve: Curve, threshold: float, budget: float) -> tuple[float, float] | None:
    """Return samples and seconds at which a curve first reaches a threshold; None if it does not.

    Args:
        curve: the evaluations of a run.
        threshold: the value to reach.
        budget: evaluations after more samples than this do not count.
    """
    rows = [row for row in zip(*curve, strict=True) if row[0] <= budget]
    for place, (samples, seconds, value) in enumerate(rows):
        if value >= threshold:
            if place == 0 or not math.isfinite(rows[place - 1][2]):
                return float(samples), float(seconds)
            before = rows[place - 1]
            share = (threshold - before[2]) / (value - before[2])  # in (0, 1]: the one before is below
            return (
                float(before[0] + share * (samples - before[0])),
                float(before[1] + share * (seconds - before[1])),
            )
    return None


def _of_arm(
    arm: str,
    reached: Mapping[int, tuple[float, float] | None],
    metric: str,
    threshold: float,
    budget: float,
    limit: float,
) -> ToThreshold:
    samples = {seed: place and place[0] for seed, place in reached.items()}
    seconds = {seed: place and place[1] for seed, place in reached.items()}
    return ToThreshold(
        arm=arm,
        metric=metric,
        threshold=threshold,
        samples=samples,
        restricted_mean=_restricted(list(samples.values()), budget),
        median=_median(list(samples.values())),
        seconds=seconds,
        restricted_seconds=_restricted(list(seconds.values()), limit),
        budget=budget,
        seconds_limit=limit,
    )


def _restricted(needed: Sequence[float | None], limit: float) -> Interval:
    """Return the mean of what runs need, but at most the limit, with its Student-t interval."""
    values = np.array([limit if x is None else min(x, limit) for x in needed], dtype=np.float64)
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if n == 1 or all(x is None for x in needed):
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, max(0.0, mean - half), min(limit, mean + half))


def _median(needed: Sequence[float | None]) -> float | None:
    """Return the smallest number by which half of the runs have reached the threshold.

    Since all runs are censored at the same budget, this is the median of the Kaplan-Meier estimate.
    """
    ordered = sorted(math.inf if x is None else x for x in needed)
    middle = ordered[(len(ordered) - 1) // 2] if ordered else math.inf
    return middle if math.isfinite(middle) else None
