"""Holds the result of comparing arms over seeds, and puts it into sentences that claim no more than it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import pandas as pd
from scipy import stats

from tokenrl.errors import Refused
from tokenrl.lab.compare.intervals import LEAST_PAIRS, Estimate, failure_rate

VerdictWord = Literal["better", "worse", "equivalent", "undecided", "descriptive"]
"""Of an arm against another: better, worse, equivalent within the margin, or undecided; or descriptive, which is no
verdict, because there are fewer than six pairs."""
HEADLINES: dict[VerdictWord, str] = {
    "better": "Better than {reference}: {arms}.",
    "worse": "Worse than {reference}: {arms}.",
    "equivalent": "Equivalent to {reference} within {margin}: {arms}.",
    "undecided": "Undecided against {reference}: {arms}.",
    "descriptive": "No verdict, because there are too few seeds: {arms} against {reference}.",
}
"""For each verdict, the sentence about the arms that have it."""
FINDINGS: dict[VerdictWord, str] = {
    "better": "{arm} is better than {reference}, {reason}.",
    "worse": "{arm} is worse than {reference}, {reason}.",
    "equivalent": "{arm} and {reference} are equivalent: the difference, {interval}, is smaller than the margin of "
    "{margin}.",
    "undecided": "{arm} against {reference} is undecided: {reason}.",
    "descriptive": "{arm} against {reference}: {interval}; {pairs} of {least} pairs of seeds, too few for a verdict.",
}
"""For each verdict, the sentence about one arm, which is about runs that did not fail unless failures decide."""
MOST_PAIRS = 1000
"""More are not proposed."""
UNMET = 3
"""The exit code where an arm has another verdict than `require` asks for."""


@dataclass(frozen=True)
class ArmScores:
    """The scores of one arm.

    Attributes:
        arm: its label.
        scores: score by seed of the runs that did not fail.
        failed: the seeds of the runs that failed.
    """

    arm: str
    scores: dict[int, float]
    failed: tuple[int, ...] = ()

    @property
    def seeds(self) -> set[int]:
        """The seeds of all its runs."""
        return {*self.scores, *self.failed}

    def on(self, seeds: Collection[int]) -> ArmScores:
        """Return what it has on some seeds."""
        scores = {seed: score for seed, score in self.scores.items() if seed in seeds}
        return ArmScores(self.arm, scores, tuple(seed for seed in self.failed if seed in seeds))

    @property
    def mean(self) -> float:
        """The mean score of the runs that did not fail; nan if all failed.

        It has no interval, because none from a few runs holds near the ceiling of a score.
        """
        return fmean(self.scores.values()) if self.scores else math.nan

    @property
    def failures(self) -> Estimate:
        """Share of the runs that failed, with exact limits."""
        return failure_rate(len(self.failed), len(self.seeds))

    @property
    def count(self) -> str:
        """The number of failed runs, in words."""
        return f"{len(self.failed)} of {len(self.seeds)} runs"


@dataclass(frozen=True)
class PairedDifference:
    """The difference of an arm to a reference in two parts: failures, and scores paired by seed.

    Attributes:
        arm: the arm.
        reference: the arm with which it is compared.
        differences: score of the arm minus score of the reference by seed, where neither run failed.
        adjusted: their mean with its Student-t interval at the level that decides.
        level: that level: .05 shared by all comparisons of the family, and where a run of the two arms
            failed, by the two parts of the verdict.
        p_failures: two-sided p of Fisher's exact test that both fail equally often.
        more_failures: the arm that fails more often at the level that decides; empty if neither does.
        verdict: the verdict.
        unpaired: seeds that only one of the two has; they are left out.
        margin: differences smaller than this count as none; None if equivalence is not judged.
        look: of several looks, the number of seeds at the one that is told: where the verdict fell, or the last
            that was made; else 0.
    """

    arm: str
    reference: str
    differences: dict[int, float]
    adjusted: Estimate
    level: float
    p_failures: float
    more_failures: str
    verdict: VerdictWord
    unpaired: tuple[int, ...]
    margin: float | None
    look: int = 0

    @property
    def is_decided(self) -> bool:
        """Whether no more runs are needed."""
        return decides(self.verdict)

    @property
    def pairs_for_verdict(self) -> int | None:
        """The least number of pairs whose scores have a verdict, if the mean and the spread stay as they are.

        Where there is a verdict, so many would have done. None if more than 1,000 would be needed.
        """
        if len(self.differences) < 2:
            return None
        mean = self.adjusted.value
        spread = stdev(self.differences.values())
        for pairs in range(LEAST_PAIRS, MOST_PAIRS + 1):
            half = stats.t.isf((1 - self.level) / 2, pairs - 1) * spread / math.sqrt(pairs)
            interval = Estimate(mean, mean - half, mean + half)
            if decides(verdict_of_scores(interval, pairs, self.margin)):
                return pairs
        return None

    @property
    def interval(self) -> str:
        """The mean difference with its sign and the interval that decides, such as +0.14 [0.12, 0.17]."""
        if not self.differences:
            return "-"
        return f"{self.adjusted.value:+.3g} [{digits(self.adjusted.low)}, {digits(self.adjusted.high)}]"

    @property
    def finding(self) -> str:
        """The verdict in a sentence."""
        return FINDINGS[self.verdict].format(
            arm=self.arm,
            reference=self.reference,
            interval=self.interval,
            reason=self._reason,
            margin=digits(self.margin),
            pairs=len(self.differences),
            least=LEAST_PAIRS,
        )

    @property
    def _reason(self) -> str:
        is_undecided = self.verdict == "undecided"
        if self.more_failures and is_undecided:
            return (
                f"one fails more often, and the other is worse where neither fails, {self.interval}"
            )
        if self.more_failures:
            often = "more" if self.more_failures == self.arm else "less"
            return f"because it fails {often} often"
        if not is_undecided:
            return f"by {self.interval}"
        if self.adjusted.low == self.adjusted.high:
            return f"all differences are {digits(self.adjusted.value)}, which does not show how they vary"
        pairs = self.pairs_for_verdict or f"more than {MOST_PAIRS:,}"
        return (
            f"the difference, {self.interval}, may have either sign. If its mean and spread stayed, {pairs} seeds "
            "would decide"
        )


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
    def undecided(self) -> set[str]:
        """The arms, the reference among them, of differences that more runs could decide."""
        open_ones = [d for d in self.differences if not d.is_decided]
        return {arm for d in open_ones for arm in (d.arm, d.reference)}

    @property
    def against_reference(self) -> dict[str, PairedDifference]:
        """The differences to the reference, by arm."""
        return {d.arm: d for d in self.differences if d.reference == self.reference}

    def table(self) -> pd.DataFrame:
        """Return by arm its failed runs, its mean score, and its difference to the reference."""
        rows = {}
        for arm in self.arms:
            difference = self.against_reference.get(arm.arm)
            rows[arm.arm] = {
                "failed": arm.count,
                "score": arm.mean,
                f"against {self.reference}": difference.interval if difference else "",
                "verdict": difference.verdict if difference else "reference",
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def headline(self, qualified: Sequence[str] = ()) -> str:
        """Return all verdicts against the reference in a sentence or two, with what qualifies them.

        Args:
            qualified: what qualifies the verdicts, such as "every arm ends at the ceiling".
        """
        sentences = []
        for verdict, template in HEADLINES.items():
            arms = [d.arm for d in self.against_reference.values() if d.verdict == verdict]
            if arms:
                margin = digits(self.margin)
                sentences.append(
                    template.format(reference=self.reference, margin=margin, arms=joined(arms))
                )
        failures = [f"{arm.arm} in {arm.count}" for arm in self.arms if arm.failed]
        if failures:
            sentences.append(f"Runs failed: {joined(failures)}.")
        verdicts = {difference.verdict for difference in self.differences}
        if qualified and verdicts & {"better", "worse", "equivalent"}:
            sentences.append(f"But {joined(qualified)}.")
        return " ".join(sentences)

    def sentences(self) -> list[str]:
        """Return the verdict of each difference in two parts: runs that did not fail, and failures.

        Seeds that only one of two arms has are named.
        """
        arms = {arm.arm: arm for arm in self.arms}
        seeds = sorted(set().union(*(arm.seeds for arm in self.arms)))
        sentences = []
        for d in self.differences:
            both = (arms[name].on(seeds[: d.look or None]) for name in (d.arm, d.reference))
            sentences.append(f"{d.finding}{_look(d)} {_failures(d, *both)}")
        return sentences


@dataclass(frozen=True)
class Judgement:
    """What the scores say: one family of comparisons per problem.

    Attributes:
        metric: name of the score.
        families: the families.
    """

    metric: str
    families: tuple[Family, ...]

    def verdicts(self) -> dict[tuple[str, str], VerdictWord]:
        """Return the verdict against the reference by problem and arm."""
        return {
            (family.problem, arm): difference.verdict
            for family in self.families
            for arm, difference in family.against_reference.items()
        }

    def table(self) -> pd.DataFrame:
        """Return a row for each difference."""
        rows = [
            {
                "problem": family.problem,
                "metric": self.metric,
                "pairs": len(difference.differences),
                "pairs_for_verdict": difference.pairs_for_verdict,
                **vars(difference),
                **difference.adjusted._asdict(),
            }
            for family in self.families
            for difference in family.differences
        ]
        return pd.DataFrame(rows).drop(columns=["differences", "adjusted"])


def required(words: str, rivals: Collection[str]) -> tuple[set[str], str]:
    """Return the verdicts of which `--require` asks for one, and the arm, such as better|equivalent:grpo.

    Args:
        words: the text.
        rivals: the arms that have verdicts.

    Raises:
        Refused: it names something else.
    """
    names, _, arm = words.partition(":")
    verdicts = {*names.split("|")}
    if not verdicts <= {*HEADLINES} or arm not in rivals:
        raise Refused(
            f"require was given as {words!r}; name one or more of {', '.join(HEADLINES)}, separated by |, and "
            f"after a colon one of the arms {', '.join(rivals)}."
        )
    return verdicts, arm


def exit_code(words: str | None, family: Family) -> int:
    """Return 0 if a family has what `--require` asks for, or it asks for nothing; else 3."""
    if words is None:
        return 0
    verdicts, arm = required(words, family.against_reference)
    return 0 if family.against_reference[arm].verdict in verdicts else UNMET


def decides(verdict: VerdictWord) -> bool:
    """Return whether a verdict ends a comparison."""
    return verdict not in ("undecided", "descriptive")


def verdict_of_scores(interval: Estimate, pairs: int, margin: float | None) -> VerdictWord:
    """Return the verdict of runs that did not fail.

    An interval within the margin is equivalent also if it excludes 0: the difference exists, but it is too
    small to count.
    """
    if pairs < LEAST_PAIRS:
        return "descriptive"
    if interval.low == interval.high:
        return "undecided"
    if margin is not None and -margin <= interval.low and interval.high <= margin:
        return "equivalent"
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    return "undecided"


def _look(difference: PairedDifference) -> str:
    """Say at which of several looks a verdict fell."""
    if not difference.look:
        return ""
    word = "Decided" if difference.is_decided else "Looked at last"
    return f" {word} after {difference.look} seeds."


def _failures(difference: PairedDifference, arm: ArmScores, reference: ArmScores) -> str:
    """Say how many runs of both failed, what is not excluded, and which seeds are left out."""
    left_out = ""
    if difference.unpaired:
        seeds = joined([str(seed) for seed in difference.unpaired])
        left_out = f" Left out, because only one of the two has them: seeds {seeds}."
    if not arm.failed and not reference.failed:
        high = max(arm.failures.high, reference.failures.high)
        return f"No run of either failed, which does not exclude that up to {high:.0%} would.{left_out}"
    counts = []
    for scores in (arm, reference):
        low, high = scores.failures[1:]
        counts.append(f"{scores.count} of {scores.arm} failed [{low:.0%}, {high:.0%}]")
    p = digits(difference.p_failures)
    return f"{joined(counts)}, p = {p}; the difference is between the other runs.{left_out}"


def joined(names: Sequence[str]) -> str:
    """Join names with commas and a last `and`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def digits(value: float | None) -> str:
    """Write a number to three digits; a missing number as a dash."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3g}"
