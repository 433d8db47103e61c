"""Says which runs of a comparison are missing, as a function of the plan and of the runs that have been made.

Where learning rates are tuned, one is chosen for each arm by successive halving over seeds that the
comparison does not use: all rates of a grid are tried on the first tuning seed, the better half of them on
the next seed, and so on; the rate with the best mean score over all its seeds wins. Each run has the whole
budget, because a rate that is best for a short run is not best for a long one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

from tokenrl.lab.compare.plan import Plan, Run

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that are tried, relative to the recommended one: four times that often destroys a policy."""
WIDER = 2
"""How often the grid is widened where its best rate is the first or the last."""


def missing(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Return the runs to make next: those of a round of tuning, or all others once the rates are chosen.

    Args:
        plan: the comparison.
        rows: a row for each run that has been made, failed or not, with its score (see `scores.read_runs`).
            A run that failed keeps the score that it had at its end, so a rate that destroys the policy is a
            bad rate and not a missing one; a run without a score is the worst.
    """
    rates, runs = {}, list[Run]()
    for problem, arm in product(plan.problems, plan.arms) if plan.tuning_seeds else ():
        scores = {
            (row["learning_rate"], row["seed"]): -math.inf if math.isnan(score := row[plan.metric]) else score
            for row in rows
            if (row["problem"], row["arm"], row["role"]) == (problem.label, arm.label, "tuning")
        }
        usual = plan.run(problem, arm, plan.seeds[0]).learning_rate
        best, untried = tune(usual, plan.tuning_seeds, scores)
        rates[problem.label, arm.label] = best
        runs += [plan.run(problem, arm, seed, "tuning", rate) for rate, seed in untried]
    made = {row["path"] for row in rows}
    return runs or [run for run in plan.runs(rates) if run.path not in made]


def tune(
    usual: float, seeds: Sequence[int], scores: Mapping[tuple[float, int], float]
) -> tuple[float, list[tuple[float, int]]]:
    """Return the best learning rate so far, and the pairs of rate and seed to try next; none at the end.

    Args:
        usual: the recommended rate.
        seeds: the tuning seeds.
        scores: the score of each pair of rate and seed that has been tried.
    """
    rates, tried = [factor * usual for factor in FACTORS], list[int]()
    for seed in seeds:
        tried.append(seed)
        for widened in range(WIDER + 1):
            if untried := [(rate, seed) for rate in rates if (rate, seed) not in scores]:
                return rates[0], untried
            rates.sort(key=lambda rate: (-fmean(scores[rate, seed] for seed in tried), rate))
            if len(tried) == 1 and widened < WIDER:
                rates += _beyond(rates)
        rates = rates[: math.ceil(len(rates) / 2)]
    return rates[0], []


def _beyond(ranked: Sequence[float]) -> list[float]:
    """Return the rate beyond the edge of a grid, if the best one lies there, and none otherwise."""
    best, low, high = ranked[0], min(ranked), max(ranked)
    return [low / 2] if best == low else [high * 2] if best == high else []
