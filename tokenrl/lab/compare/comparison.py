"""Judges the runs of a comparison, and says what the verdicts do not mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tokenrl.errors import Stopped
from tokenrl.lab.compare.decisions import judge_scores
from tokenrl.lab.compare.judgement import Judgement, digits, joined
from tokenrl.lab.compare.plan import Arm, Plan, Problem
from tokenrl.lab.compare.table import RunTable
from tokenrl.runs.findings import LOST_SHARE, Finding
from tokenrl.runs.rules import judge

FACTS = ["early_entropy", "early_equal", "gain", "recent_cut", "skipped", "idle"]
"""Columns of the table of runs that rules read."""


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
        judgement: failures, paired differences and verdicts, by the score of the plan.
    """

    output_dir: Path
    plan: Plan
    table: RunTable
    findings: dict[tuple[str, str], list[Finding]]
    judgement: Judgement

    @cached_property
    def caveats(self) -> dict[str, list[Caveat]]:
        """What the verdicts do not mean, by problem."""
        caveats = {}
        for problem in self.plan.problems:
            caveats[problem.label] = [
                *_exploratory(self.plan),
                *_ceiling(problem, self.table),
                *_training(problem, self),
                *_edges(problem, self.table),
            ]
        return caveats

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run failed. A failure on a tuning seed does not count: it speaks against its rate."""
        compared = self.table.runs.query("role == 'comparison'")
        return int((compared["state"] != "finished").any())

    def headline(self, problem: str) -> str:
        """Return the verdicts on a problem in a sentence or two, with what qualifies them."""
        reasons = [caveat.headline for caveat in self.caveats[problem] if caveat.headline]
        return self.judgement.of(problem).headline(reasons)


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
        if of_problem[plan.metric].isna().all():
            reason = "".join(of_problem["reason"][:1])
            raise Stopped(
                f"Nothing can be judged on {problem.label}: no run has {plan.metric}. {reason}"
            )
        for arm in plan.arms:
            key = problem.label, arm.label
            of_arm = of_problem.query("arm == @arm.label")
            findings[key] = findings_of(arm, problem, of_arm)
            if len(of_arm) and of_arm[plan.metric].isna().all():
                void[key] = f"no run of it has {plan.metric}. {of_arm['reason'].iloc[0]}"
    judgement = judge_scores(
        runs,
        metric=plan.metric,
        reference=plan.reference,
        margin=plan.margins,
        all_pairs=plan.all_pairs,
        void=void,
    )
    return Comparison(output_dir, plan, table, findings, judgement)


def findings_of(arm: Arm, problem: Problem, runs: pd.DataFrame) -> list[Finding]:
    """Return what the table of rules finds in an arm's runs, which qualifies verdicts and excludes nothing."""
    settings = {**problem.settings, **arm.settings}
    facts: dict[Any, Any] = dict(runs.reindex(columns=FACTS).mean())
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
            "compare, or when to stop, finds differences by chance more often than the level says. To "
            "confirm it, repeat it with new seeds (--first-seed) in another --output-dir.",
            "it was changed after results could be seen",
        )


def _ceiling(problem: Problem, table: RunTable) -> Iterator[Caveat]:
    """Warn if all arms end at the best possible reward."""
    rewards = table.of(problem.label).groupby("arm")["reward"].mean()
    least = rewards.min(skipna=False)
    best = problem.reward_range[1] if problem.reward_range else math.inf
    if problem.margin is not None and best - least <= problem.margin:
        level = f"within {digits(problem.margin)} of the best possible reward, {digits(best)}"
    elif problem.solved is not None and least >= problem.solved:
        level = f"at {digits(least)} or above, and {digits(problem.solved)} counts as solved"
    else:
        return
    yield Caveat(
        f"Ceiling: every arm ends {level}, so the reward at the end hardly separates them. Compare at a "
        "smaller budget (--max-steps), with other seeds.",
        "every arm ends at the ceiling",
    )


def _training(problem: Problem, comparison: Comparison) -> Iterator[Caveat]:
    """Say what was found in the training of each arm; clipped updates of all arms stand in one sentence."""
    shares = comparison.table.of(problem.label).groupby("arm", sort=False)["grad_clipped"].mean()
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
    chosen = table.of(problem.label).groupby("arm")["learning_rate"].first()
    tried = table.of(problem.label, "tuning").groupby("arm", sort=False)["learning_rate"]
    for arm, edges in tried.agg(["min", "max"]).iterrows():
        if chosen[arm] in edges.to_numpy():
            yield Caveat(
                f"Learning rate: the best rate of {arm}, {chosen[arm]:g}, is the least or the greatest that was "
                "tried, so a better rate may lie beyond it."
            )
