"""Defines what is found when arms are compared over seeds. Imports neither torch nor scipy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Verdict = Literal["better", "worse", "equivalent", "undecided", "descriptive", "void"]
"""Of an arm against the reference: better, worse, equivalent within the margin, or undecided. Without a
verdict: descriptive, because there are fewer than six pairs; or void, because an arm is not valid."""


class Interval(NamedTuple):
    """A number with its confidence interval; the ends are nan where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmScores:
    """The scores of one arm.

    Attributes:
        arm: its label.
        scores: score by seed; a failed run's score too.
        mean: mean over seeds with a 95 % Student-t interval.
        sd: standard deviation over seeds.
        void: why the arm is not valid, in words; empty if it is.
    """

    arm: str
    scores: dict[int, float]
    mean: Interval
    sd: float
    void: str = ""


@dataclass(frozen=True)
class Difference:
    """An arm compared with the reference, paired by seed.

    Attributes:
        arm: the arm.
        reference: what it is compared with.
        differences: score of the arm minus that of the reference, by seed.
        mean: mean difference with a 95 % Student-t interval.
        adjusted: the same at the level of the family, which decides the verdict.
        level: that level, such as 0.9833 for three comparisons.
        sd: standard deviation of the differences.
        p_sign_flip: two-sided p of the exact sign-flip test.
        p_least: the smallest value that it can have with this number of pairs.
        p_holm: the same p adjusted over the family by Holm's method.
        improvement: share of the pairs in which the arm is better (ties count half), with a 95 % interval.
        verdict: the verdict.
        seeds_needed: number of seeds with which the verdict would probably (80 %) be decided, if the mean
            and the spread are as found; None if it is decided, or if no number up to 10,000 would do.
        unpaired: seeds that only one of the two has, which are therefore left out.
    """

    arm: str
    reference: str
    differences: dict[int, float]
    mean: Interval
    adjusted: Interval
    level: float
    sd: float
    p_sign_flip: float
    p_least: float
    p_holm: float
    improvement: Interval
    verdict: Verdict
    seeds_needed: int | None
    unpaired: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """All comparisons on one problem.

    Attributes:
        problem: label of the problem.
        reference: label of the reference arm.
        margin: differences smaller than this count as none; None if equivalence is not judged.
        arms: the scores of each arm, in the order in which they were given.
        differences: each other arm against the reference, in the same order.
        itself: the reference on its own seeds against itself on others, if that was measured. It belongs
            to no family: its level is 0.95.
    """

    problem: str
    reference: str
    margin: float | None
    arms: tuple[ArmScores, ...]
    differences: tuple[Difference, ...]
    itself: Difference | None = None


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
        """Return the verdict by problem and arm."""
        return {(f.problem, d.arm): d.verdict for f in self.families for d in f.differences}
