"""Judges the runs of a comparison, and says which arms are not valid and what the verdicts do not mean."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tokenrl.errors import Stopped
from tokenrl.lab.compare.decisions import judge_scores
from tokenrl.lab.compare.intervals import seeds_to_decide
from tokenrl.lab.compare.judgement import Judgement, PairedDifference, digits, joined
from tokenrl.lab.compare.plan import SCORES, Arm, Plan, Problem
from tokenrl.lab.compare.table import RunTable, thresholds
from tokenrl.runs.findings import Finding
from tokenrl.runs.rules import judge

CONFIRMATION = (
    "They make a comparison of their own: adding seeds to this one until there is a verdict would find "
    "differences by chance in more than 5 % of all cases."
)


class Caveat(NamedTuple):
    """A reservation about a verdict.

    Attributes:
        text: a sentence or two.
        headline: a few words for the headline of the verdict; empty if the verdict stands.
    """

    text: str
    headline: str = ""


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison; its directory holds the same in files.

    Attributes:
        output_dir: the directory.
        plan: what was planned before anything was run.
        table: the rows and curves of all runs.
        findings: what the table of rules finds in the training of an arm, by problem and arm.
        judgements: failures, paired differences and verdicts by score; the score of the plan decides.
        thresholds: by problem and arm, how many runs reach a reward, after how many samples (median).
    """

    output_dir: Path
    plan: Plan
    table: RunTable
    findings: dict[tuple[str, str], list[Finding]]
    judgements: dict[str, Judgement]
    thresholds: pd.DataFrame

    @property
    def judgement(self) -> Judgement:
        """The judgement in the metric that decides."""
        return self.judgements[self.plan.metric]

    @cached_property
    def caveats(self) -> dict[str, list[Caveat]]:
        """What the verdicts do not mean, by problem."""
        return {problem.label: self._caveats_on(problem) for problem in self.plan.problems}

    def _caveats_on(self, problem: Problem) -> list[Caveat]:
        return [
            *_exploratory(self.plan),
            *_ceiling(problem, self.table),
            *_updates(problem, self),
            *_edges(problem, self.table),
        ]

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run failed. A failure on a tuning seed does not count: it speaks against its rate."""
        compared = self.table.runs.query("role == 'comparison'")
        return int((compared["state"] != "finished").any())

    @cached_property
    def proposal(self) -> tuple[str, str] | None:
        """A new comparison that would decide what is open: the reason and the command; None if no seeds would.

        It has new seeds and a new directory, so its level does not depend on these results. Seeds that are
        added to this comparison are exploratory. All verdicts of an exploratory comparison are open.
        """
        plan = self.plan
        open_differences = [d for d in self.judgement.differences if self._is_open(d)]
        if not open_differences:
            return None
        labels = {plan.reference}
        seeds = len(plan.seeds)
        margins = []
        for difference in open_differences:
            labels |= {difference.arm, difference.reference}
            values = np.array([*difference.differences.values()])
            count, margin = seeds_to_decide(values, difference.level, difference.margin)
            seeds = max(seeds, count)
            if margin is not None:
                margins.append(margin)
        first = plan.seeds[-1] + 1
        directory = re.sub(r"-from-seed-\d+$", "", str(self.output_dir))
        changes: dict[str, Any] = {
            "arms": tuple(arm.label for arm in plan.arms if arm.label in labels),
            "seeds": seeds,
            "first_seed": first,
            "output_dir": f"{directory}-from-seed-{first}",
        }
        condition = "if the arms differ and vary as they do here"
        if margins:
            margin = max(margins)
            changes["margin"] = margin
            condition = f"with a --margin of {margin:g}, below which differences count as none"
        text = f"About {seeds} new seeds would decide what is open, {condition}. {CONFIRMATION}"
        return text, plan.command_with(changes)

    def _is_open(self, difference: PairedDifference) -> bool:
        """Return whether new seeds may decide: no where differences are equal or an arm fails more often."""
        if difference.more_failures or len(set(difference.differences.values())) < 2:
            return False
        if self.plan.changes:
            return difference.verdict != "void"
        return difference.verdict in ("undecided", "descriptive")

    def headline(self, problem: str) -> str:
        """Return the verdicts on a problem in a sentence or two, with what qualifies them."""
        family = self.judgement.of(problem)
        verdicts = {difference.verdict for difference in family.differences}
        reasons = []
        if verdicts & {"better", "worse", "equivalent"}:
            reasons = [caveat.headline for caveat in self.caveats[problem] if caveat.headline]
        return family.headline(reasons)

    def differences(self) -> pd.DataFrame:
        """Return every difference in each metric; the column `decides` marks those that give the verdicts."""
        table = pd.concat([judgement.table() for judgement in self.judgements.values()])
        decides = np.where(table["metric"] == self.plan.metric, "yes", "no")
        return table.assign(decides=decides)


def judge_runs(output_dir: Path, plan: Plan, table: RunTable) -> Comparison:
    """Judge the runs of a comparison; those that have not been made are left out.

    Args:
        output_dir: its directory.
        plan: the plan.
        table: the rows and curves of all runs.

    Raises:
        Stopped: on a problem no run has the score that decides.
    """
    runs = table.runs.query("role == 'comparison' and state != 'missing'")
    findings = {}
    void = {}
    for problem in plan.problems:
        of_problem = runs.query("problem == @problem.label")
        _refuse_without_score(problem, of_problem, plan.metric)
        for arm in plan.arms:
            key = problem.label, arm.label
            findings[key] = _findings(arm, problem, of_problem.query("arm == @arm.label"))
            reasons = [finding.text for finding in findings[key] if finding.weight == "void"]
            void[key] = " ".join(reasons)
    sound = runs.query("not failed")
    judgements = {}
    for name in dict.fromkeys([plan.metric, *SCORES, "entropy"]):
        decides = name == plan.metric
        if decides or (name in sound and sound[name].notna().all()):
            judgements[name] = judge_scores(
                runs,
                metric=name,
                reference=plan.reference,
                margin=plan.margins if decides else None,
                all_pairs=plan.all_pairs,
                void=void,
            )
    reached = pd.concat([thresholds(problem, table) for problem in plan.problems])
    return Comparison(output_dir, plan, table, findings, judgements, reached)


def _refuse_without_score(problem: Problem, runs: pd.DataFrame, metric: str) -> None:
    if runs[metric].isna().all():
        reasons = [f"{run.arm}, seed {run.seed}: {run.reason}" for run in runs[:1].itertuples()]
        raise Stopped(
            f"Nothing can be judged on {problem.label}: no run has {metric}. {' '.join(reasons)}"
        )


def _findings(arm: Arm, problem: Problem, runs: pd.DataFrame) -> list[Finding]:
    """Return what the table of rules finds in an arm's runs; `void` findings give no verdict."""
    settings = {**problem.settings, **arm.settings}
    facts: dict[Any, Any] = dict(runs.mean(numeric_only=True))
    facts["has_entropy_bonus"] = arm.estimator.entropy_coef > 0
    facts["max_completion_length"] = settings.get("max_completion_length")
    if not arm.estimator.needs_groups:
        facts.pop("early_equal", None)
    return judge(facts)


def _exploratory(plan: Plan) -> Iterator[Caveat]:
    """Warn of decisions after results could be seen: then the level of the intervals does not hold."""
    if plan.changes:
        yield Caveat(
            f"Exploratory: {'; '.join(plan.changes)}. Who sees results before choosing what to "
            "compare, or when to stop, finds differences by chance more often than the level says. The "
            "command that is proposed repeats it with new seeds in another --output-dir.",
            "it was changed after results could be seen",
        )


def _ceiling(problem: Problem, table: RunTable) -> Iterator[Caveat]:
    """Warn if all arms end at the best possible reward; name the budget at which they differed most."""
    rewards = table.of(problem.label).groupby("arm")["reward"].mean()
    least = rewards.min(skipna=False)
    best = problem.reward_range[1] if problem.reward_range else math.inf
    if problem.margin is not None and best - least <= problem.margin:
        level = f"within {digits(problem.margin)} of the best possible reward, {digits(best)}"
    elif problem.solved is not None and least >= problem.solved:
        level = f"at {digits(least)} or above, and {digits(problem.solved)} counts as solved"
    else:
        return
    text = f"Ceiling: every arm ends {level}, so the reward at the end hardly separates them."
    samples = _separating_samples(problem, table)
    if samples is not None:
        steps = max(1, round(samples / problem.per_step))
        text += (
            f" Compare at a smaller budget: after {samples:,.0f} {problem.unit} the arms lay farthest apart, "
            f"relative to the spread over seeds (--max-steps {steps}; since these results suggest it, with "
            "other seeds)."
        )
    yield Caveat(text, "every arm ends at the ceiling")


def _separating_samples(problem: Problem, table: RunTable) -> float | None:
    """Return the samples before the budget at which the arms' mean rewards vary most.

    Their standard deviation is divided by the mean standard deviation over seeds. None if it is nowhere the
    larger of the two, or is largest at the budget.
    """
    by_arm = table.curves_of(problem.label).groupby(["samples", "arm"])["reward"]
    by_samples = by_arm.agg(["mean", "std"]).groupby("samples")
    over_arms = by_samples["mean"].std()
    over_seeds = by_samples["std"].mean().clip(lower=1e-9)
    ratio = (over_arms / over_seeds).iloc[1:].fillna(0.0)
    samples = float(ratio.idxmax())
    if samples < problem.budget and ratio[samples] > 1:
        return samples
    return None


def _updates(problem: Problem, comparison: Comparison) -> Iterator[Caveat]:
    """Warn of arms whose gradient was clipped in most updates, or whose updates were skipped."""
    shares = comparison.table.of(problem.label).groupby("arm")["grad_clipped"].mean()
    clipped = []
    skipped = []
    for arm in comparison.plan.arms:
        for finding in comparison.findings[problem.label, arm.label]:
            if finding.flag == "clipped-updates":
                clipped.append(f"{arm.label} ({shares[arm.label]:.0%})")
            elif finding.flag == "skipped":
                skipped.append(Caveat(f"Updates of {arm.label}: {finding.text}"))
    if clipped:
        yield Caveat(
            f"Clipping: the gradient was clipped in most updates of {joined(clipped)}. There the bound sets "
            "the size of a step; the estimator sets only its direction.",
            "most updates were clipped, which hides a gradient's size",
        )
    yield from skipped


def _edges(problem: Problem, table: RunTable) -> Iterator[Caveat]:
    """Warn of tuned learning rates that are the least or the greatest of those that were tried."""
    tuning = table.of(problem.label, role="tuning")
    for arm, rates in tuning.groupby("arm", sort=False)["learning_rate"]:
        best = table.of(problem.label, str(arm))["learning_rate"].iloc[0]
        for side, edge in (("least", rates.min()), ("greatest", rates.max())):
            if best == edge:
                yield Caveat(
                    f"Learning rate: the best rate of {arm}, {best:g}, is the {side} that was tried, so a "
                    "better rate may lie beyond it."
                )
