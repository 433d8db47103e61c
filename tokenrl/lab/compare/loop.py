"""Runs a comparison: makes the runs that choose learning rates, then those that are compared, and judges them.

An arm with several learning rates tries each of them on every tuning seed, which the comparison does not use. The
rate with the best mean score wins. Each run has the whole budget, because a rate that is best for a short run is
not best for a long one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from tokenrl.keywords import arguments_of_call, takes
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.comparison import Comparison, judge_runs
from tokenrl.lab.compare.execution import collect, execute
from tokenrl.lab.compare.judgement import Requirement, required
from tokenrl.lab.compare.page import record, write_comparison
from tokenrl.lab.compare.plan import (
    Plan,
    PlannedRun,
    check_plan,
    folder_of,
    read_plan,
    start_plan,
)
from tokenrl.lab.compare.problems import make_plan
from tokenrl.lab.compare.table import read_runs
from tokenrl.runs.console import Console
from tokenrl.runs.directory import directory_path
from tokenrl.runs.files import write_json
from tokenrl.runs.output import number, rich_table

NOTE = "Each run has an ordinary run directory. If this is stopped or killed, the same command continues it."


@takes(CompareArguments)
def compare(args: CompareArguments | None = None, **options: Any) -> Comparison | Plan:
    """Compare baselines, or other settings, over seeds; the keywords are the fields of `CompareArguments`.

    Every other keyword is a setting of `train` (with `env`: of `train_agent`) that all runs share. Runs take
    place in other processes, so tasks, rewards, models and baselines are given by their names.

    Args:
        args: all arguments at once, instead of keywords.
        **options: the fields of `CompareArguments`, and settings that all runs share.

    Returns:
        The result; its directory holds the same in files, with a report. With `dry_run` the plan.

    Raises:
        Refused: an argument cannot be used, or several tasks are given; raised before anything is run.
        Interrupted: a signal ended the comparison; the same call goes on with it.
        Stopped: no run has a score, so that nothing can be judged.

    Example:
        >>> import tokenrl
        >>> result = tokenrl.compare(task="sort_digits", arms=("reinforce", "rloo"), seeds=6, max_steps=100)
        >>> result.judgement.verdicts()
    """
    args = arguments_of_call(CompareArguments, args, with_shared(options) if options else {})
    requirement_of(args)
    console = Console(quiet=args.quiet)
    root = directory_path(args.output_dir)
    plan = make_plan(args, console.note)
    if args.dry_run:
        check_plan(plan, root)
        console.start("tokenrl compare", plan.describe(), note=NOTE)
        return plan
    lock = start_plan(plan, root)

    def make(runs: Sequence[PlannedRun]) -> None:
        """Make the runs that have not ended."""
        collect(plan, runs, args.collect, root, console.note)
        read_runs(plan, runs, root)  # refuses what cannot be compared before more is made
        execute(runs, root, executor=args.executor, workers=args.workers, console=console)

    try:
        console.start("tokenrl compare", plan.describe(), note=NOTE)
        comparison = _judged(root, plan, make)
        write_comparison(comparison)
        if args.json:
            write_json(Path(args.json), record(comparison))
    finally:
        lock.release()
    _print_result(comparison, console)
    return comparison


def compare_each(args: CompareArguments) -> int:
    """Compare on each task or environment, each of several in a directory of its own; return the exit code.

    All are planned before the first is run, so that what cannot work is refused then.
    """
    requirement = requirement_of(args)
    kind = "env" if args.env else "task"
    names = getattr(args, kind)
    parts = [args]
    if len(names) > 1:
        changes: list[dict[str, Any]] = [
            {kind: (name,), "output_dir": f"{args.output_dir}/{folder_of(name)}"} for name in names
        ]
        parts = [replace(args, **of_one) for of_one in changes]
        for part in () if args.dry_run else parts:
            compare(replace(part, dry_run=True, quiet=True))
    codes = [0]
    for part in parts:
        result = compare(part)
        if isinstance(result, Comparison):
            codes += [result.exit_code, requirement.exit_code(result.family)]
    return max(codes)


def requirement_of(args: CompareArguments) -> Requirement:
    """Return what `require` asks for; see `required`."""
    return required(
        args.require, [arm for arm in args.arms if arm != (args.reference or args.arms[0])]
    )


def _judged(
    root: Path, plan: Plan, make: Callable[[Sequence[PlannedRun]], None] = lambda runs: None
) -> Comparison:
    """Choose the learning rates of the arms, and judge the runs at these rates, look by look.

    All runs so far are read at each look, so that those of a later one are compared with those of the earlier ones.
    """
    begun = plan.tuning_runs()
    if begun:
        make(begun)
    runs = plan.runs(best_rates(read_runs(plan, begun, root), plan.metric))
    undecided = {arm.label for arm in plan.arms}
    judged = 0
    for look in plan.looks:
        seeds = plan.seeds[judged:look]
        if new := [run for run in runs if run.seed in seeds and run.arm in undecided]:
            begun += new
            make(begun)
        comparison = judge_runs(root, plan, pd.DataFrame(read_runs(plan, begun, root)))
        undecided = comparison.family.undecided
        judged = look
    return comparison


def best_rates(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Return by arm the learning rate with the best mean score; of equal rates the smallest.

    A run that failed keeps the score that it had at its end, so a rate that destroys the policy is a bad rate and
    not a missing one. A run without a score is the worst.

    Args:
        rows: a row for each tuning run.
        metric: name of the score.
    """
    if not rows:
        return {}
    scores = pd.DataFrame(rows).fillna({metric: -math.inf})
    means = scores.groupby(["arm", "learning_rate"])[metric].mean()
    return dict(means.groupby(level="arm").idxmax().to_list())


def judge_directory(output_dir: str | Path) -> Comparison:
    """Judge the runs that a comparison has made so far, without making any.

    Args:
        output_dir: the directory of the comparison.

    Raises:
        Refused: the plan or a run is damaged.
        Stopped: nothing can be judged yet.
    """
    root = Path(output_dir)
    return _judged(root, read_plan(root))


def _print_result(comparison: Comparison, console: Console) -> None:
    """Print scores and verdicts, what they do not mean, and the path of the report."""
    plan = comparison.plan
    arms = comparison.family.table()
    title = f"{plan.problem}: {plan.metric}, mean over the seeds that did not fail"
    table = rich_table(title, ("arm",), [*arms])
    for cells in arms.itertuples():
        table.add_row(*map(number, cells))
    console.rich.print(table)
    headline, sentences, caveats = comparison.words
    console.note("\n- ".join([headline, *sentences, *caveats]))
    for run in comparison.runs.query("failed or state != 'finished'").itertuples():
        console.warn(f"{run.path}: {run.reason}")
    console.note(f"report  {comparison.output_dir / 'report.html'}")
