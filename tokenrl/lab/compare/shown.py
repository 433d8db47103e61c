"""Prints the plan of a comparison and what it found."""

from __future__ import annotations

from collections.abc import Sequence

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.expectation import Expectation
from tokenrl.lab.compare.records import Plan, Problem
from tokenrl.lab.compare.scores import SCORES
from tokenrl.lab.compare.statistics.found import Family
from tokenrl.lab.compare.statistics.paired import LEAST_PAIRS
from tokenrl.lab.compare.statistics.words import sentence
from tokenrl.runs.checkup import time_needed
from tokenrl.runs.console import Console, number, rich_table

NOTE = "Each run is an ordinary run directory; killed and started again, the same command goes on."
SPREAD = (0.002, 0.011)
"""Least and greatest standard deviation of a paired difference in a pilot on the toy tasks, for area."""


def show_plan(plan: Plan, expected: Expectation, console: Console) -> None:
    """Print what will be compared, at what cost, and how small a difference it can show."""
    arms = ", ".join(f"{arm.label} ({arm.bias})" + " *" * arm.exploratory for arm in plan.arms)
    facts = {
        "arms": arms,
        "reference": plan.reference,
        **{f"on {p.label}": _budget(plan, p) for p in plan.problems},
        "seeds": f"{span(plan.seeds)}" + _other_seeds(plan),
        "learning rate": _rates(plan),
        "metric": f"{plan.metric}: {SCORES[plan.metric].words}",
        "runs": f"{expected.runs}"
        + f" and about {expected.tuning_runs} for tuning" * bool(expected.tuning_runs),
        "can show": _can_show(plan, expected),
    }
    if expected.total_seconds is not None:
        facts["time"] = f"{time_needed(expected.total_seconds, expected.total_seconds)} in all"
    if plan.changes:
        facts["exploratory"] = "; ".join(plan.changes)
    console.start("tokenrl compare", facts, note=NOTE)


def _budget(plan: Plan, problem: Problem) -> str:
    margin = plan.margins[problem.label]
    shape = f"{problem.budget:,} {problem.unit} a run, learning rate {problem.learning_rate:g}"
    return f"{shape}, " + ("no margin of equivalence" if margin is None else f"margin {margin:g}")


def span(seeds: Sequence[int]) -> str:
    """Return the first and the last of seeds that follow one another, in words."""
    return f"{seeds[0]} to {seeds[-1]}"


def _other_seeds(plan: Plan) -> str:
    other = {"the reference against itself": plan.itself_seeds, "tuning": plan.tuning_seeds}
    return "".join(f"; {span(seeds)} for {what}" for what, seeds in other.items() if seeds)


def _rates(plan: Plan) -> str:
    if not plan.tuning_seeds:
        return "the same for all arms"
    factors = ", ".join(f"{factor:g}" for factor in plan.rates)
    return f"for each arm the best of {factors} times the recommended one, by successive halving"


def _can_show(plan: Plan, expected: Expectation) -> str:
    if expected.detectable is None:
        return f"{len(plan.seeds)} pairs are too few for a verdict; give {LEAST_PAIRS} seeds or more"
    low, high = (expected.detectable * spread for spread in SPREAD)
    return (
        f"with a power of 80 % a difference of {expected.detectable:.2g} standard deviations of a paired "
        f"difference; on the toy tasks that is about {low:.2g} to {high:.2g} of the range of the reward"
    )


def show_comparison(found: Comparison, console: Console) -> None:
    """Print the scores and the verdict of each problem, and where the report is."""
    for family in found.judgement.families:
        console.rich.print(_table(found, family))
        for difference in family.differences:
            console.note(sentence(difference, family.margin))
        for text in found.findings.get(family.problem, ()):
            console.note(f"- {text}")
    failed = [r for r in found.records if r.state == "failed"]
    for record in failed:
        console.warn(f"{record.run.arm}, seed {record.run.seed}, failed: {record.reason}")
    console.note(f"report  {found.output_dir / 'report.html'}")


def _table(found: Comparison, family: Family) -> object:
    title = f"{family.problem}: {found.plan.metric}, mean and 95 % interval over seeds"
    table = rich_table(title, ("arm",), ("seeds", "score", "against " + family.reference, "verdict"))
    by_arm = {difference.arm: difference for difference in family.differences}
    for arm in family.arms:
        score, d = arm.mean, by_arm.get(arm.arm)
        apart = "" if d is None else f"{d.mean.value:+.3g} [{d.adjusted.low:.3g}, {d.adjusted.high:.3g}]"
        row = (arm.arm, str(len(arm.scores)), f"{number(score.value)} [{score.low:.3g}, {score.high:.3g}]")
        table.add_row(*row, apart, "reference" if d is None else d.verdict)
    return table
