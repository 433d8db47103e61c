"""Defines what is found when arms are compared over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from tokenrl.lab.compare.paired import Interval

Verdict = Literal["better", "worse", "equivalent", "undecided", "descriptive", "void"]
"""Of an arm against another: better, worse, equivalent within the margin, or undecided. Without a verdict:
descriptive, because there are fewer than six pairs; or void, because an arm is not valid."""


@dataclass(frozen=True)
class ArmScores:
    """The scores of one arm.

    Attributes:
        arm: its label.
        scores: score by seed of the runs that did not fail.
        mean: their mean; nan if all runs failed. It has no interval, because none from a few runs holds near
            the ceiling of a score.
        failed: the seeds of the runs that failed.
        failures: share of the runs that failed, with exact limits.
        void: why the arm is not valid, in words; empty if it is.
    """

    arm: str
    scores: dict[int, float]
    mean: float
    failed: tuple[int, ...]
    failures: Interval
    void: str = ""


@dataclass(frozen=True)
class Difference:
    """An arm compared with another one, paired by seed, in two parts: failures, and the rest.

    Attributes:
        arm: the arm.
        reference: what it is compared with.
        differences: score of the arm minus that of the reference by seed, of pairs in which neither failed.
        mean: mean difference with a 95 % Student-t interval.
        adjusted: the same at the level that decides.
        level: that level: .05 shared by all comparisons of the family, and where a run of the two arms
            failed, by the two parts of the verdict.
        p_sign_flip: two-sided p of the exact sign-flip test, shown beside the interval.
        improvement: share of all pairs in which the arm is better (ties count half, a run that failed is
            worse than one that did not), with an exact 95 % interval.
        p_failures: two-sided p of Fisher's exact test that both fail equally often.
        verdict: the verdict.
        seeds_needed: how many seeds at least would decide; None if it is decided, or if nothing can be said.
        unpaired: seeds that only one of the two has, which are therefore left out.
    """

    arm: str
    reference: str
    differences: dict[int, float]
    mean: Interval
    adjusted: Interval
    level: float
    p_sign_flip: float
    improvement: Interval
    p_failures: float
    verdict: Verdict
    seeds_needed: int | None
    unpaired: tuple[int, ...] = ()

    @property
    def failures_decide(self) -> bool:
        """Whether one of the two fails more often, at the level that decides."""
        return self.p_failures <= 1 - self.level + 1e-12


@dataclass(frozen=True)
class Family:
    """All comparisons on one problem.

    Attributes:
        problem: label of the problem.
        reference: label of the reference arm.
        margin: differences smaller than this count as none; None if equivalence is not judged.
        arms: the scores of each arm, in the order in which they were given.
        differences: each other arm against the reference, then all other pairs if they were asked for.
        itself: the reference on its own seeds against itself on others, if that was measured. It belongs
            to no family: its level is .95.
    """

    problem: str
    reference: str
    margin: float | None
    arms: tuple[ArmScores, ...]
    differences: tuple[Difference, ...]
    itself: Difference | None = None

    def arm(self, label: str) -> ArmScores:
        """Return the scores of an arm."""
        return next(one for one in self.arms if one.arm == label)


@dataclass(frozen=True)
class Judgement:
    """What the scores say: one family of comparisons per problem.

    Attributes:
        metric: name of the score.
        families: the families.
    """

    metric: str
    families: tuple[Family, ...]

    def verdicts(self) -> dict[tuple[str, str], Verdict]:
        """Return the verdict against the reference by problem and arm."""
        return {
            (f.problem, d.arm): d.verdict for f in self.families for d in f.differences
            if d.reference == f.reference
        }  # fmt: skip

    def table(self) -> pd.DataFrame:
        """Return a row for each difference, that of a reference to itself last in its family."""
        rows = [
            {"problem": family.problem, "metric": self.metric, **_cells(one), "margin": family.margin}
            for family in self.families
            for one in (*family.differences, *([family.itself] if family.itself else []))
        ]
        return pd.DataFrame(rows).astype({"seeds_needed": "Int64"})


def _cells(found: Difference) -> dict[str, Any]:
    """Return the fields of a difference as cells of a table: intervals as three numbers, seeds as text."""
    cells: dict[str, Any] = {"pairs": len(found.differences)}
    for name, value in vars(found).items():
        if isinstance(value, Interval):
            cells |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        elif name != "differences":
            cells[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return cells
