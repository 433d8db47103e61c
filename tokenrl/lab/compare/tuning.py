"""Chooses a learning rate for each arm by successive halving over seeds that the comparison does not use.

All rates of a grid are tried on the first tuning seed. The better half of them is tried on the next seed, and
so on; the rate with the best mean score over all its seeds wins. Each run has the whole budget, because a
rate that is best for a short run is not best for a long one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import fmean

import pandas as pd

from tokenrl.lab.compare.plan import Plan, PlannedRun

Sensitivity = dict[tuple[str, str], dict[float, tuple[float, ...]]]
"""By problem and arm, the scores by learning rate, one for each tuning seed on which it was tried."""
WIDER = 2
"""How often the grid is widened where its best rate is the first or the last."""


def tune(plan: Plan, execute: Callable[[Sequence[PlannedRun]], pd.DataFrame]) -> Sensitivity:
    """Try learning rates on the tuning seeds.

    A run that fails keeps the score that it had at its end, so a rate that destroys the policy is a bad rate
    and not a missing one.

    Args:
        plan: the comparison.
        execute: makes runs and returns a row for each in the same order, with the scores; runs made before
            are not repeated.
    """
    places = {(p.label, a.label): (p, a) for p, a in product(plan.problems, plan.arms)}
    tried: Sensitivity = {key: {} for key in places}
    grids = {
        key: [
            factor * float(arm.settings.get("learning_rate", problem.learning_rate)) for factor in plan.rates
        ]
        for key, (problem, arm) in places.items()
    }

    def attempt(wanted: Mapping[tuple[str, str], Sequence[float]], seed: int) -> None:
        pairs = [(key, rate) for key, rates in wanted.items() for rate in rates]
        runs = [plan.run(*places[key], seed, "tuning", rate) for key, rate in pairs]
        scores = execute(runs)[plan.metric].fillna(-math.inf) if runs else []
        for (key, rate), score in zip(pairs, scores, strict=True):
            tried[key][rate] = (*tried[key].get(rate, ()), float(score))

    for seed in plan.tuning_seeds:
        attempt(grids, seed)
        for _ in range(WIDER if seed == plan.tuning_seeds[0] else 0):
            wider = {key: _beyond(grid, tried[key]) for key, grid in grids.items()}
            attempt(wider, seed)
            grids = {key: [*grid, *wider[key]] for key, grid in grids.items()}
        grids = {key: _ranked(grid, tried[key])[: math.ceil(len(grid) / 2)] for key, grid in grids.items()}
    return tried


def chosen_rates(tried: Sensitivity) -> dict[tuple[str, str], float]:
    """Return for each problem and arm the rate with the best mean among those tried on the most seeds."""
    found = {}
    for key, scores in tried.items():
        most = max(map(len, scores.values()))
        found[key] = _ranked([rate for rate, values in scores.items() if len(values) == most], scores)[0]
    return found


def _ranked(grid: Sequence[float], scores: Mapping[float, Sequence[float]]) -> list[float]:
    """Return rates from the best to the worst; of equally good ones the smaller comes first."""
    return sorted(grid, key=lambda rate: (-fmean(scores[rate]), rate))


def _beyond(grid: Sequence[float], scores: Mapping[float, Sequence[float]]) -> list[float]:
    """Return the rate beyond the edge of the grid, if the best one lies there, and none otherwise."""
    best, low, high = _ranked(grid, scores)[0], min(grid), max(grid)
    return [low / 2] if best == low else [high * 2] if best == high else []
