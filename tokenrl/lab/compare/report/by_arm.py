"""Shows the arms of a comparison on one problem: their numbers, validity, speed and noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.gates import gates
from tokenrl.lab.compare.records import Problem
from tokenrl.lab.compare.scores import SCORES
from tokenrl.lab.compare.statistics.found import Family, Interval
from tokenrl.lab.compare.statistics.survival import ToThreshold
from tokenrl.lab.compare.statistics.words import shown
from tokenrl.runs.charts import Curve, chart
from tokenrl.runs.page import Html, table, tag

NOISE = (
    "Measured on the same completions for all arms, at checkpoints of the first run of {reference}. Noise: "
    "the variance of the gradient of a step, divided by the squared length of its expectation. Cosine: of "
    "the angle between the expected gradient and the unbiased one. A quieter gradient need not learn faster; "
    "the score beside it shows whether it did here."
)


def arms_table(found: Comparison, problem: Problem, family: Family) -> Html:
    """Show each arm's scores, with 95 % intervals over seeds for the one that decides."""
    metric = found.plan.metric
    beside = {name: judgement.families for name, judgement in found.beside.items()}
    means = {
        name: {arm.arm: arm.mean.value for f in families if f.problem == problem.label for arm in f.arms}
        for name, families in beside.items()
    }
    header = ["arm", "seeds", metric, *means, "clipped updates", "learning rate"]
    rows = []
    for arm in family.arms:
        records = found.runs(problem.label, arm.arm)
        clipped = [r.training["grad_clipped"] for r in records if "grad_clipped" in r.training]
        rows.append(
            [
                arm.arm,
                str(len(arm.scores)),
                in_brackets(arm.mean),
                *(shown(means[name].get(arm.arm)) for name in means),
                f"{fmean(clipped):.0%}" if clipped else "-",
                f"{found.rates[problem.label, arm.arm]:g}",
            ]
        )
    words = "; ".join(f"{name}: {SCORES[name].words}" for name in (metric, *means))
    note = tag("p", f"Means over seeds. {words}.", class_="soft")
    return Html(note + tag("div", table(header, rows), class_="wide fit"))


def in_brackets(found: Interval) -> str:
    """Write a number with its interval, such as 0.91 [0.9, 0.92]."""
    if math.isnan(found.low):
        return shown(found.value)
    return f"{shown(found.value)} [{shown(found.low)}, {shown(found.high)}]"


def gates_table(found: Comparison, problem: Problem) -> Html:
    """Show for each arm which gates it passes, and why not; an arm that does not has no verdict."""
    rows = []
    for arm in found.plan.arms:
        each = gates(found.runs(problem.label, arm.label))
        failed = [f"{name}: {reason}" for name, reason in each if reason]
        passed = ", ".join(name for name, reason in each if not reason)
        rows.append([arm.label, " ".join(failed) or f"valid ({passed})"])
    return tag("div", table(["arm", "validity"], rows), class_="words")


def thresholds(found: Comparison, problem: Problem) -> Iterator[Html]:
    """Show how many samples and seconds the arms need to a threshold, with runs that never reach it."""
    each = found.to_threshold.get(problem.label, ())
    if not each:
        return
    why = "which counts as solved"
    if problem.solved is None:
        why = "half way from the start to the end of the best arm; chosen from these results, so exploratory"
    yield tag(
        "p",
        f"To a held-out sampled reward of {shown(each[0].threshold)}, {why}. In the restricted mean a run "
        f"that never gets there counts with its budget, {each[0].budget:,.0f} {problem.unit}.",
        class_="soft",
    )
    header = [
        "arm",
        "runs that reach it",
        f"{problem.unit}, restricted mean",
        "median",
        "seconds, restricted mean",
    ]
    yield tag("div", table(header, [_threshold_row(one) for one in each]), class_="wide fit")


def _threshold_row(one: ToThreshold) -> list[str]:
    reached = sum(value is not None for value in one.samples.values())
    samples, seconds = one.restricted_mean, one.restricted_seconds
    ends = "" if math.isnan(samples.low) else f" [{samples.low:,.0f}, {samples.high:,.0f}]"
    return [
        one.arm,
        f"{reached} of {len(one.samples)}",
        f"{samples.value:,.0f}{ends}",
        "never for half of them" if one.median is None else f"{one.median:,.0f}",
        in_brackets(seconds),
    ]


def noise(found: Comparison, problem: Problem) -> Iterator[Html]:
    """Show noise and bias of the arms' gradients at the same checkpoints, beside the score of each arm."""
    measured = [one for one in found.noise if one.problem == problem.label]
    if not measured:
        return
    family = next(f for f in found.judgement.families if f.problem == problem.label)
    scores = {arm.arm: arm.mean.value for arm in family.arms}
    yield tag("p", NOISE.format(reference=found.plan.reference), class_="soft")
    checkpoints = list(dict.fromkeys(one.checkpoint for one in measured))
    charts = []
    for checkpoint in checkpoints:
        dots = [
            Curve([one.noise.value], [scores[one.arm]], one.arm, colour=place, dots=True)
            for place, arm in enumerate(found.plan.arms, start=1)
            for one in measured
            if (one.checkpoint, one.arm) == (checkpoint, arm.label) and math.isfinite(one.noise.value)
        ]
        if len(dots) > 1:
            charts.append(
                chart(f"Noise {checkpoint}", f"{found.plan.metric} (up) against noise (right)", dots)
            )
    if charts:
        yield tag("div", *charts, class_="charts")
    rows = [
        [
            one.checkpoint,
            one.arm,
            in_brackets(one.noise),
            in_brackets(one.cosine),
            shown(scores.get(one.arm)),
            one.note,
        ]
        for one in measured
    ]
    header = ["checkpoint", "arm", "noise", "cosine", found.plan.metric, "note"]
    yield tag("div", table(header, rows), class_="wide words")
