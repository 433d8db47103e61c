"""Runs a comparison from its plan to its report, or judges runs that exist."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from tokenrl.errors import Refused
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.comparison import Comparison, judge_runs, write_tables
from tokenrl.lab.compare.execution import command, execute
from tokenrl.lab.compare.existing import plan_of_runs
from tokenrl.lab.compare.page import write_comparison
from tokenrl.lab.compare.paired import LEAST_PAIRS, detectable_difference
from tokenrl.lab.compare.plan import Plan, PlannedRun, Problem, read_plan, settle_plan, write_plan
from tokenrl.lab.compare.planning import make_plan
from tokenrl.lab.compare.scores import RunTable, is_done, read_runs
from tokenrl.lab.compare.tuning import chosen_rates, tune
from tokenrl.lab.compare.words import facts_of
from tokenrl.runs.console import Console, duration, number, rich_table
from tokenrl.runs.reader import read_run
from tokenrl.settings import arguments, field_types

TIMED_STEPS = 6
"""Steps of the run that is timed; the first two are left out, because they are slower than later ones."""
SPREAD = (0.002, 0.011)
"""Least and greatest standard deviation of a paired difference in a pilot on the toy tasks, for area."""
NOTE = "Each run is an ordinary run directory; killed and started again, the same command goes on."


def compare(args: CompareArguments | None = None, **options: Any) -> Comparison | Plan:
    """Compare baselines, or other settings, over seeds; the keywords are the fields of `CompareArguments`.

    Every other keyword is a setting of `train` (with `env`: of `train_agent`) that all runs share. Runs take
    place in other processes, so tasks, rewards, models and baselines are given by their names.

    Args:
        args: all arguments at once, instead of keywords.
        **options: the fields of `CompareArguments`, and settings that all runs share.

    Returns:
        What was found; its directory holds the same in files, with a report. With `dry_run` or
        `print_commands` the plan.

    Raises:
        Refused: an argument cannot be used; raised before anything is run.
        Stopped: a signal ended the comparison; the same call goes on with it.

    Example:
        >>> import tokenrl
        >>> found = tokenrl.compare(task="sort_digits", arms=("reinforce", "rloo"), seeds=6, max_steps=100)
        >>> found.judgement.verdicts()
    """
    args = _arguments(args, options)
    console, output_dir = Console(quiet=args.quiet), Path(args.output_dir)
    plan = plan_of_runs(args, _command()) if args.runs else make_plan(args, console.note, _command())
    plan = settle_plan(plan, output_dir, overwrite=args.overwrite and not args.dry_run)
    expected = _expected(plan)
    if args.dry_run:
        seconds = {p.label: _seconds(plan, p) for p in plan.problems if not plan.existing}
        _show_plan(plan, {**expected, "seconds": seconds}, console)
        return plan
    write_plan(plan, output_dir, expected)
    _show_plan(plan, expected, console)
    try:
        make = partial(_make, args, output_dir, console)
        found = _judged(plan, output_dir, (lambda runs: None) if plan.existing else make)
    except _Printed:
        return plan
    _write(found)
    _show(found, console)
    return found


def judge_directory(output_dir: str | Path) -> Comparison:
    """Judge the runs that a comparison has made so far, without making any.

    Args:
        output_dir: the directory of the comparison.

    Raises:
        Refused: the plan or a run is damaged.
        Stopped: nothing can be judged yet.
    """
    plan, root = read_plan(Path(output_dir)), Path(output_dir)
    return _judged(plan, root, lambda runs: None)


def report_comparison(output_dir: str | Path) -> Path:
    """Judge again the runs that a comparison has made so far, and write its tables and its report.

    Returns:
        The report. The arguments and errors are those of `judge_directory`.
    """
    return _write(judge_directory(output_dir))


class _Printed(Exception):
    """The commands of runs that are not done yet were printed, and nothing more can be done without them."""


def _make(args: CompareArguments, output_dir: Path, console: Console, runs: Sequence[PlannedRun]) -> None:
    """Make the runs that are not done, or print their commands.

    Raises:
        _Printed: some runs are not done, and their commands were to be printed.
    """
    left = [run for run in runs if not is_done(run, output_dir)]
    if left and args.print_commands:
        print(*(command(run, output_dir) for run in left), sep="\n")
        raise _Printed
    if left:
        execute(left, output_dir, executor=args.executor, workers=args.workers, console=console)


def _judged(plan: Plan, output_dir: Path, make: Callable[[Sequence[PlannedRun]], None]) -> Comparison:
    """Choose learning rates, if they are tuned, then make, read and judge all runs."""
    tables: list[RunTable] = []

    def work(runs: Sequence[PlannedRun]) -> pd.DataFrame:
        make(runs)
        tables.append(read_runs(runs, output_dir, plan.problems, plan.failure_below))
        return tables[-1].runs

    sensitivity = tune(plan, work) if plan.tuning_seeds else {}
    work(plan.runs(chosen_rates(sensitivity)))
    runs, curves = (pd.concat([getattr(t, n) for t in tables], ignore_index=True) for n in ("runs", "curves"))
    return judge_runs(output_dir, plan, RunTable(runs, curves), sensitivity)


def _write(found: Comparison) -> Path:
    write_tables(found)
    return write_comparison(found)


def _expected(plan: Plan) -> dict[str, Any]:
    """Return what may be expected: the number of runs, and the smallest difference that they can show.

    That difference is a multiple of the standard deviation of a paired difference; None with too few pairs.
    """
    tuning, left = 0, len(plan.rates)
    for _ in plan.tuning_seeds:
        tuning, left = tuning + left, -(-left // 2)
    pairs = len(plan.seeds)
    found = detectable_difference(pairs, 1.0, plan.comparisons) if pairs >= LEAST_PAIRS else None
    places = len(plan.problems) * len(plan.arms)
    return {"runs": len(plan.runs()), "tuning_runs": tuning * places, "detectable": found}


def _seconds(plan: Plan, problem: Problem) -> float:
    """Time a short run of the reference: the seconds of a whole run follow from its steps and evaluations."""
    arm = next(arm for arm in plan.arms if arm.label == plan.reference)
    run = plan.run(problem, arm, plan.seeds[0])
    length = (
        {"max_samples": TIMED_STEPS * problem.per_step}
        if problem.kind == "train"
        else {"max_steps": TIMED_STEPS}
    )
    short = replace(run, path="run", settings={**run.settings, **length, "eval_every": 0})
    with tempfile.TemporaryDirectory() as folder:
        execute([short], Path(folder), console=Console(quiet=True))
        if not is_done(short, Path(folder)):
            reason = read_runs([short], Path(folder), [problem], None).runs["reason"][0]
            raise Refused(f"A few steps of {arm.label} on {problem.label} were tried, and failed: {reason}")
        timed = read_run(Path(folder, "run"))
    steps = [row["step_seconds"] for row in timed.timings if "step_seconds" in row]
    evaluation = max(0.0, (timed.summary["wall_seconds"] - sum(steps)) / 2)
    count = problem.budget / problem.per_step
    return float(count * median(steps[2:] or steps) + (1 + len(problem.places)) * evaluation)


def _show_plan(plan: Plan, expected: Mapping[str, Any], console: Console) -> None:
    """Print what will be compared, at what cost, and how small a difference it can show."""
    detectable = expected["detectable"]
    can_show = f"{len(plan.seeds)} pairs are too few for a verdict; give {LEAST_PAIRS} seeds or more"
    if detectable is not None:
        low, high = (detectable * spread for spread in SPREAD)
        can_show = (
            f"with a power of 80 % a difference of {detectable:.2g} standard deviations of a paired "
            f"difference; on the toy tasks that is about {low:.2g} to {high:.2g} of the range of the reward"
        )
    tuning = f" and about {expected['tuning_runs']} for tuning" * bool(plan.tuning_seeds)
    facts = {**facts_of(plan), "runs": f"{expected['runs']}{tuning}", "can show": can_show}
    for label, seconds in expected.get("seconds", {}).items():
        facts[f"a run on {label}"] = f"about {duration(seconds)} on one processor"
    if plan.changes:
        facts["exploratory"] = "; ".join(plan.changes)
    console.start("tokenrl compare", facts, note=NOTE)


def _show(found: Comparison, console: Console) -> None:
    """Print the scores and the verdict of each problem, what they do not mean, and where the report is."""
    for family in found.judgement.families:
        title = f"{family.problem}: {found.plan.metric}, mean over the seeds that did not fail"
        table = rich_table(
            title, ("arm",), ("seeds", "failed", "score", "against " + family.reference, "verdict")
        )
        by_arm = {d.arm: d for d in family.differences if d.reference == family.reference}
        for arm in family.arms:
            d = by_arm.get(arm.arm)
            apart = "" if d is None else f"{d.mean.value:+.3g} [{d.adjusted.low:.3g}, {d.adjusted.high:.3g}]"
            verdict = "reference" if d is None else d.verdict
            counts = str(len(arm.scores) + len(arm.failed)), str(len(arm.failed))
            table.add_row(arm.arm, *counts, number(arm.mean), apart, verdict)
        console.rich.print(table)
        console.note(found.headline(family.problem))
        for text in found.sentences(family.problem):
            console.note(f"- {text}")
        for caveat in found.caveats[family.problem]:
            console.note(f"- {caveat.text}")
    runs = found.table.runs
    for run in runs[runs["failed"]].itertuples():
        console.warn(f"{run.problem}: {run.arm}, seed {run.seed}, failed: {run.reason}")
    console.note(f"report  {found.output_dir / 'report.html'}")


def _arguments(args: CompareArguments | None, options: Mapping[str, Any]) -> CompareArguments:
    """Return the arguments of a call, in which keywords of the runs are put under `shared`."""
    own = field_types(CompareArguments)
    shared = {name: value for name, value in options.items() if name not in own}
    rest = {name: value for name, value in options.items() if name in own}
    if args is not None:
        if options:
            raise Refused(
                "args holds all settings, so keywords beside it would be lost; give one of the two."
            )
        return args
    rates = rest.get("learning_rate", ())
    if not isinstance(rates, str):  # numbers are text on the command line
        several = rates if isinstance(rates, list | tuple) else (rates,)
        rest |= {"learning_rate": tuple(map(str, several))} if several else {}
    return arguments(CompareArguments, {**rest, "shared": {**rest.get("shared", {}), **shared}})


def _command() -> str:
    """Return the command that was typed; empty in a Python program."""
    program = Path(sys.argv[0])
    typed = program.stem == "tokenrl" or (program.name == "__main__.py" and program.parent.name == "tokenrl")
    return shlex.join(["tokenrl", *sys.argv[1:]]) if typed else ""
