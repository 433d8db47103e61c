"""Says in plain words what a paired difference shows, and never more than that."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenrl.lab.compare.statistics.found import Difference, Family, Interval
from tokenrl.lab.compare.statistics.paired import LEAST_PAIRS

WHOLE = {
    "better": "Better than {other}: {arms}.",
    "worse": "Worse than {other}: {arms}.",
    "equivalent": "Equivalent to {other} within {margin}: {arms}.",
    "undecided": "Undecided against {other}: {arms}.",
    "descriptive": "No verdict, because there are too few seeds: {arms} against {other}.",
    "void": "Not valid, so not compared with {other}: {arms}.",
}
"""All verdicts, with the words for the arms that they are given to."""


def sentence(found: Difference, margin: float | None) -> str:
    """Return the verdict of a difference as one sentence, with the interval that decided it.

    A second one names the seeds that only one of the two arms has, if there are any.

    Args:
        found: the difference.
        margin: the margin of equivalence of its family.
    """
    return _verdict(found, margin) + _left_out(found)


def _verdict(found: Difference, margin: float | None) -> str:
    arm, other = found.arm, found.reference
    by = f"{shown(abs(found.mean.value))} {_span(found)}"
    if found.verdict == "void":
        return f"{arm} and {other} cannot be compared: one of them is not valid. The difference is {by}."
    if found.verdict == "descriptive":
        pairs = "1 pair is" if len(found.differences) == 1 else f"{len(found.differences)} pairs are"
        return (
            f"{arm} lies {_side(found)} {other}, by {by}; {pairs} too few for a verdict, which "
            f"needs {max(LEAST_PAIRS, found.seeds_needed or 0):,} seeds or more."
        )
    if found.verdict == "equivalent":
        return f"{arm} and {other} are equivalent: the difference, {signed(found)}, is smaller than the margin of {shown(margin)}{_yet(found)}."  # noqa: E501
    if found.verdict == "undecided":
        needed = found.seeds_needed
        more = (
            f"about {needed:,} seeds would probably decide"
            if needed
            else "no number of seeds up to 10,000 would"
        )
        return f"{arm} against {other} is undecided: the difference, {signed(found)}, may be of either sign; {more}."  # noqa: E501
    return f"{arm} is {found.verdict} than {other} by {by}."


def headline(family: Family) -> str:
    """Return all verdicts of a family in a sentence or two, without numbers.

    Args:
        family: the comparisons on one problem.
    """
    by_verdict: dict[str, list[str]] = {}
    for one in family.differences:
        by_verdict.setdefault(one.verdict, []).append(one.arm)
    said = [
        WHOLE[verdict].format(arms=listed(arms), other=family.reference, margin=shown(family.margin))
        for verdict in WHOLE
        if (arms := by_verdict.get(verdict))
    ]
    return " ".join(said)


def listed(names: Sequence[str]) -> str:
    """Join names with commas and a last `and`."""
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def _left_out(found: Difference) -> str:
    if not found.unpaired:
        return ""
    one = len(found.unpaired) == 1
    seeds = listed([str(seed) for seed in found.unpaired])
    return f" Seed{'s' * (not one)} {seeds} {'is' if one else 'are'} left out: only one of the two has {'it' if one else 'them'}."  # noqa: E501


def _span(found: Difference) -> str:
    """Return the interval of the size of a difference, at the level that decides."""
    low, high = sorted((abs(found.adjusted.low), abs(found.adjusted.high)))
    if found.adjusted.low <= 0 <= found.adjusted.high or math.isnan(low):
        return _bracket(found.adjusted)
    return f"[{shown(low)}, {shown(high)}]"


def signed(found: Difference) -> str:
    """Return a mean difference with its sign and the interval that decides, such as +0.14 [0.12, 0.17]."""
    return f"{found.mean.value:+.3g} {_bracket(found.adjusted)}"


def _bracket(ends: Interval) -> str:
    return f"[{shown(ends.low)}, {shown(ends.high)}]"


def _side(found: Difference) -> str:
    return "above" if found.mean.value > 0 else "below" if found.mean.value < 0 else "level with"


def _yet(found: Difference) -> str:
    """Say where equivalent arms differ all the same."""
    if found.adjusted.low > 0:
        return ", though above 0"
    return ", though below 0" if found.adjusted.high < 0 else ""


def shown(value: float | None) -> str:
    """Write a number to three digits; a missing one as a dash."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
