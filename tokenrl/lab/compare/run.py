"""Runs a comparison: as long as the plan has runs that are missing, they are made; then all are judged."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tokenrl.errors import Refused
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.comparison import Comparison, judge_runs
from tokenrl.lab.compare.execution import execute, print_commands
from tokenrl.lab.compare.page import write_comparison
from tokenrl.lab.compare.plan import Plan, Problem, continue_plan, lock_plan, read_plan, write_plan
from tokenrl.lab.compare.planning import make_plan
from tokenrl.lab.compare.schedule import missing
from tokenrl.lab.compare.scores import RunTable, is_done, read_runs
from tokenrl.runs.console import Console, duration, number, rich_table
from tokenrl.runs.reader import read_run
from tokenrl.settings import arguments_of_call

TIMED_STEPS = 6
"""Steps of the run that is timed; the first two are left out, because they are slower than later ones."""
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
    args = arguments_of_call(CompareArguments, args, with_shared(options) if options else {})
    console, root = Console(quiet=args.quiet), Path(args.output_dir)
    plan = make_plan(args, console.note)
    if args.dry_run:
        plan = continue_plan(plan, root, overwrite=False)
        times = {f"a run on {problem.label}": _forecast(plan, problem) for problem in plan.problems}
        console.start("tokenrl compare", plan.in_words() | times, note=NOTE)
        return plan
    lock, rows = lock_plan(root), list[dict[str, Any]]()
    try:
        plan = continue_plan(plan, root, overwrite=args.overwrite)
        write_plan(plan, root)
        console.start("tokenrl compare", plan.in_words(), note=NOTE)
        while runs := missing(plan, rows):
            unmade = [run for run in runs if not is_done(run, root)]
            if unmade and args.print_commands:
                print_commands(unmade, root)
                return plan
            execute(unmade, root, executor=args.executor, workers=args.workers, console=console)
            rows += read_runs(plan, runs, root)
        comparison = judge_runs(root, plan, RunTable.of_rows(rows))
        write_comparison(comparison)
    finally:
        lock.release()
    _show(comparison, console)
    return comparison


def judge_directory(output_dir: str | Path) -> Comparison:
    """Judge the runs that a comparison has made so far, without making any.

    Args:
        output_dir: the directory of the comparison.

    Raises:
        Refused: the plan or a run is damaged.
        Stopped: nothing can be judged yet.
    """
    root, rows = Path(output_dir), list[dict[str, Any]]()
    plan = read_plan(root)
    while runs := missing(plan, rows):
        rows += read_runs(plan, runs, root)
    return judge_runs(root, plan, RunTable.of_rows(rows))


def report_comparison(output_dir: str | Path) -> Path:
    """Judge again the runs that a comparison has made so far, and write its tables and its report.

    Returns:
        The report. The arguments and errors are those of `judge_directory`.
    """
    return write_comparison(judge_directory(output_dir))


def _forecast(plan: Plan, problem: Problem) -> str:
    """Say how long a run takes, from the steps and the evaluations of a short run of the reference."""
    (arm,) = (arm for arm in plan.arms if arm.label == plan.reference)
    run, samples = plan.run(problem, arm, plan.seeds[0]), TIMED_STEPS * problem.per_step
    limit = {"max_steps": TIMED_STEPS} if run.kind == "control" else {"max_samples": samples}
    run = replace(run, settings={**run.settings, "eval_every": 0, **limit})
    with tempfile.TemporaryDirectory() as folder:
        execute([run], Path(folder), console=Console(quiet=True))
        (row,) = read_runs(plan, [run], Path(folder))
        if row["state"] != "finished":
            tried = f"A few steps of {arm.label} on {problem.label} were tried"
            raise Refused(f"{tried}, and failed: {row['reason']}")
        recorded = read_run(Path(folder, run.path))
        steps = [timing["step_seconds"] for timing in recorded.timings if "step_seconds" in timing]
    evaluation = max(0.0, (recorded.summary["wall_seconds"] - sum(steps)) / 2)
    seconds = problem.budget / problem.per_step * median(steps[2:] or steps)
    return f"about {duration(seconds + (1 + len(problem.places)) * evaluation)} on one processor"


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
