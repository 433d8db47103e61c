"""Judges the runs of a comparison, and says what the verdicts do not mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from tokenrl.errors import Stopped
from tokenrl.lab.compare.decisions import judge_scores
from tokenrl.lab.compare.judgement import Judgement, digits, joined
from tokenrl.lab.compare.plan import Arm, Plan, Problem
from tokenrl.lab.compare.table import RunTable
from tokenrl.runs.findings import LOST_SHARE, Finding, Means, Observed
from tokenrl.runs.rules import judge

READ = ["learning_rate", "early_entropy", "early_equal", "gain", "recent_cut", "skipped"]
"""Columns of the table of runs that rules read."""


class Caveat(NamedTuple):
    """A reservation about a verdict.

    Attributes:
        text: a sentence or two.
        headline: a few words for the headline of the verdict; empty if the verdict stands.
    """

    text: str
    headline: str = ""


class Words(NamedTuple):
    """The verdicts on a problem in words.

    Attributes:
        headline: all verdicts in a sentence or two, with what qualifies them.
        sentences: a sentence for each difference.
        caveats: what the verdicts do not mean.
    """

    headline: str
    sentences: list[str]
    caveats: list[str]


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison; its directory holds the same in files.

    Attributes:
        output_dir: the directory.
        plan: what was planned before anything was run.
        table: the rows and curves of all runs.
        judgement: failures, paired differences and verdicts, by the score of the plan.
    """

    output_dir: Path
    plan: Plan
    table: RunTable
    judgement: Judgement

    @cached_property
    def words(self) -> dict[str, Words]:
        """The verdicts on each problem in words."""
        words = {}
        for problem in self.plan.problems:
            family = self.judgement.of(problem.label)
            caveats = [*_caveats(problem, self.plan, self.table)]
            headline = family.headline([caveat.headline for caveat in caveats if caveat.headline])
            texts = [caveat.text for caveat in caveats]
            words[problem.label] = Words(headline, family.sentences(), texts)
        return words

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run failed. A failure on a tuning seed does not count: it speaks against its rate."""
        compared = self.table.runs.query("role == 'comparison'")
        return int((compared["state"] != "finished").any())


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
    for problem in plan.problems:
        of_problem = runs.query("problem == @problem.label")
        if of_problem[plan.metric].isna().all():
            reason = "".join(of_problem["reason"][:1])
            raise Stopped(
                f"Nothing can be judged on {problem.label}: no run has {plan.metric}. {reason}"
            )
    void = {
        (label, arm): f"no run of it has {plan.metric}. {of_arm['reason'].iloc[0]}"
        for (label, arm), of_arm in runs.groupby(["problem", "arm"])
        if of_arm[plan.metric].isna().all()
    }
    judgement = judge_scores(
        runs,
        metric=plan.metric,
        reference=plan.reference,
        margin=plan.margins,
        all_pairs=plan.all_pairs,
        void=void,
    )
    return Comparison(output_dir, plan, table, judgement)


def findings_of(arm: Arm, problem: Problem, runs: pd.DataFrame) -> list[Finding]:
    """Return what the table of rules finds in an arm's runs, which qualifies verdicts and excludes nothing."""
    settings = {**problem.settings, **arm.settings}
    means = runs.reindex(columns=READ).mean()
    equal = means["early_equal"] if arm.estimator.needs_groups else math.nan
    return judge(
        Observed(
            learning_rate=means["learning_rate"],
            max_completion_length=settings.get("max_completion_length", math.nan),
            entropy_coef=arm.estimator.entropy_coef,
            early=Means(entropy=means["early_entropy"], equal=equal),
            whole=Means(cut=means["recent_cut"]),
            skipped=means["skipped"],
            gain_of_arm=means["gain"],
        )
    )


def _caveats(problem: Problem, plan: Plan, table: RunTable) -> Iterator[Caveat]:
    """Yield what the verdicts on a problem do not mean: first what the whole comparison makes uncertain."""
    if plan.changes:
        yield Caveat(
            f"Exploratory: {'; '.join(plan.changes)}. Who sees results before choosing what to "
            "compare, or when to stop, finds differences by chance more often than the level says. To "
            "confirm it, repeat it with new seeds (--first-seed) in another --output-dir.",
            "it was changed after results could be seen",
        )
    runs = table.of(problem.label)
    yield from _ceiling(problem, runs)
    shares = runs.groupby("arm", sort=False)["grad_clipped"].mean()
    clipped = [f"{arm} ({share:.0%})" for arm, share in shares.items() if share > LOST_SHARE]
    if clipped:
        yield Caveat(
            f"Clipping: the gradient was clipped in most updates of {joined(clipped)}. There the bound sets "
            "the size of a step; the estimator sets only its direction.",
            "most updates were clipped, which hides a gradient's size",
        )
    for arm in plan.arms:
        for finding in findings_of(arm, problem, runs.query("arm == @arm.label")):
            yield Caveat(f"Training of {arm.label}: {finding.text}")
    tuned = table.of(problem.label, "tuning").groupby("arm", sort=False)["learning_rate"]
    rates = runs.groupby("arm")["learning_rate"].first()
    for label, edges in tuned.agg(["min", "max"]).iterrows():
        if rates[label] in edges.to_numpy():
            yield Caveat(
                f"Learning rate: the best rate of {label}, {rates[label]:g}, is the least or the greatest that "
                "was tried, so a better rate may lie beyond it."
            )


def _ceiling(problem: Problem, runs: pd.DataFrame) -> Iterator[Caveat]:
    """Warn if all arms end at the best possible reward."""
    rewards = runs.groupby("arm")["reward"].mean()
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
