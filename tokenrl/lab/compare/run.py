"""Runs a comparison from its plan to its report, or judges runs that exist."""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from tokenrl.errors import Refused
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.comparison import Comparison, judge_runs, write_tables
from tokenrl.lab.compare.execution import command, execute
from tokenrl.lab.compare.page import facts_of, write_comparison
from tokenrl.lab.compare.paired import LEAST_PAIRS, detectable_difference
from tokenrl.lab.compare.plan import Plan, Problem, Run, read_plan, settle_plan, write_plan
from tokenrl.lab.compare.planning import make_plan
from tokenrl.lab.compare.scores import RunTable, is_done, read_runs
from tokenrl.lab.compare.tuning import FACTORS, tune
from tokenrl.runs.console import Console, duration, number, rich_table
from tokenrl.runs.reader import read_run
from tokenrl.settings import called

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
    args = called(CompareArguments, args, with_shared(options) if options else {})
    console, root = Console(quiet=args.quiet), Path(args.output_dir)
    plan = make_plan(args, console.note, _command())
    plan = settle_plan(plan, root, overwrite=args.overwrite and not args.dry_run)
    expected = _expected(plan)
    if args.dry_run:
        seconds = {problem.label: _seconds(plan, problem) for problem in plan.problems if not plan.existing}
        _show_plan(plan, {**expected, "seconds": seconds}, console)
        return plan
    write_plan(plan, root, expected)
    _show_plan(plan, expected, console)

    def make(runs: Sequence[Run]) -> None:
        left = [run for run in runs if not plan.existing and not is_done(run, root)]
        if left and args.print_commands:
            print(*(command(plan, run, root) for run in left), sep="\n")
            raise _Printed
        if left:
            execute(plan, left, root, executor=args.executor, workers=args.workers, console=console)

    try:
        found = _judged(plan, root, make)
    except _Printed:
        return plan
    write_tables(found)
    write_comparison(found)
    _show(found, console)
    return found


class _Printed(Exception):
    """The commands of runs that are not done yet were printed, and nothing more can be done without them."""


def judge_directory(output_dir: str | Path) -> Comparison:
    """Judge the runs that a comparison has made so far, without making any.

    Args:
        output_dir: the directory of the comparison.

    Raises:
        Refused: the plan or a run is damaged.
        Stopped: nothing can be judged yet.
    """
    root = Path(output_dir)
    return _judged(read_plan(root), root, lambda runs: None)


def report_comparison(output_dir: str | Path) -> Path:
    """Judge again the runs that a comparison has made so far, and write its tables and its report.

    Returns:
        The report. The arguments and errors are those of `judge_directory`.
    """
    found = judge_directory(output_dir)
    write_tables(found)
    return write_comparison(found)


def _judged(plan: Plan, root: Path, make: Callable[[Sequence[Run]], None]) -> Comparison:
    """Choose learning rates, if they are tuned, then make, read and judge all runs."""
    tables: list[RunTable] = []

    def work(runs: Sequence[Run]) -> pd.DataFrame:
        make(runs)
        tables.append(read_runs(runs, root, plan.problems, plan.failure_below))
        return tables[-1].runs

    work(plan.runs(tune(plan, work) if plan.tuning_seeds else {}))
    return judge_runs(
        root, plan, RunTable(*(pd.concat(of, ignore_index=True) for of in zip(*tables, strict=True)))
    )


def _expected(plan: Plan) -> dict[str, Any]:
    """Return what may be expected: the number of runs, and the smallest difference that they can show.

    That difference is a multiple of the standard deviation of a paired difference; None with too few pairs.
    """
    pairs = len(plan.seeds)
    found = detectable_difference(pairs, 1.0, plan.comparisons) if pairs >= LEAST_PAIRS else None
    tried = sum(math.ceil(len(FACTORS) / 2**place) for place in range(len(plan.tuning_seeds)))
    tuning = tried * len(plan.problems) * len(plan.arms)
    return {"runs": len(plan.runs()), "tuning_runs": tuning, "detectable": found}


def _seconds(plan: Plan, problem: Problem) -> float:
    """Time a short run of the reference: the seconds of a whole run follow from its steps and evaluations."""
    (arm,) = (arm for arm in plan.arms if arm.label == plan.reference)
    few = {"eval_every": 0, **({"max_steps": TIMED_STEPS} if plan.kind == "control" else {})}
    short = replace(problem, budget=TIMED_STEPS * problem.per_step, settings={**problem.settings, **few})
    run = plan.run(short, arm, plan.seeds[0])
    with tempfile.TemporaryDirectory() as folder:
        execute(replace(plan, problems=(short,)), [run], Path(folder), console=Console(quiet=True))
        if not is_done(run, Path(folder)):
            reason = read_runs([run], Path(folder), [short], None).runs["reason"][0]
            raise Refused(f"A few steps of {arm.label} on {problem.label} were tried, and failed: {reason}")
        timed = read_run(Path(folder, run.path))
        steps = [row["step_seconds"] for row in timed.timings if "step_seconds" in row]
    evaluation = max(0.0, (timed.summary["wall_seconds"] - sum(steps)) / 2)
    count = problem.budget / problem.per_step
    return float(count * median(steps[2:] or steps) + (1 + len(problem.places)) * evaluation)


def _show_plan(plan: Plan, expected: Mapping[str, Any], console: Console) -> None:
    """Print what will be compared, at what cost, and how small a difference it can show."""
    can_show = f"{len(plan.seeds)} pairs are too few for a verdict; give {LEAST_PAIRS} seeds or more"
    if expected["detectable"] is not None:
        low, high = (expected["detectable"] * spread for spread in SPREAD)
        can_show = (
            f"with a power of 80 % a difference of {expected['detectable']:.2g} standard deviations of "
        )
        can_show += (
            f"a paired difference; on the toy tasks about {low:.2g} to {high:.2g} of the reward's range"
        )
    tuning = f" and about {expected['tuning_runs']} for tuning" * bool(plan.tuning_seeds)
    facts = {**facts_of(plan), "runs": f"{expected['runs']}{tuning}", "can show": can_show}
    for label, seconds in expected.get("seconds", {}).items():
        facts[f"a run on {label}"] = f"about {duration(seconds)} on one processor"
    console.start("tokenrl compare", facts, note=NOTE)


def _show(found: Comparison, console: Console) -> None:
    """Print the scores and the verdict of each problem, what they do not mean, and where the report is."""
    for family in found.judgement.families:
        title = f"{family.problem}: {found.plan.metric}, mean over the seeds that did not fail"
        columns = ("failed", "score", f"against {family.reference}", "verdict")
        table = rich_table(title, ("arm",), columns)
        for arm in family.arms:
            one = family.against_reference.get(arm.arm)
            judged = (one.apart, one.verdict) if one else ("", "reference")
            table.add_row(arm.arm, arm.count, number(arm.mean), *judged)
        console.rich.print(table)
        console.note(found.headline(family.problem))
        for text in (*family.sentences(), *(caveat.text for caveat in found.caveats[family.problem])):
            console.note(f"- {text}")
    for run in found.table.runs.query("failed").itertuples():
        console.warn(f"{run.problem}: {run.arm}, seed {run.seed}, failed: {run.reason}")
    console.note(f"report  {found.output_dir / 'report.html'}")


def _command() -> str:
    """Return the command that was typed; empty in a Python program."""
    program = Path(sys.argv[0])
    typed = program.stem == "tokenrl" or (program.name == "__main__.py" and program.parent.name == "tokenrl")
    return shlex.join(["tokenrl", *sys.argv[1:]]) if typed else ""
