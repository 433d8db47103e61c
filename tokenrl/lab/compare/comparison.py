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
from tokenrl.lab.compare.judgement import Family, Judgement, digits, joined
from tokenrl.lab.compare.plan import Plan, Role
from tokenrl.runs import ENDED

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
    """The verdicts in words.

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
        runs: a row for each run (see `table.read_runs`).
        judgement: failures, paired differences and verdicts, by the score of the plan.
    """

    output_dir: Path
    plan: Plan
    runs: pd.DataFrame
    judgement: Judgement

    @property
    def family(self) -> Family:
        """All comparisons of the arms."""
        return self.judgement.families[0]

    @cached_property
    def words(self) -> Words:
        """The verdicts in words."""
        caveats = dict(self._caveats())
        headline = self.family.headline([*filter(None, caveats.values())])
        return Words(f"{headline}{self._saved}", self.family.sentences(), [*caveats])

    @property
    def _saved(self) -> str:
        """How many runs the looks saved, in words; empty where there was one look."""
        if len(self.plan.looks) == 1 or self.family.undecided:
            return ""
        return f" {self.counts['made']} of {self.counts['planned']} runs were made."

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run failed. A failure on a tuning seed does not count: it speaks against its rate."""
        return int((self.of("comparison")["state"] != "finished").any())

    @property
    def counts(self) -> dict[str, int]:
        """How many runs of the comparison were planned, have ended, and failed."""
        runs = self.of("comparison")
        planned = len(self.plan.seeds) * len(self.plan.arms)
        made = int(runs["state"].isin(ENDED).sum())
        return {"planned": planned, "made": made, "failed": int(runs["failed"].sum())}

    @property
    def curves(self) -> dict[str, pd.DataFrame]:
        """The curves of the runs of each arm, one below the other; of arms that have any."""
        runs = self.of("comparison").dropna(subset="curve")
        return {
            str(arm): pd.concat([*rows]) for arm, rows in runs.groupby("arm", sort=False)["curve"]
        }

    def of(self, role: Role) -> pd.DataFrame:
        """Return the rows of the runs that are compared, or of those that choose learning rates."""
        return self.runs[self.runs["role"] == role]

    def _caveats(self) -> Iterator[tuple[str, str]]:
        """Yield what the verdicts do not mean, and what of it belongs in the headline; else empty."""
        for arm in self.plan.arms:
            if arm.control:
                yield f"Control: {arm.declared}.", f"{arm.label} is a control"
        by_arm = self.of("comparison").groupby("arm", sort=False)
        judged = [arm.label for arm in self.plan.arms if not arm.control]
        least = by_arm["reward"].mean().reindex(judged).min(skipna=False)
        ceiling = math.inf if self.plan.ceiling is None else self.plan.ceiling
        if least >= ceiling:
            yield (
                f"Ceiling: every arm ends at {digits(least)} or above. From {digits(ceiling)} on little is left to "
                "gain, so the reward at the end hardly separates the arms. Compare at a smaller budget (--max-steps), "
                "with other seeds.",
                "every arm ends at the ceiling",
            )
        for metric, (text, headline) in LOST.items():
            shares = by_arm[metric].mean()
            arms = [f"{arm} ({share:.0%})" for arm, share in shares.items() if share > 1 / 2]
            if arms:
                yield text.format(arms=joined(arms)), headline
        for arm, of_arm in by_arm:
            counts = of_arm["flags"].str.split().explode().value_counts(sort=False)
            for flag in counts[counts > len(of_arm) / 2].index:
                yield f"Training of {arm}: {flag} in most of its runs.", ""
        best = by_arm["learning_rate"].first()
        for arm in self.plan.arms:
            rates = sorted(arm.rates)
            if len(rates) > 1 and best[arm.label] in (rates[0], rates[-1]):
                yield (
                    f"Learning rate: the best rate of {arm.label}, {best[arm.label]:g}, is the least or the greatest "
                    "that was tried, so a better rate may lie beyond it.",
                    "",
                )


def judge_rows(runs: pd.DataFrame, metric: str, problem: str = "", **options: Any) -> Judgement:
    """Judge runs by a score; those that have not ended are left out.

    Args:
        runs: a row for each run, as `table.rows_of` makes it, with its arm and seed.
        metric: the score.
        problem: the name of the problem.
        **options: as `judge_scores` takes them.

    Raises:
        Stopped: no run has the score, or only one arm has runs that have ended.
    """
    ended = runs[runs["state"].isin(ENDED)].assign(score=runs[metric], problem=problem)
    arms = ended["arm"].nunique()
    if ended["score"].isna().all() or arms < 2:
        fault = f"no run has {metric}" if arms > 1 else "two arms need runs that have ended"
        reason = "".join(runs["reason"][runs["reason"] != ""][:1])
        raise Stopped(f"Nothing can be judged{problem and ' on '}{problem}: {fault}. {reason}")
    return judge_scores(ended, metric=metric, **options)


def judge_runs(output_dir: Path, plan: Plan, runs: pd.DataFrame) -> Comparison:
    """Judge the runs of a comparison.

    Args:
        output_dir: its directory.
        plan: the plan.
        runs: a row for each run.

    Raises:
        Stopped: nothing can be judged yet.
    """
    judgement = judge_rows(
        runs[runs["role"] == "comparison"],
        plan.metric,
        plan.problem,
        reference=plan.reference,
        margin=plan.margin,
        all_pairs=plan.all_pairs,
        looks=plan.looks,
    )
    return Comparison(output_dir, plan, runs, judgement)
