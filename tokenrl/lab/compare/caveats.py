"""Says which arms are not valid, and what the numbers of a comparison do not mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from tokenrl.core.estimator import Estimator
from tokenrl.lab.compare.judgement import Difference, Judgement
from tokenrl.lab.compare.paired import Interval
from tokenrl.lab.compare.plan import Arm, Plan, Problem
from tokenrl.lab.compare.scores import RunTable
from tokenrl.lab.compare.words import listed, shown
from tokenrl.runs.facts import MOST
from tokenrl.runs.findings import Finding
from tokenrl.runs.rules import judge
from tokenrl.settings import arguments


class Caveat(NamedTuple):
    """What a reader must keep in mind.

    Attributes:
        text: a sentence or two.
        headline: a few words for the headline of the verdict; empty if it does not touch the verdict.
    """

    text: str
    headline: str = ""


def findings(arm: Arm, problem: Problem, runs: pd.DataFrame) -> list[Finding]:
    """Return what the table of rules finds in the training of an arm; `void` findings give no verdict.

    Args:
        arm: the arm.
        problem: the problem.
        runs: its runs on the problem.
    """
    estimator = arguments(Estimator, arm.settings.get("estimator", {}))
    settings = {**problem.settings, **arm.settings}
    facts = _means(runs) | {
        "has_entropy_bonus": estimator.entropy_coef > 0,
        "max_completion_length": settings.get("max_completion_length"),
    }
    if not estimator.needs_groups:
        facts.pop("early_equal", None)
    return judge(facts)


def _means(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the means of all numbers that are known."""
    return {str(k): float(v) for k, v in runs.mean(numeric_only=True).dropna().items()}


def caveats(
    plan: Plan,
    problem: Problem,
    table: RunTable,
    judgements: Mapping[str, Judgement],
    rates: Mapping[str, Mapping[float, tuple[float, ...]]],
) -> list[Caveat]:
    """Return what the numbers on one problem do and do not say.

    Args:
        plan: the comparison.
        problem: the problem.
        table: all runs.
        judgements: by score, the judgement of it.
        rates: by arm, the scores by learning rate on the tuning seeds.
    """
    means = {arm.label: _means(table.of(problem.label, arm.label)) for arm in plan.arms}
    differences = {
        name: {d.arm: d for f in judgement.families for d in f.differences
               if (f.problem, f.reference) == (problem.label, d.reference) and d.verdict != "void"}
        for name, judgement in judgements.items()
    }  # fmt: skip
    return [
        *_exploratory(plan),
        *_ceiling(plan, problem, table, means),
        *_sharpness(plan, differences, means),
        *_clipping(means),
        *_edges(rates, {arm.label: means[arm.label].get("learning_rate") for arm in plan.arms}),
        *_skipped(plan, problem, table),
    ]


def _exploratory(plan: Plan) -> Iterator[Caveat]:
    """Tell what was decided after results could be seen; then the level of the intervals does not hold."""
    if plan.existing:
        yield Caveat(
            "Exploratory: the runs existed before the comparison was planned. Whoever chose them by their "
            "results finds differences by chance more often than the level says.",
            "the runs were chosen after they were made" if not plan.changes else "",
        )
    if plan.changes:
        yield Caveat(
            f"Exploratory: {'; '.join(plan.changes)}. Who sees results before choosing what to compare, or "
            "when to stop, finds differences by chance more often than the level says. Repeat the "
            "comparison with new seeds (--first-seed) in another --output-dir.",
            "it was changed after results could be seen",
        )


def _ceiling(
    plan: Plan, problem: Problem, table: RunTable, means: Mapping[str, Mapping[str, float]]
) -> Iterator[Caveat]:
    """Tell if all arms end at the best possible reward, and at which budget they lie farthest apart."""
    ends = [arm["reward"] for arm in means.values() if "reward" in arm]
    margin, best = plan.margins.get(problem.label), (problem.reward_range or (None, None))[1]
    if len(ends) < len(means):
        return
    if best is not None and margin is not None and best - min(ends) <= margin:
        where = f"within {shown(margin)} of the best possible reward, {shown(best)}"
    elif problem.solved is not None and min(ends) >= problem.solved:
        where = f"at {shown(min(ends))} or above, and {shown(problem.solved)} counts as solved"
    else:
        return
    text = f"Ceiling: every arm ends {where}, so the reward at the end hardly separates them."
    curves = table.curves.merge(table.of(problem.label)[["path", "arm"]], on="path")
    spread = curves.groupby(["samples", "arm"])["reward"].agg(["mean", "std"]).reset_index()
    places = spread.groupby("samples").agg(apart=("mean", "std"), within=("std", "mean")).iloc[1:]
    apart = places["apart"] / places["within"].clip(lower=1e-9)
    place = apart.idxmax() if apart.notna().any() else problem.budget
    if place < problem.budget and apart[place] > 1:
        flag = f"--max-samples {place:.0f}"
        if problem.kind == "control":
            flag = f"--max-steps {max(1, round(place / problem.per_step))}"
        text += (
            f" Compare at a smaller budget: after {place:,.0f} {problem.unit} the arms lay farthest apart, "
            f"relative to the spread over seeds ({flag}; since these results suggest it, with other seeds)."
        )
    yield Caveat(text, "every arm ends at the ceiling")


def _sharpness(
    plan: Plan,
    differences: Mapping[str, Mapping[str, Difference]],
    means: Mapping[str, Mapping[str, float]],
) -> Iterator[Caveat]:
    """Tell if an arm differs in sampled reward but not in greedy reward, and the better one is sharper."""
    if plan.metric not in ("area", "reward"):
        return
    for arm, entropy in differences.get("entropy", {}).items():
        for metric, when in (("area", "over the budget"), ("reward", "at the end")):
            sampled = differences.get(metric, {}).get(arm)
            greedy = differences.get(f"{metric}_greedy", {}).get(arm)
            if sampled and greedy and _sharper(sampled, greedy, entropy.mean):
                better, other = (arm, sampled.reference)[:: 1 if sampled.mean.value > 0 else -1]
                sign = 1 if better == arm else -1
                low, high = sorted((sign * greedy.mean.low, sign * greedy.mean.high))
                nats = [shown(means[one].get("entropy")) for one in (better, other)]
                gain, apart = shown(abs(sampled.mean.value)), f"{sign * greedy.mean.value:+.2g}"
                yield Caveat(
                    f"Sharpness: {when} {better} has a sampled reward that is {gain} higher than that of "
                    f"{other}, but no difference is seen in greedy reward ({apart} [{shown(low)}, "
                    f"{shown(high)}]), and {better} has the lower entropy ({nats[0]} against {nats[1]}). "
                    "A sharper policy alone raises the sampled reward, so it need not know more.",
                    f"{better} may only be sharper than {other}",
                )
                break


def _sharper(sampled: Difference, greedy: Difference, entropy: Interval) -> bool:
    gain, other = sampled.mean.value, greedy.mean
    return (
        _excludes_0(sampled.adjusted)
        and not _excludes_0(other)
        and abs(other.value) < abs(gain) / 2
        and _excludes_0(entropy)
        and entropy.value * gain < 0
    )


def _clipping(means: Mapping[str, Mapping[str, float]]) -> Iterator[Caveat]:
    """Tell for which share of the updates the gradient was clipped, if that was the case for most."""
    shares = {arm: found["grad_clipped"] for arm, found in means.items() if "grad_clipped" in found}
    most = [arm for arm, share in shares.items() if share > MOST]
    if not most:
        return
    each = ", ".join(f"{arm} {share:.0%}" for arm, share in shares.items())
    text = (
        f"Clipping: the gradient was clipped in most updates of {listed(most)} (share of the updates: "
        f"{each}). There the bound sets the size of a step, and the estimator only its direction."
    )
    if len(most) < len(shares):
        text += " The arms thus do not take comparable steps."
    high = max(shares.values())
    yield Caveat(text, f"up to {high:.0%} of the updates were clipped, which hides the size of a gradient")


def _edges(
    rates: Mapping[str, Mapping[float, tuple[float, ...]]], chosen: Mapping[str, float | None]
) -> Iterator[Caveat]:
    """Tell of tuned learning rates that are the least or the greatest of those that were tried."""
    for arm, tried in rates.items():
        if len(tried) > 1 and chosen[arm] in (min(tried), max(tried)):
            side = "least" if chosen[arm] == min(tried) else "greatest"
            yield Caveat(
                f"Learning rate: the best one of {arm}, {chosen[arm]:g}, is the {side} that was tried, so a "
                "better one may lie beyond it."
            )


def _skipped(plan: Plan, problem: Problem, table: RunTable) -> Iterator[Caveat]:
    """Tell of arms of which updates were skipped, or left the weights alone."""
    for arm in plan.arms:
        for finding in findings(arm, problem, table.of(problem.label, arm.label)):
            if finding.flag == "skipped":
                yield Caveat(f"Updates of {arm.label}: {finding.text}")


def _excludes_0(ends: Interval) -> bool:
    return ends.low > 0 or ends.high < 0
