"""Says which arms are not valid, and what the numbers of a comparison do not mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from tokenrl.lab.compare.judgement import Judgement, shown
from tokenrl.lab.compare.plan import Arm, Plan, Problem
from tokenrl.lab.compare.scores import RunTable
from tokenrl.runs.findings import Finding
from tokenrl.runs.rules import judge


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
    facts: dict[str, Any] = {str(name): value for name, value in runs.mean(numeric_only=True).items()}
    facts |= {"has_entropy_bonus": arm.estimator.entropy_coef > 0}
    facts |= {"max_completion_length": {**problem.settings, **arm.settings}.get("max_completion_length")}
    if not arm.estimator.needs_groups:
        facts.pop("early_equal", None)
    return judge(facts)


def caveats(
    plan: Plan,
    problem: Problem,
    table: RunTable,
    judgements: Mapping[str, Judgement],
    found: Mapping[str, Sequence[Finding]],
) -> list[Caveat]:
    """Return what the numbers on one problem do and do not say.

    Args:
        plan: the comparison.
        problem: the problem.
        table: all runs.
        judgements: by score, the judgement of it.
        found: by arm, its findings.
    """
    means = table.of(problem.label).groupby("arm").mean(numeric_only=True)
    return [
        *_exploratory(plan),
        *_ceiling(plan, problem, table, means),
        *_sharpness(plan, problem, judgements, means),
        *_updates(found),
        *_edges(problem, table),
    ]


def _exploratory(plan: Plan) -> Iterator[Caveat]:
    """Tell what was decided after results could be seen; then the level of the intervals does not hold."""
    existed = ["the runs existed before the comparison was planned"] if plan.existing else []
    if existed or plan.changes:
        yield Caveat(
            f"Exploratory: {'; '.join([*existed, *plan.changes])}. Who sees results before choosing what to "
            "compare, or when to stop, finds differences by chance more often than the level says. Repeat it "
            "with new seeds (--first-seed) in another --output-dir.",
            "it was planned or changed after results could be seen",
        )


def _ceiling(plan: Plan, problem: Problem, table: RunTable, means: pd.DataFrame) -> Iterator[Caveat]:
    """Tell if all arms end at the best possible reward, and at which budget they lie farthest apart."""
    least, best = means["reward"].min(skipna=False), (problem.reward_range or (None, None))[1]
    if best is not None and problem.margin is not None and best - least <= problem.margin:
        where = f"within {shown(problem.margin)} of the best possible reward, {shown(best)}"
    elif problem.solved is not None and least >= problem.solved:
        where = f"at {shown(least)} or above, and {shown(problem.solved)} counts as solved"
    else:
        return
    text = f"Ceiling: every arm ends {where}, so the reward at the end hardly separates them."
    by_place = table.curves_of(problem.label).groupby(["samples", "arm"])["reward"]
    spread = by_place.agg(["mean", "std"]).groupby("samples")
    apart = (spread["mean"].std() / spread["std"].mean().clip(lower=1e-9)).iloc[1:].fillna(0.0)
    place = apart.idxmax()
    if place < problem.budget and apart[place] > 1:
        steps = max(1, round(place / problem.per_step))
        flag = f"--max-samples {place:.0f}" if plan.kind == "train" else f"--max-steps {steps}"
        text += (
            f" Compare at a smaller budget: after {place:,.0f} {problem.unit} the arms lay farthest apart, "
            f"relative to the spread over seeds ({flag}; since these results suggest it, with other seeds)."
        )
    yield Caveat(text, "every arm ends at the ceiling")


def _sharpness(
    plan: Plan, problem: Problem, judgements: Mapping[str, Judgement], means: pd.DataFrame
) -> Iterator[Caveat]:
    """Tell if an arm differs in sampled reward but not in greedy reward, and the better one is sharper."""
    names = [n for n in (plan.metric, f"{plan.metric}_greedy", "entropy") if n in judgements]
    each = (judgements[name].of(problem.label).differences for name in names)
    for sampled, greedy, entropy in zip(*each, strict=True) if len(names) == 3 else ():
        by, greedily = sampled.mean.value, greedy.mean.value
        is_sharper = sampled.adjusted.excludes_0 and entropy.mean.excludes_0 and by * entropy.mean.value < 0
        is_equal = not greedy.mean.excludes_0 and 2 * abs(greedily) < abs(by)
        if is_sharper and is_equal and sampled.verdict != "void":
            better, other = (sampled.arm, sampled.reference)[:: 1 if by > 0 else -1]
            nats = " against ".join(shown(means["entropy"][one]) for one in (better, other))
            yield Caveat(
                f"Sharpness: {better} has a sampled reward that is {shown(abs(by))} higher than that of "
                f"{other}, but no difference is seen in greedy reward ({sampled.arm}: {greedy.apart}), and "
                f"{better} has the lower entropy ({nats}). A sharper policy alone raises the sampled reward, "
                "so it need not know more.",
                f"{better} may only be sharper than {other}",
            )


def _updates(found: Mapping[str, Sequence[Finding]]) -> Iterator[Caveat]:
    """Tell of arms whose gradient was clipped in most updates, and of those whose updates were skipped."""
    hides = {"clipped-updates": "most updates were clipped, which hides a gradient's size", "skipped": ""}
    for arm, each in found.items():
        for one in each:
            if one.flag in hides:
                yield Caveat(f"Updates of {arm}: {one.text}", hides[one.flag])


def _edges(problem: Problem, table: RunTable) -> Iterator[Caveat]:
    """Tell of tuned learning rates that are the least or the greatest of those that were tried."""
    tried = table.of(problem.label, role="tuning").groupby("arm", sort=False)["learning_rate"]
    for arm, rates in tried:
        chosen = table.of(problem.label, str(arm))["learning_rate"].iloc[0]
        if chosen in (rates.min(), rates.max()):
            side = "least" if chosen == rates.min() else "greatest"
            yield Caveat(
                f"Learning rate: the best one of {arm}, {chosen:g}, is the {side} that was tried, so a "
                "better one may lie beyond it."
            )
