"""Judges the runs of a comparison, and says what the verdicts do not mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tokenrl.errors import Stopped
from tokenrl.lab.compare.decisions import judge_scores
from tokenrl.lab.compare.judgement import Judgement, digits, joined
from tokenrl.lab.compare.plan import SCORES, Arm, Plan, Problem
from tokenrl.lab.compare.table import RunTable, thresholds
from tokenrl.runs.findings import LOST_SHARE, Finding, Means, Observed
from tokenrl.runs.rules import judge


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
            *_training(problem, self),
            *_edges(problem, self.table),
        ]

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run failed. A failure on a tuning seed does not count: it speaks against its rate."""
        compared = self.table.runs.query("role == 'comparison'")
        return int((compared["state"] != "finished").any())

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
            of_arm = of_problem.query("arm == @arm.label")
            findings[key] = findings_of(arm, problem, of_arm)
            without_score = of_arm[~of_arm["failed"] & of_arm[plan.metric].isna()]
            if len(without_score):
                seeds = joined([*map(str, without_score["seed"])])
                void[key] = f"it has no {plan.metric} for seeds {seeds}."
    sound = runs.query("not failed")
    judgements = {}
    for name in dict.fromkeys([plan.metric, *SCORES, "entropy"]):
        decides = name == plan.metric
        if decides or (name in sound and sound[name].notna().all()):
            judgements[name] = judge_scores(
                runs.assign(failed=runs["failed"] | runs[plan.metric].isna()),
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


def findings_of(arm: Arm, problem: Problem, runs: pd.DataFrame) -> list[Finding]:
    """Return what the table of rules finds in an arm's runs, which qualifies verdicts and excludes nothing."""
    settings = {**problem.settings, **arm.settings}
    means = runs.mean(numeric_only=True)
    equal = means.get("early_equal", math.nan) if arm.estimator.needs_groups else math.nan
    return judge(
        Observed(
            learning_rate=means.get("learning_rate"),
            max_completion_length=settings.get("max_completion_length"),
            has_entropy_bonus=arm.estimator.entropy_coef > 0,
            early=Means(entropy=means.get("early_entropy", math.nan), equal=equal),
            recent=Means(cut=means.get("recent_cut", math.nan)),
            skipped=means.get("skipped"),
            gain_of_arm=means.get("gain"),
        )
    )


def _exploratory(plan: Plan) -> Iterator[Caveat]:
    """Warn of decisions after results could be seen: then the level of the intervals does not hold."""
    if plan.changes:
        yield Caveat(
            f"Exploratory: {'; '.join(plan.changes)}. Who sees results before choosing what to "
            "compare, or when to stop, finds differences by chance more often than the level says. To "
            "confirm it, repeat it with new seeds (--first-seed) in another --output-dir.",
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


def _training(problem: Problem, comparison: Comparison) -> Iterator[Caveat]:
    """Say what was found in the training of each arm; clipped updates of all arms stand in one sentence."""
    runs = comparison.table.of(problem.label)
    shares = runs.groupby("arm", sort=False)["grad_clipped"].mean()
    clipped = [f"{arm} ({share:.0%})" for arm, share in shares.items() if share > LOST_SHARE]
    if clipped:
        yield Caveat(
            f"Clipping: the gradient was clipped in most updates of {joined(clipped)}. There the bound sets "
            "the size of a step; the estimator sets only its direction.",
            "most updates were clipped, which hides a gradient's size",
        )
    for arm in comparison.plan.arms:
        for finding in comparison.findings[problem.label, arm.label]:
            yield Caveat(f"Training of {arm.label}: {finding.text}")


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
