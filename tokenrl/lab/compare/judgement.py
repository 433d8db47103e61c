"""Holds what is found when arms are compared over seeds, and says it in plain words, never more than that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import pandas as pd

from tokenrl.lab.compare.intervals import LEAST_PAIRS, Interval, failure_rate

Verdict = Literal["better", "worse", "equivalent", "undecided", "descriptive", "void"]
"""Of an arm against another: better, worse, equivalent within the margin, or undecided. Without a verdict:
descriptive, because there are fewer than six pairs; or void, because an arm is not valid."""
WHOLE: dict[Verdict, str] = {
    "better": "Better than {other}: {arms}.",
    "worse": "Worse than {other}: {arms}.",
    "equivalent": "Equivalent to {other} within {margin}: {arms}.",
    "undecided": "Undecided against {other}: {arms}.",
    "descriptive": "No verdict, because there are too few seeds: {arms} against {other}.",
    "void": "Not valid, so not compared with {other}: {arms}.",
}
"""All verdicts, with the words for the arms that they are given to."""


@dataclass(frozen=True)
class ArmScores:
    """The scores of one arm.

    Attributes:
        arm: its label.
        scores: score by seed of the runs that did not fail.
        failed: the seeds of the runs that failed.
        void: why the arm is not valid, in words; empty if it is.
    """

    arm: str
    scores: dict[int, float]
    failed: tuple[int, ...] = ()
    void: str = ""

    @property
    def seeds(self) -> set[int]:
        """The seeds of all its runs."""
        return {*self.scores, *self.failed}

    @property
    def mean(self) -> float:
        """The mean score of the runs that did not fail; nan if all failed.

        It has no interval, because none from a few runs holds near the ceiling of a score.
        """
        return fmean(self.scores.values()) if self.scores else math.nan

    @property
    def failures(self) -> Interval:
        """Share of the runs that failed, with exact limits."""
        return failure_rate(len(self.failed), len(self.seeds))

    @property
    def count(self) -> str:
        """How many of the runs failed, in words."""
        return f"{len(self.failed)} of {len(self.seeds)} runs"


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
        p_failures: two-sided p of Fisher's exact test that both fail equally often.
        more_failures: which of the two fails more often, at the level that decides; empty for neither.
        verdict: the verdict.
        unpaired: seeds that only one of the two has, which are therefore left out.
        margin: differences smaller than this count as none; None if equivalence is not judged.
    """

    arm: str
    reference: str
    differences: dict[int, float]
    mean: Interval
    adjusted: Interval
    level: float
    p_failures: float
    more_failures: str
    verdict: Verdict
    unpaired: tuple[int, ...]
    margin: float | None

    @property
    def apart(self) -> str:
        """The mean difference with its sign and the interval that decides, such as +0.14 [0.12, 0.17]."""
        return f"{self.mean.value:+.3g} [{shown(self.adjusted.low)}, {shown(self.adjusted.high)}]"

    @property
    def finding(self) -> str:
        """The verdict in a sentence, of the runs that did not fail unless failures decide."""
        arm, other, pairs = self.arm, self.reference, len(self.differences)
        if self.verdict == "void":
            return f"{arm} and {other} cannot be compared: one of them is not valid."
        if self.verdict == "descriptive":
            lies = f"{arm} lies {self.apart} from {other}; " if pairs else ""
            few = f"{lies}{pairs} pair{'s are' if pairs != 1 else ' is'} too few for a verdict"
            return f"{few}, which needs {LEAST_PAIRS} seeds or more."
        if self.verdict == "equivalent":
            yet = ", though it is not 0" * self.adjusted.excludes_0
            size = f"the difference, {self.apart}, is smaller than the margin of {shown(self.margin)}{yet}"
            return f"{arm} and {other} are equivalent: {size}."
        if self.verdict in ("better", "worse"):
            often = "more" if self.more_failures == arm else "less"
            reason = f"because it fails {often} often" if self.more_failures else f"by {self.apart}"
            return f"{arm} is {self.verdict} than {other}, {reason}."
        if self.more_failures:
            reason = f"one fails more often, and the other is worse where neither fails, {self.apart}"
        elif self.adjusted.low == self.adjusted.high:
            reason = f"all differences are {shown(self.mean.value)}, which says nothing of how they vary"
        else:
            reason = f"the difference, {self.apart}, may be of either sign"
        return f"{arm} against {other} is undecided: {reason}."

    def row(self) -> dict[str, Any]:
        """Return the fields as cells of a table: intervals as three numbers, seeds as text."""
        cells: dict[str, Any] = {"pairs": len(self.differences)}
        for name, value in vars(self).items():
            if isinstance(value, Interval):
                cells |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            elif name != "differences":
                cells[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
        return cells


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

    @property
    def against_reference(self) -> dict[str, Difference]:
        """The differences to the reference, by arm."""
        return {one.arm: one for one in self.differences if one.reference == self.reference}

    def headline(self, qualified: Sequence[str] = ()) -> str:
        """Return all verdicts against the reference in a sentence or two, with what qualifies them.

        Args:
            qualified: what qualifies the verdicts, such as "every arm ends at the ceiling".
        """
        said = []
        for verdict, words in WHOLE.items():
            arms = [one.arm for one in self.against_reference.values() if one.verdict == verdict]
            if arms:
                said.append(words.format(arms=listed(arms), other=self.reference, margin=shown(self.margin)))
        failing = [f"{arm.arm} in {arm.count}" for arm in self.arms if arm.failed]
        said += [f"Runs failed: {listed(failing)}."] if failing else []
        return " ".join([*said, *([f"But {listed(qualified)}."] if qualified else [])])

    def sentences(self) -> list[str]:
        """Return the verdict of each difference in two parts, then why arms are not valid.

        The parts are runs that did not fail, and failures. Seeds that only one of two arms has are named.
        """
        by_label = {arm.arm: arm for arm in self.arms}
        said = [
            f"{one.finding} {_failures(one, by_label[one.arm], by_label[one.reference])}"
            for one in self.differences
        ]
        return said + [f"{arm.arm} is not valid: {arm.void}" for arm in self.arms if arm.void]


@dataclass(frozen=True)
class Judgement:
    """What the scores say: one family of comparisons per problem.

    Attributes:
        metric: name of the score.
        families: the families.
    """

    metric: str
    families: tuple[Family, ...]

    def of(self, problem: str) -> Family:
        """Return the family of a problem."""
        return next(family for family in self.families if family.problem == problem)

    def verdicts(self) -> dict[tuple[str, str], Verdict]:
        """Return the verdict against the reference by problem and arm."""
        return {(f.problem, arm): d.verdict for f in self.families for arm, d in f.against_reference.items()}

    def table(self) -> pd.DataFrame:
        """Return a row for each difference, that of a reference to itself last in its family."""
        rows = [
            {"problem": family.problem, "metric": self.metric, **one.row()}
            for family in self.families
            for one in (*family.differences, *([family.itself] if family.itself else []))
        ]
        return pd.DataFrame(rows)


def _failures(one: Difference, arm: ArmScores, other: ArmScores) -> str:
    """Say how many runs of both failed, what is not excluded, and which seeds are left out."""
    seeds = listed([str(seed) for seed in one.unpaired])
    left_out = f" Left out, because only one of the two has them: seeds {seeds}." if seeds else ""
    if not arm.failed and not other.failed:
        most = max(arm.failures.high, other.failures.high)
        return f"No run of either failed, which does not exclude that up to {most:.0%} would.{left_out}"
    each = [
        f"{a.count} of {a.arm} failed [{a.failures.low:.0%}, {a.failures.high:.0%}]" for a in (arm, other)
    ]
    return f"{listed(each)}, p = {shown(one.p_failures)}; the difference is that of the others.{left_out}"


def listed(names: Sequence[str]) -> str:
    """Join names with commas and a last `and`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def shown(value: float | None) -> str:
    """Write a number to three digits; a missing one as a dash."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
