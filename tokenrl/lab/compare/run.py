"""Runs a comparison from its plan to its report.

Where rates are tuned, one is chosen for each arm by successive halving over seeds that the comparison does
not use: all rates of a grid are tried on the first tuning seed, the better half of them on the next seed, and
so on; the rate with the best mean score over all its seeds wins. Each run has the whole budget, because a
rate that is best for a short run is not best for a long one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas as pd

from tokenrl.errors import Refused
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.comparison import Comparison, judge_runs
from tokenrl.lab.compare.execution import command, execute
from tokenrl.lab.compare.page import write_comparison
from tokenrl.lab.compare.plan import Plan, Problem, Run, lock_plan, read_plan, settle_plan, write_plan
from tokenrl.lab.compare.planning import make_plan
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
    with ExitStack() as stack:
        if not args.dry_run:
            stack.callback(lock_plan(root).release)
        plan = settle_plan(plan, root, overwrite=args.overwrite and not args.dry_run)
        return _carried_out(plan, args, console)


def _carried_out(plan: Plan, args: CompareArguments, console: Console) -> Comparison | Plan:
    """Foretell, print, or make and judge the runs of a plan, as the arguments say."""
    root, facts = Path(args.output_dir), plan.in_words()
    if args.dry_run:
        for problem in plan.problems:
            seconds = duration(_seconds(plan, problem))
            facts[f"a run on {problem.label}"] = f"about {seconds} on one processor"
    else:
        write_plan(plan, root)
    console.start("tokenrl compare", facts, note=NOTE)
    if args.dry_run:
        return plan

    def make(runs: Sequence[Run]) -> None:
        left = [run for run in runs if not is_done(run, root)]
        if left and args.print_commands:
            print(*(command(plan, run, root) for run in left), sep="\n")
            raise _Printed
        if left:
            execute(plan, left, root, executor=args.executor, workers=args.workers, console=console)

    try:
        found = _judged(plan, root, make)
    except _Printed:
        return plan
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
    return write_comparison(judge_directory(output_dir))


def _judged(plan: Plan, root: Path, make: Callable[[Sequence[Run]], None]) -> Comparison:
    """Choose learning rates, if they are tuned, then make, read and judge all runs."""
    tables: list[RunTable] = []

    def work(runs: Sequence[Run]) -> pd.DataFrame:
        make(runs)
        tables.append(read_runs(plan, runs, root))
        return tables[-1].runs

    work(plan.runs(tune(plan, work) if plan.tuning_seeds else {}))
    return judge_runs(
        root, plan, RunTable(*(pd.concat(of, ignore_index=True) for of in zip(*tables, strict=True)))
    )


def _seconds(plan: Plan, problem: Problem) -> float:
    """Time a short run of the reference: the seconds of a whole run follow from its steps and evaluations."""
    (arm,) = (arm for arm in plan.arms if arm.label == plan.reference)
    few = {"eval_every": 0, **({"max_steps": TIMED_STEPS} if plan.kind == "control" else {})}
    short = replace(problem, budget=TIMED_STEPS * problem.per_step, settings={**problem.settings, **few})
    run = plan.run(short, arm, plan.seeds[0])
    plan = replace(plan, problems=(short,))
    with tempfile.TemporaryDirectory() as folder:
        execute(plan, [run], Path(folder), console=Console(quiet=True))
        if not is_done(run, Path(folder)):
            reason = read_runs(plan, [run], Path(folder)).runs["reason"][0]
            raise Refused(f"A few steps of {arm.label} on {problem.label} were tried, and failed: {reason}")
        timed = read_run(Path(folder, run.path))
        steps = [row["step_seconds"] for row in timed.timings if "step_seconds" in row]
    evaluation = max(0.0, (timed.summary["wall_seconds"] - sum(steps)) / 2)
    count = problem.budget / problem.per_step
    return float(count * median(steps[2:] or steps) + (1 + len(problem.places)) * evaluation)


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


FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that are tried, relative to the recommended one: four times that often destroys a policy."""
WIDER = 2
"""How often the grid is widened where its best rate is the first or the last."""


def tune(plan: Plan, work: Callable[[Sequence[Run]], pd.DataFrame]) -> dict[tuple[str, str], float]:
    """Try learning rates on the tuning seeds; return by problem and arm the one that is best.

    A run that fails keeps the score that it had at its end, so a rate that destroys the policy is a bad rate
    and not a missing one.

    Args:
        plan: the comparison.
        work: makes runs and returns a row for each in the same order, with the scores; runs made before are
            not repeated.
    """
    arms = {(p.label, a.label): (p, a) for p, a in product(plan.problems, plan.arms)}
    usual = {key: plan.run(*arm, plan.seeds[0]).learning_rate for key, arm in arms.items()}
    grids = {key: [factor * rate for factor in FACTORS] for key, rate in usual.items()}
    tried: dict[tuple[str, str], dict[float, list[float]]] = {key: {} for key in arms}

    def ranked(key: tuple[str, str]) -> list[float]:
        """Return the rates of a grid from the best to the worst; of equal ones the smaller comes first."""
        return sorted(grids[key], key=lambda rate: (-fmean(tried[key][rate]), rate))

    def attempt(wanted: Mapping[tuple[str, str], Sequence[float]], seed: int) -> None:
        pairs = [(key, rate) for key, rates in wanted.items() for rate in rates]
        runs = [plan.run(*arms[key], seed, "tuning", rate) for key, rate in pairs]
        scores = work(runs)[plan.metric].fillna(-math.inf) if runs else []
        for (key, rate), score in zip(pairs, scores, strict=True):
            tried[key].setdefault(rate, []).append(float(score))

    for place, seed in enumerate(plan.tuning_seeds):
        attempt(grids, seed)
        for _ in range(0 if place else WIDER):
            wider = {key: _beyond(ranked(key)) for key in grids}
            attempt(wider, seed)
            grids = {key: [*grid, *wider[key]] for key, grid in grids.items()}
        grids = {key: ranked(key)[: math.ceil(len(grid) / 2)] for key, grid in grids.items()}
    return {key: grid[0] for key, grid in grids.items()}


def _beyond(ranked: Sequence[float]) -> list[float]:
    """Return the rate beyond the edge of a grid, if the best one lies there, and none otherwise."""
    best, low, high = ranked[0], min(ranked), max(ranked)
    return [low / 2] if best == low else [high * 2] if best == high else []
