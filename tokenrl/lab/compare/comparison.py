"""Judges the runs of a comparison, and says which arms are not valid and what the verdicts do not mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tokenrl.errors import Stopped
from tokenrl.lab.compare.decisions import judge_scores
from tokenrl.lab.compare.intervals import seeds_to_decide
from tokenrl.lab.compare.judgement import Judgement, digits, joined
from tokenrl.lab.compare.plan import SCORES, Arm, Plan, Problem
from tokenrl.lab.compare.table import RunTable, thresholds
from tokenrl.runs.findings import Finding
from tokenrl.runs.rules import judge

CONFIRMATION = (
    "They make a comparison of their own: adding seeds to this one until there is a verdict would "
)
CONFIRMATION += "find differences by chance in more than 5 % of all cases."


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
        judgements: failures, paired differences and verdicts by score; that of the plan decides.
        thresholds: by problem and arm, how many runs reach a reward, and the median of the samples to it.
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
        kinds = (_exploratory, _ceiling, _updates, _edges)
        return {
            p.label: [caveat for of in kinds for caveat in of(self, p)] for p in self.plan.problems
        }

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run failed. A failure on a tuning seed does not count: it speaks against its rate."""
        runs = self.table.runs
        return int((runs["state"] != "finished")[runs["role"] != "tuning"].any())

    @cached_property
    def proposal(self) -> tuple[str, str] | None:
        """A new comparison that would decide what is open: why, and its command; None if no seeds would.

        It has new seeds and a directory of its own, so its level holds whatever this one showed; seeds that
        are added here after looking are exploratory. All verdicts of an exploratory comparison are open.
        Where the differences are all equal, or one arm fails more often, seeds would not help.
        """
        plan, is_open = self.plan, {"undecided", "descriptive"}
        is_open |= {"better", "worse", "equivalent"} if plan.changes else set()
        each = [
            d
            for family in self.judgement.families
            for d in family.differences
            if not d.more_failures
        ]
        undecided = [
            d for d in each if d.verdict in is_open and len(set(d.differences.values())) > 1
        ]
        if not undecided:
            return None
        labels = {plan.reference}.union(*((d.arm, d.reference) for d in undecided))
        needed = [
            seeds_to_decide(np.array([*d.differences.values()]), d.level, d.margin)
            for d in undecided
        ]
        seeds, first = max([len(plan.seeds), *(count for count, _ in needed)]), plan.seeds[-1] + 1
        changes: dict[str, Any] = {
            "arms": tuple(arm.label for arm in plan.arms if arm.label in labels),
            "seeds": seeds,
            "first_seed": first,
            "output_dir": re.sub(r"-from-seed-\d+$", "", str(self.output_dir))
            + f"-from-seed-{first}",
        }
        condition = "if the arms differ and vary as they do here"
        if wider := [margin for _, margin in needed if margin is not None]:
            changes["margin"] = max(wider)
            condition = f"with a --margin of {max(wider):g}, below which differences count as none"
        text = f"About {seeds} new seeds would decide what is open, {condition}. {CONFIRMATION}"
        return text, plan.command_with(changes)

    def headline(self, problem: str) -> str:
        """Return the verdicts on a problem in a sentence or two, with what qualifies them."""
        family = self.judgement.of(problem)
        decided = any(d.verdict in ("better", "worse", "equivalent") for d in family.differences)
        qualified = dict.fromkeys(
            c.headline for c in self.caveats[problem] if c.headline and decided
        )
        return family.headline(list(qualified))

    def differences(self) -> pd.DataFrame:
        """Return every difference in each metric; the column `decides` marks those that give the verdicts."""
        table = pd.concat([judgement.table() for judgement in self.judgements.values()])
        decides = table["metric"] == self.plan.metric
        return table.assign(decides=decides.map({True: "yes", False: "no"}))


def judge_runs(output_dir: Path, plan: Plan, table: RunTable) -> Comparison:
    """Judge the runs of a comparison; those that have not been made are left out.

    Args:
        output_dir: its directory.
        plan: the plan.
        table: the rows and curves of all runs.

    Raises:
        Stopped: on a problem no run has the score that decides.
    """
    ended, metric = table.runs[table.runs["state"] != "missing"], plan.metric
    compared = ended[ended["role"] == "comparison"]
    findings = {}
    for problem, arm in product(plan.problems, plan.arms):
        runs = compared[compared["problem"] == problem.label]
        if runs[metric].isna().all():
            reason = " ".join(f"{r.arm}, seed {r.seed}: {r.reason}" for r in runs[:1].itertuples())
            raise Stopped(
                f"Nothing can be judged on {problem.label}: no run has {metric}. {reason}"
            )
        findings[problem.label, arm.label] = _findings(arm, problem, runs[runs["arm"] == arm.label])
    void = {
        key: " ".join(f.text for f in each if f.weight == "void") for key, each in findings.items()
    }
    sound = compared[~compared["failed"]]
    metrics = [name for name in (*SCORES, "entropy") if name in sound and sound[name].notna().all()]
    judgements = {
        name: judge_scores(
            compared,
            metric=name,
            reference=plan.reference,
            margin=plan.margins if name == metric else None,
            all_pairs=plan.all_pairs,
            void=void,
        )
        for name in dict.fromkeys([metric, *metrics])
    }
    return Comparison(
        output_dir=output_dir,
        plan=plan,
        table=table,
        findings=findings,
        judgements=judgements,
        thresholds=pd.concat([thresholds(problem, table) for problem in plan.problems]),
    )


def _findings(arm: Arm, problem: Problem, runs: pd.DataFrame) -> list[Finding]:
    """Return what the table of rules finds in an arm's runs; `void` findings give no verdict."""
    facts: dict[str, Any] = {
        str(name): value for name, value in runs.mean(numeric_only=True).items()
    }
    facts |= {"has_entropy_bonus": arm.estimator.entropy_coef > 0}
    facts |= {
        "max_completion_length": {**problem.settings, **arm.settings}.get("max_completion_length")
    }
    if not arm.estimator.needs_groups:
        facts.pop("early_equal", None)
    return judge(facts)


def _exploratory(comparison: Comparison, problem: Problem) -> Iterator[Caveat]:
    """Warn of decisions after results could be seen: then the level of the intervals does not hold."""
    if comparison.plan.changes:
        yield Caveat(
            f"Exploratory: {'; '.join(comparison.plan.changes)}. Who sees results before choosing what to "
            "compare, or when to stop, finds differences by chance more often than the level says. The "
            "command that is proposed repeats it with new seeds in another --output-dir.",
            "it was changed after results could be seen",
        )


def _ceiling(comparison: Comparison, problem: Problem) -> Iterator[Caveat]:
    """Warn if all arms end at the best possible reward; name the budget at which they differed most."""
    means = comparison.table.of(problem.label).groupby("arm")["reward"].mean()
    least, best = means.min(skipna=False), (problem.reward_range or (None, None))[1]
    if best is not None and problem.margin is not None and best - least <= problem.margin:
        where = f"within {digits(problem.margin)} of the best possible reward, {digits(best)}"
    elif problem.solved is not None and least >= problem.solved:
        where = f"at {digits(least)} or above, and {digits(problem.solved)} counts as solved"
    else:
        return
    text = f"Ceiling: every arm ends {where}, so the reward at the end hardly separates them."
    by_budget = comparison.table.curves_of(problem.label).groupby(["samples", "arm"])["reward"]
    spread = by_budget.agg(["mean", "std"]).groupby("samples")
    apart = (spread["mean"].std() / spread["std"].mean().clip(lower=1e-9)).iloc[1:].fillna(0.0)
    samples = apart.idxmax()
    if samples < problem.budget and apart[samples] > 1:
        steps = max(1, round(samples / problem.per_step))
        text += (
            f" Compare at a smaller budget: after {samples:,.0f} {problem.unit} the arms lay farthest apart, "
            f"relative to the spread over seeds (--max-steps {steps}; since these results suggest it, with "
            "other seeds)."
        )
    yield Caveat(text, "every arm ends at the ceiling")


def _updates(comparison: Comparison, problem: Problem) -> Iterator[Caveat]:
    """Warn of arms whose gradient was clipped in most updates, or whose updates were skipped."""
    arms = [arm.label for arm in comparison.plan.arms]
    flagged = [
        (arm, finding) for arm in arms for finding in comparison.findings[problem.label, arm]
    ]
    shares = comparison.table.of(problem.label).groupby("arm")["grad_clipped"].mean()
    clipped = [
        f"{arm} ({shares[arm]:.0%})"
        for arm, finding in flagged
        if finding.flag == "clipped-updates"
    ]
    if clipped:
        yield Caveat(
            f"Clipping: the gradient was clipped in most updates of {joined(clipped)}. There the bound sets "
            "the size of a step, and the estimator only its direction.",
            "most updates were clipped, which hides a gradient's size",
        )
    for arm, finding in flagged:
        if finding.flag == "skipped":
            yield Caveat(f"Updates of {arm}: {finding.text}")


def _edges(comparison: Comparison, problem: Problem) -> Iterator[Caveat]:
    """Warn of tuned learning rates that are the least or the greatest of those that were tried."""
    tuning = comparison.table.of(problem.label, role="tuning").groupby("arm", sort=False)[
        "learning_rate"
    ]
    for arm, rates in tuning:
        chosen = comparison.table.of(problem.label, str(arm))["learning_rate"].iloc[0]
        if chosen in (rates.min(), rates.max()):
            side = "least" if chosen == rates.min() else "greatest"
            yield Caveat(
                f"Learning rate: the best one of {arm}, {chosen:g}, is the {side} that was tried, so a "
                "better one may lie beyond it."
            )
