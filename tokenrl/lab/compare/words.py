"""Says in plain words what a paired difference shows, and never more than that."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenrl.lab.compare.judgement import ArmScores, Difference, Family, Verdict
from tokenrl.lab.compare.paired import LEAST_PAIRS, Interval
from tokenrl.lab.compare.plan import Plan
from tokenrl.lab.compare.scores import SCORES

WHOLE: dict[Verdict, str] = {
    "better": "Better than {other}: {arms}.",
    "worse": "Worse than {other}: {arms}.",
    "equivalent": "Equivalent to {other} within {margin}: {arms}.",
    "undecided": "Undecided against {other}: {arms}.",
    "descriptive": "No verdict, because there are too few seeds: {arms} against {other}.",
    "void": "Not valid, so not compared with {other}: {arms}.",
}
"""All verdicts, with the words for the arms that they are given to."""


def headline(family: Family, qualified: Sequence[str] = ()) -> str:
    """Return all verdicts against the reference in a sentence or two, with what qualifies them.

    Args:
        family: the comparisons on one problem.
        qualified: what qualifies the verdicts, in a few words each, such as "every arm ends at the ceiling".
    """
    by_verdict: dict[Verdict, list[str]] = {}
    for one in family.differences:
        if one.reference == family.reference:
            by_verdict.setdefault(one.verdict, []).append(one.arm)
    said = [
        words.format(arms=listed(by_verdict[verdict]), other=family.reference, margin=shown(family.margin))
        for verdict, words in WHOLE.items()
        if verdict in by_verdict
    ]
    failing = [f"{arm.arm} in {_count(arm)}" for arm in family.arms if arm.failed]
    if failing:
        said.append(f"Runs failed: {listed(failing)}.")
    return " ".join([*said, f"But {listed(qualified)}." if qualified else ""]).strip()


def sentence(found: Difference, family: Family) -> str:
    """Return the verdict of a difference in two parts: runs that did not fail, and failures.

    Seeds that only one of the two arms has are named.

    Args:
        found: the difference.
        family: the comparisons on its problem.
    """
    arms = family.arm(found.arm), family.arm(found.reference)
    return " ".join(filter(None, [_verdict(found, family), _failures(found, *arms), _left_out(found)]))


def _verdict(found: Difference, family: Family) -> str:
    arm, other, pairs = found.arm, found.reference, len(found.differences)
    by = f"{shown(abs(found.mean.value))} {_span(found)}"
    if found.verdict == "void":
        return f"{arm} and {other} cannot be compared: one of them is not valid."
    if found.verdict == "descriptive":
        side = "above" if found.mean.value > 0 else "below" if found.mean.value < 0 else "level with"
        few = "1 pair is" if pairs == 1 else f"{pairs} pairs are"
        lies = f"{arm} lies {side} {other}, by {by}; " if pairs else ""
        needed = max(LEAST_PAIRS, found.seeds_needed or 0)
        return f"{lies}{few} too few for a verdict, which needs {needed:,} seeds or more."
    if found.verdict == "undecided":
        return f"{arm} against {other} is undecided: {_why_undecided(found)}."
    if found.verdict == "equivalent":
        yet = (
            ", though above 0"
            if found.adjusted.low > 0
            else ", though below 0"
            if found.adjusted.high < 0
            else ""
        )
        return (
            f"{arm} and {other} are equivalent: the difference, {signed(found)}, is smaller than the margin "
            f"of {shown(family.margin)}{yet}."
        )
    if found.failures_decide:
        return f"{arm} is {found.verdict} than {other}, because it fails {_more(found, family)} often."
    return f"{arm} is {found.verdict} than {other} by {by}."


def _why_undecided(found: Difference) -> str:
    if found.failures_decide:
        return f"one fails more often, and the other is worse where neither fails, {signed(found)}"
    if not found.adjusted.low < found.adjusted.high:
        return f"all differences are {shown(found.mean.value)}, which says nothing of how they vary"
    needed = found.seeds_needed
    more = (
        f"at least {needed:,} seeds would be needed" if needed else "no number of seeds up to 10,000 would do"
    )
    return f"the difference, {signed(found)}, may be of either sign; {more}"


def _more(found: Difference, family: Family) -> str:
    arm, other = (family.arm(label).failures.value for label in (found.arm, found.reference))
    return "more" if arm > other else "less"


def _failures(found: Difference, arm: ArmScores, other: ArmScores) -> str:
    """Say how many runs of both failed, and what is not excluded."""
    if not arm.failed and not other.failed:
        most = max(arm.failures.high, other.failures.high)
        return f"No run of either failed, which does not exclude that up to {most:.0%} would."
    each = [f"{_count(one)} of {one.arm} failed {_percent(one.failures)}" for one in (arm, other)]
    return f"{' and '.join(each)}, p = {shown(found.p_failures)}; the difference is that of the others."


def _count(arm: ArmScores) -> str:
    return f"{len(arm.failed)} of {len(arm.failed) + len(arm.scores)} runs"


def _percent(found: Interval) -> str:
    return f"[{found.low:.0%}, {found.high:.0%}]"


def _left_out(found: Difference) -> str:
    if not found.unpaired:
        return ""
    one = len(found.unpaired) == 1
    seeds = f"Seed{'s' * (not one)} {listed([str(seed) for seed in found.unpaired])}"
    return f"{seeds} {'is' if one else 'are'} left out: only one of the two has {'it' if one else 'them'}."


def _span(found: Difference) -> str:
    """Return the interval of the size of a difference, at the level that decides."""
    low, high = found.adjusted.low, found.adjusted.high
    if high < 0:
        low, high = -high, -low
    return f"[{shown(low)}, {shown(high)}]"


def signed(found: Difference) -> str:
    """Return a mean difference with its sign and the interval that decides, such as +0.14 [0.12, 0.17]."""
    return f"{found.mean.value:+.3g} [{shown(found.adjusted.low)}, {shown(found.adjusted.high)}]"


def facts_of(plan: Plan) -> dict[str, str]:
    """Say what is compared on which budget and seeds, by heading, for the console and the page."""
    other = {"the reference against itself": plan.itself_seeds, "tuning": plan.tuning_seeds}
    named = [f"{seeds[0]} to {seeds[-1]} for {what}" for what, seeds in other.items() if seeds]
    rates = ", ".join(f"{factor:g}" for factor in plan.rates)
    tuned = f"for each arm the best of {rates} times the recommended one, by successive halving"
    budgets = {}
    for problem in plan.problems:
        shape = f"{problem.budget:,} {problem.unit} a run, learning rate {problem.learning_rate:g}"
        margin = plan.margins[problem.label]
        budgets[f"on {problem.label}"] = f"{shape}, margin {'none' if margin is None else f'{margin:g}'}"
    return {
        "arms": ", ".join(f"{arm.label} ({arm.bias})" + " *" * arm.exploratory for arm in plan.arms),
        "reference": plan.reference,
        "metric": f"{plan.metric}: {SCORES[plan.metric]}",
        **budgets,
        "seeds": "; ".join([f"{plan.seeds[0]} to {plan.seeds[-1]}", *named]),
        "learning rate": tuned if plan.tuning_seeds else "the same for all arms that name no other",
    }


def listed(names: Sequence[str]) -> str:
    """Join names with commas and a last `and`."""
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def shown(value: float | None) -> str:
    """Write a number to three digits; a missing one as a dash."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
