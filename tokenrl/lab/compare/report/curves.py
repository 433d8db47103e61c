"""Draws how the arms learn, and how their scores depend on the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.records import Problem
from tokenrl.lab.compare.results import due_places
from tokenrl.lab.compare.scores import at_places
from tokenrl.lab.compare.statistics.paired import interval
from tokenrl.lab.compare.statistics.words import shown
from tokenrl.runs.charts import Curve, chart
from tokenrl.runs.page import Html, table, tag

BESIDE = {
    "reward_greedy": ("Greedy reward", "held-out, of the most probable completion or action"),
    "entropy": ("Entropy", "nats per action (token), held-out; near 0 the policy no longer explores"),
    "completions/mean_length": ("Length", "tokens of a completion"),
    "completions/clipped_ratio": ("Truncated", "share of completions cut at the length limit"),
}
"""Curves that are drawn beside the one of the reward, if the runs have them."""


def learning_curves(found: Comparison, problem: Problem) -> Html:
    """Draw the held-out rewards of all arms over samples, and what stands beside them.

    Args:
        found: the comparison.
        problem: the problem; runs of it without any evaluation are left out.
    """
    mark = None if problem.solved is None else ("solved", problem.solved)
    unit = f"held-out, sampled, over {problem.unit}; mean over seeds with a 95 % interval"
    large = chart("Reward", unit, _curves(found, problem, "reward"), large=True, mark=mark)
    small = [
        chart(title, words, _curves(found, problem, name))
        for name, (title, words) in BESIDE.items()
        if not _constant(found, problem, name)
    ]
    return tag("div", large, *small, class_="charts") if large else Html()


def _curves(found: Comparison, problem: Problem, name: str) -> list[Curve]:
    """Return the mean of a metric over each arm's runs at the same places, with t-intervals."""
    places = [0.0, *due_places(problem)]
    curves = []
    for number, arm in enumerate(found.plan.arms, start=1):
        runs = found.runs(problem.label, arm.label)
        known = [r for r in runs if any(map(math.isfinite, r.curves.get(name, ())))]
        values = [at_places(places, r.samples, r.curves[name]) for r in known]
        if values:
            of_places = np.array(values).T
            ends = [interval(column) for column in of_places]
            errors = [end.high - end.value for end in ends]
            mean = [end.value for end in ends]
            curves.append(Curve(places, mean, arm.label, errors, colour=number, dots=True))
    return curves


def _constant(found: Comparison, problem: Problem, name: str) -> bool:
    """Return whether a metric is the same in all evaluations, such as lengths where all are equal."""
    values = {
        value
        for arm in found.plan.arms
        for record in found.runs(problem.label, arm.label)
        for value in record.curves.get(name, ())
    }
    return len(values) < 2


def sensitivity(found: Comparison, problem: Problem) -> Iterator[Html]:
    """Draw the scores by learning rate on the tuning seeds, and list them; nothing unless tuned."""
    tried = {arm: rates for (label, arm), rates in found.sensitivity.items() if label == problem.label}
    if not tried:
        return
    numbers = {arm.label: number for number, arm in enumerate(found.plan.arms, start=1)}
    curves, rows = [], []
    for arm, rates in tried.items():
        known = {rate: [s for s in scores if math.isfinite(s)] for rate, scores in sorted(rates.items())}
        means = {math.log2(rate): float(np.mean(scores)) for rate, scores in known.items() if scores}
        curves.append(Curve(list(means), list(means.values()), arm, colour=numbers[arm], dots=True))
        chosen = found.rates[problem.label, arm]
        for rate, scores in sorted(rates.items()):
            each = ", ".join(shown(score) if math.isfinite(score) else "failed" for score in scores)
            rows.append(
                [arm if rate == min(rates) else "", f"{rate:g}{' (chosen)' * (rate == chosen)}", each]
            )
    yield tag(
        "p",
        f"Mean {found.plan.metric} on tuning seeds, which the comparison does not use. All rates were tried "
        "on the first of them, the better half on the next, and so on.",
        class_="soft",
    )
    ticks = {x: f"{2**x:.3g}" for curve in curves for x in curve.x}
    large = chart(
        "Score by learning rate",
        "mean over the seeds on which the rate was tried",
        curves,
        large=True,
        whole=False,
        places=ticks,
        last=False,
    )
    yield tag("div", large, class_="charts")
    yield table(["arm", "learning rate", "scores, one for each seed"], rows)


def performance_profiles(found: Comparison) -> Html:
    """Draw for each arm the share of runs that reach at least a score; empty for a single problem."""
    if found.overall is None:
        return Html()
    curves = [
        Curve([x for x, _ in points], [share for _, share in points], arm, colour=number)
        for number, (arm, points) in enumerate(found.overall.profiles.items(), start=1)
    ]
    unit = "share of runs that reach at least a score, as a share of the range of the reward; unpaired"
    large = chart("Performance profile", unit, curves, large=True, whole=False, last=False)
    return tag("div", large, class_="charts")
