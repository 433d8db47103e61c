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

from tokenrl.lab.compare.plan import Plan, Run

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that are tried, relative to the recommended one: four times that often destroys a policy."""
WIDER = 2
"""How often the grid is widened where its best rate is the first or the last."""


def tune(plan: Plan, work: Callable[[Sequence[Run]], pd.DataFrame]) -> dict[tuple[str, str], float]:
    """Try learning rates on the tuning seeds; return by problem and arm the one that is best.

    A run that fails keeps the score that it had at its end, so a rate that destroys the policy is a bad rate
    and not a missing one.

    Args:
        plan: the comparison.
        work: makes runs and returns a row for each in the same order, with the scores; runs made before are
            not repeated.
    """
    arms = {(p.label, a.label): (p, a) for p, a in product(plan.problems, plan.arms)}
    usual = {key: plan.run(*arm, plan.seeds[0]).learning_rate for key, arm in arms.items()}
    grids = {key: [factor * rate for factor in FACTORS] for key, rate in usual.items()}
    tried: dict[tuple[str, str], dict[float, list[float]]] = {key: {} for key in arms}

    def ranked(key: tuple[str, str]) -> list[float]:
        """Return the rates of a grid from the best to the worst; of equal ones the smaller comes first."""
        return sorted(grids[key], key=lambda rate: (-fmean(tried[key][rate]), rate))

    def attempt(wanted: Mapping[tuple[str, str], Sequence[float]], seed: int) -> None:
        pairs = [(key, rate) for key, rates in wanted.items() for rate in rates]
        runs = [plan.run(*arms[key], seed, "tuning", rate) for key, rate in pairs]
        scores = work(runs)[plan.metric].fillna(-math.inf) if runs else []
        for (key, rate), score in zip(pairs, scores, strict=True):
            tried[key].setdefault(rate, []).append(float(score))

    for place, seed in enumerate(plan.tuning_seeds):
        attempt(grids, seed)
        for _ in range(0 if place else WIDER):
            wider = {key: _beyond(ranked(key)) for key in grids}
            attempt(wider, seed)
            grids = {key: [*grid, *wider[key]] for key, grid in grids.items()}
        grids = {key: ranked(key)[: math.ceil(len(grid) / 2)] for key, grid in grids.items()}
    return {key: grid[0] for key, grid in grids.items()}


def _beyond(ranked: Sequence[float]) -> list[float]:
    """Return the rate beyond the edge of a grid, if the best one lies there, and none otherwise."""
    best, low, high = ranked[0], min(ranked), max(ranked)
    return [low / 2] if best == low else [high * 2] if best == high else []
