"""Holds the result of comparing arms over seeds, and puts it into sentences that claim no more than it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any, Literal

import pandas as pd

from tokenrl.lab.compare.intervals import LEAST_PAIRS, Interval, failure_rate

VerdictWord = Literal["better", "worse", "equivalent", "undecided", "descriptive", "void"]
"""Of an arm against another: better, worse, equivalent within the margin, or undecided. Without a verdict:
descriptive, because there are fewer than six pairs; or void, because an arm is not valid."""
WHOLE: dict[VerdictWord, str] = {
    "better": "Better than {other}: {arms}.",
    "worse": "Worse than {other}: {arms}.",
    "equivalent": "Equivalent to {other} within {margin}: {arms}.",
    "undecided": "Undecided against {other}: {arms}.",
    "descriptive": "No verdict, because there are too few seeds: {arms} against {other}.",
    "void": "Not valid, so not compared with {other}: {arms}.",
}
"""For each verdict, the sentence about the arms that have it."""


@dataclass(frozen=True)
class ArmScores:
    """The scores of one arm.

    Attributes:
        arm: its label.
        scores: score by seed of the runs that did not fail.
        failed: the seeds of the runs that failed.
        void: the reason why the arm is not valid; empty if it is valid.
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
        """The number of failed runs, in words."""
        return f"{len(self.failed)} of {len(self.seeds)} runs"


@dataclass(frozen=True)
class PairedDifference:
    """The difference of an arm to another one in two parts: failures, and scores paired by seed.

    Attributes:
        arm: the arm.
        reference: the arm with which it is compared.
        differences: score of the arm minus that of the reference by seed, of pairs in which neither failed.
        mean: mean difference with a 95 % Student-t interval.
        adjusted: the same at the level that decides.
        level: that level: .05 shared by all comparisons of the family, and where a run of the two arms
            failed, by the two parts of the verdict.
        p_failures: two-sided p of Fisher's exact test that both fail equally often.
        more_failures: the arm that fails more often at the level that decides; empty if neither does.
        verdict: the verdict.
        unpaired: seeds that only one of the two has; they are left out.
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
    verdict: VerdictWord
    unpaired: tuple[int, ...]
    margin: float | None

    @property
    def apart(self) -> str:
        """The mean difference with its sign and the interval that decides, such as +0.14 [0.12, 0.17]."""
        return f"{self.mean.value:+.3g} [{digits(self.adjusted.low)}, {digits(self.adjusted.high)}]"

    @property
    def finding(self) -> str:
        """The verdict in a sentence, which is about runs that did not fail unless failures decide."""
        arm, reference, pairs = self.arm, self.reference, len(self.differences)
        if self.verdict == "void":
            return f"{arm} and {reference} cannot be compared: one of them is not valid."
        if self.verdict == "descriptive":
            lies = f"{arm} lies {self.apart} from {reference}; " if pairs else ""
            few = f"{lies}{pairs} pair{'s are' if pairs != 1 else ' is'} too few for a verdict"
            return f"{few}, which needs {LEAST_PAIRS} seeds or more."
        if self.verdict == "equivalent":
            yet = ", though it is not 0" * self.adjusted.excludes_0
            size = f"the difference, {self.apart}, is smaller than the margin of {digits(self.margin)}{yet}"
            return f"{arm} and {reference} are equivalent: {size}."
        if self.verdict in ("better", "worse"):
            often = "more" if self.more_failures == arm else "less"
            reason = f"because it fails {often} often" if self.more_failures else f"by {self.apart}"
            return f"{arm} is {self.verdict} than {reference}, {reason}."
        if self.more_failures:
            reason = (
                f"one fails more often, and the other is worse where neither fails, {self.apart}"
            )
        elif self.adjusted.low == self.adjusted.high:
            reason = f"all differences are {digits(self.mean.value)}, which says nothing of how they vary"
        else:
            reason = (
                f"the difference, {self.apart}, may have either sign; more seeds would narrow it"
            )
        return f"{arm} against {reference} is undecided: {reason}."

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
    """

    problem: str
    reference: str
    margin: float | None
    arms: tuple[ArmScores, ...]
    differences: tuple[PairedDifference, ...]

    @property
    def against_reference(self) -> dict[str, PairedDifference]:
        """The differences to the reference, by arm."""
        return {d.arm: d for d in self.differences if d.reference == self.reference}

    def headline(self, qualified: Sequence[str] = ()) -> str:
        """Return all verdicts against the reference in a sentence or two, with what qualifies them.

        Args:
            qualified: what qualifies the verdicts, such as "every arm ends at the ceiling".
        """
        names = {"other": self.reference, "margin": digits(self.margin)}
        each = {
            v: [d.arm for d in self.against_reference.values() if d.verdict == v] for v in WHOLE
        }
        sentences = [
            WHOLE[v].format(arms=joined(arms), **names) for v, arms in each.items() if arms
        ]
        failing = [f"{arm.arm} in {arm.count}" for arm in self.arms if arm.failed]
        sentences += [f"Runs failed: {joined(failing)}."] if failing else []
        return " ".join([*sentences, *([f"But {joined(qualified)}."] if qualified else [])])

    def sentences(self) -> list[str]:
        """Return the verdict of each difference in two parts, then why arms are not valid.

        The parts are runs that did not fail, and failures. Seeds that only one of two arms has are named.
        """
        arms = {arm.arm: arm for arm in self.arms}
        sentences = [
            f"{d.finding} {_failures(d, arms[d.arm], arms[d.reference])}" for d in self.differences
        ]
        return sentences + [f"{arm.arm} is not valid: {arm.void}" for arm in self.arms if arm.void]


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

    @property
    def differences(self) -> list[PairedDifference]:
        """The differences of all families."""
        return [*chain.from_iterable(family.differences for family in self.families)]

    def verdicts(self) -> dict[tuple[str, str], VerdictWord]:
        """Return the verdict against the reference by problem and arm."""
        return {
            (f.problem, arm): d.verdict
            for f in self.families
            for arm, d in f.against_reference.items()
        }

    def table(self) -> pd.DataFrame:
        """Return a row for each difference."""
        rows = [
            {"problem": family.problem, "metric": self.metric, **d.row()}
            for family in self.families
            for d in family.differences
        ]
        return pd.DataFrame(rows)


def _failures(difference: PairedDifference, arm: ArmScores, reference: ArmScores) -> str:
    """Say how many runs of both failed, what is not excluded, and which seeds are left out."""
    seeds = joined([str(seed) for seed in difference.unpaired])
    left_out = f" Left out, because only one of the two has them: seeds {seeds}." if seeds else ""
    if not arm.failed and not reference.failed:
        most = max(arm.failures.high, reference.failures.high)
        return f"No run of either failed, which does not exclude that up to {most:.0%} would.{left_out}"
    each = [
        f"{scores.count} of {scores.arm} failed [{scores.failures.low:.0%}, {scores.failures.high:.0%}]"
        for scores in (arm, reference)
    ]
    p = digits(difference.p_failures)
    return f"{joined(each)}, p = {p}; the difference is that of the other runs.{left_out}"


def joined(names: Sequence[str]) -> str:
    """Join names with commas and a last `and`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def digits(value: float | None) -> str:
    """Write a number to three digits; a missing one as a dash."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
