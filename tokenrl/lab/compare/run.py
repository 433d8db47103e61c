"""Runs a comparison from its plan to its report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.execution.executing import execute
from tokenrl.lab.compare.execution.one import commands
from tokenrl.lab.compare.expectation import expectation
from tokenrl.lab.compare.judging import judged
from tokenrl.lab.compare.plan_file import settle_plan, write_plan
from tokenrl.lab.compare.planning import make_plan, runs_of
from tokenrl.lab.compare.records import Plan, PlannedRun, RunRecord
from tokenrl.lab.compare.report.page import write_report
from tokenrl.lab.compare.results import is_done, read_record
from tokenrl.lab.compare.shown import show_comparison, show_plan
from tokenrl.lab.compare.tables import write_tables
from tokenrl.lab.compare.tuning import chosen_rates, tune
from tokenrl.runs.console import Console
from tokenrl.settings import arguments, field_types


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
    began = time.monotonic()
    args = _arguments(args, options)
    console, output_dir = Console(quiet=args.quiet), Path(args.output_dir)
    plan = make_plan(args, console.note, command=_command())
    plan = settle_plan(plan, output_dir, overwrite=args.overwrite and not args.dry_run)
    if args.dry_run:
        show_plan(plan, expectation(plan, args.workers, measure=True), console)
        return plan
    expected = expectation(plan, args.workers)
    write_plan(plan, output_dir, asdict(expected))
    show_plan(plan, expected, console)
    work = _Work(args, output_dir, plan, console)
    try:
        sensitivity = tune(plan, work) if plan.tuning_seeds else {}
        rates = chosen_rates(sensitivity)
        records = [*work.records, *work(runs_of(plan, rates))]
    except _Printed:
        return plan
    found = judged(output_dir, plan, records, rates, sensitivity, console.note)
    found = replace(found, wall_seconds=time.monotonic() - began)
    write_tables(found)
    write_report(found, output_dir / "report.html")
    show_comparison(found, console)
    return found


class _Printed(Exception):
    """The commands of runs that are not done yet were printed, and nothing more can be done without them."""


class _Work:
    """Makes runs that are not done yet, and reads them all."""

    def __init__(self, args: CompareArguments, output_dir: Path, plan: Plan, console: Console) -> None:
        self.args, self.root, self.console = args, output_dir, console
        self.problems = {problem.label: problem for problem in plan.problems}
        self.records: list[RunRecord] = []  # of the tuning

    def __call__(self, runs: Sequence[PlannedRun]) -> list[RunRecord]:
        """Return the records of runs, in their order, after making those that are not done.

        Raises:
            _Printed: the commands are to be printed, and some runs are not done.
        """
        left = [run for run in runs if not is_done(run, self.root)]
        if self.args.print_commands and left:
            print(*commands(left, self.root), sep="\n")
            raise _Printed
        ends = {}
        if left:
            how: dict[str, Any] = {"executor": self.args.executor, "workers": self.args.workers}
            ends = execute(left, self.root, console=self.console, **how)
        records = []
        for run in runs:
            record = read_record(run, self.root, self.problems[run.problem])
            end = ends.get(run.path)
            if end is not None and end.state == "failed":
                record = replace(record, state="failed", reason=end.reason)
            records.append(record)
        self.records += [record for record in records if record.run.role == "tuning"]
        return records


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
