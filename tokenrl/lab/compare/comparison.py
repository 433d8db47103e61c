"""Judges the runs of a comparison, and says what the verdicts do not mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tokenrl.errors import Stopped
from tokenrl.lab.compare.decisions import judge_scores
from tokenrl.lab.compare.judgement import Family, Judgement, digits, joined
from tokenrl.lab.compare.plan import Plan, Problem
from tokenrl.lab.compare.table import RunTable
from tokenrl.runs.findings import LOST_SHARE

LOST = {
    "grad_clipped": (
        "Clipping: the gradient was clipped in most updates of {arms}. There the bound sets the size of a step; the "
        "estimator sets only its direction.",
        "most updates were clipped, which hides a gradient's size",
    ),
    "cut": (
        "Truncation: most completions of {arms} were cut off, so their rewards say little. Raise "
        "--max-completion-length.",
        "most completions were cut off",
    ),
}
"""For each share of training that may be lost: what to say of arms that lost most, and briefly in the headline."""


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
            caveats = dict(_caveats(problem, self.plan, self.table))
            headline = family.headline([*filter(None, caveats.values())])
            words[problem.label] = Words(headline, family.sentences(), [*caveats])
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
    families = list[Family]()
    for problem in plan.problems:
        runs = table.of(problem.label).query("state != 'missing'")
        if runs[plan.metric].isna().all():
            reason = "".join(runs["reason"][:1])
            raise Stopped(
                f"Nothing can be judged on {problem.label}: no run has {plan.metric}. {reason}"
            )
        judgement = judge_scores(
            runs,
            metric=plan.metric,
            reference=plan.reference,
            margin=problem.margin,
            all_pairs=plan.all_pairs,
        )
        families += judgement.families
    return Comparison(output_dir, plan, table, Judgement(plan.metric, tuple(families)))


def _caveats(problem: Problem, plan: Plan, table: RunTable) -> Iterator[tuple[str, str]]:
    """Yield what the verdicts on a problem do not mean, and what of it belongs in the headline; else empty."""
    runs = table.of(problem.label)
    by_arm = runs.groupby("arm", sort=False)
    least = by_arm["reward"].mean().min(skipna=False)
    ceiling = math.inf if problem.solved is None else problem.solved
    if problem.margin is not None and problem.reward_range:
        ceiling = min(ceiling, problem.reward_range[1] - problem.margin)
    if least >= ceiling:
        yield (
            f"Ceiling: every arm ends at {digits(least)} or above. From {digits(ceiling)} on little is left to gain, "
            "so the reward at the end hardly separates the arms. Compare at a smaller budget (--max-steps), with other "
            "seeds.",
            "every arm ends at the ceiling",
        )
    for metric, (text, headline) in LOST.items():
        shares = by_arm[metric].mean()
        arms = [f"{arm} ({share:.0%})" for arm, share in shares.items() if share > LOST_SHARE]
        if arms:
            yield text.format(arms=joined(arms)), headline
    for arm, of_arm in by_arm:
        counts = of_arm["flags"].str.split().explode().value_counts(sort=False)
        for flag in counts[counts > LOST_SHARE * len(of_arm)].index:
            yield f"Training of {arm}: {flag} in most of its runs.", ""
    tuned = table.of(problem.label, "tuning").groupby("arm", sort=False)["learning_rate"]
    rates = by_arm["learning_rate"].first()
    for label, edges in tuned.agg(["min", "max"]).iterrows():
        if rates[label] in edges.to_numpy():
            yield (
                f"Learning rate: the best rate of {label}, {rates[label]:g}, is the least or the greatest that "
                "was tried, so a better rate may lie beyond it.",
                "",
            )
