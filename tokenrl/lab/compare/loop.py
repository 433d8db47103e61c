"""Runs a comparison: as long as runs of the plan are missing, they are made and read; then all are judged.

Which runs are missing is a function of the plan and of the runs that have been made. Where learning rates are
tuned, one is chosen for each arm by successive halving over seeds that the comparison does not use: all rates
of a grid are tried on the first tuning seed, the better half of them on the next seed, and so on; the rate
with the best mean score over all its seeds wins. Each run has the whole budget, because a rate that is best
for a short run is not best for a long one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tokenrl.errors import Refused, Stopped
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.comparison import Comparison, judge_runs
from tokenrl.lab.compare.execution import execute, print_commands
from tokenrl.lab.compare.page import write_comparison
from tokenrl.lab.compare.plan import (
    Plan,
    PlannedRun,
    continue_plan,
    lock_plan,
    read_plan,
    write_plan,
)
from tokenrl.lab.compare.problems import make_plan
from tokenrl.lab.compare.table import RunTable, is_done, read_runs
from tokenrl.runs.console import Console, duration, number, rich_table
from tokenrl.runs.reader import read_run

TIMED_STEPS = 6
"""Steps of the run that is timed; the first two are slower than the others, and do not count."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that are tried, relative to the recommended one: four times that often destroys a policy."""
WIDER = 2
"""How often a grid is widened whose best rate is its least or its greatest."""
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
        The result; its directory holds the same in files, with a report. With `dry_run` or
        `print_commands` the plan.

    Raises:
        Refused: an argument cannot be used; raised before anything is run.
        Stopped: a signal ended the comparison, or a file of a run that it made is damaged; the same call
            goes on with it.

    Example:
        >>> import tokenrl
        >>> result = tokenrl.compare(task="sort_digits", arms=("reinforce", "rloo"), seeds=6, max_steps=100)
        >>> result.judgement.verdicts()
    """
    args = arguments_of_call(CompareArguments, args, with_shared(options) if options else {})
    console, root = Console(quiet=args.quiet), Path(args.output_dir)
    plan = make_plan(args, console.note)
    if args.dry_run:
        plan = continue_plan(plan, root, overwrite=False)
        console.start("tokenrl compare", plan.describe() | _forecasts(plan), note=NOTE)
        return plan
    lock, rows = lock_plan(root), list[dict[str, Any]]()
    try:
        plan = continue_plan(plan, root, overwrite=args.overwrite)
        write_plan(plan, root)
        console.start("tokenrl compare", plan.describe(), note=NOTE)
        while runs := missing(plan, rows):
            unmade = [run for run in runs if not is_done(run, root)]
            if unmade and args.print_commands:
                print_commands(unmade, root)
                return plan
            execute(unmade, root, executor=args.executor, workers=args.workers, console=console)
            rows += read_runs(plan, runs, root)
        comparison = judge_runs(root, plan, RunTable.of_rows(rows))
        write_comparison(comparison)
    except Refused as error:
        if not rows:
            raise
        raise Stopped(str(error)) from error
    finally:
        lock.release()
    _print_result(comparison, console)
    return comparison


def missing(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[PlannedRun]:
    """Return the runs to make next: those of a round of tuning, or all others once the rates are chosen.

    Args:
        plan: the comparison.
        rows: a row for each run that has been made, failed or not, with its score (see `table.read_runs`).
            A run that failed keeps the score that it had at its end, so a rate that destroys the policy is a
            bad rate and not a missing one; a run without a score is the worst.
    """
    rates, runs = {}, list[PlannedRun]()
    for problem, arm in product(plan.problems, plan.arms) if plan.tuning_seeds else ():
        scores = {
            (row["learning_rate"], row["seed"]): -math.inf
            if math.isnan(score := row[plan.metric])
            else score
            for row in rows
            if (row["problem"], row["arm"], row["role"]) == (problem.label, arm.label, "tuning")
        }
        usual = plan.run(problem, arm, plan.seeds[0]).learning_rate
        best, untried = tune(usual, plan.tuning_seeds, scores)
        rates[problem.label, arm.label] = best
        runs += [plan.run(problem, arm, seed, "tuning", rate) for rate, seed in untried]
    paths = {row["path"] for row in rows}
    return runs or [run for run in plan.runs(rates) if run.path not in paths]


def tune(
    usual: float, seeds: Sequence[int], scores: Mapping[tuple[float, int], float]
) -> tuple[float, list[tuple[float, int]]]:
    """Return the best learning rate so far, and the pairs of rate and seed to try next; none at the end.

    Args:
        usual: the recommended rate.
        seeds: the tuning seeds.
        scores: the score of each pair of rate and seed that has been tried.
    """
    rates, seeds_so_far = [factor * usual for factor in FACTORS], list[int]()
    for seed in seeds:
        seeds_so_far.append(seed)
        for widened in range(WIDER + 1):
            if untried := [(rate, seed) for rate in rates if (rate, seed) not in scores]:
                return rates[0], untried
            rates.sort(key=lambda rate: (-fmean(scores[rate, seed] for seed in seeds_so_far), rate))
            if len(seeds_so_far) == 1 and widened < WIDER:
                rates += _rate_beyond(rates)
        rates = rates[: math.ceil(len(rates) / 2)]
    return rates[0], []


def _rate_beyond(ranked: Sequence[float]) -> list[float]:
    """Return the rate beyond the edge of a grid, if the best one lies there, and none otherwise."""
    best, low, high = ranked[0], min(ranked), max(ranked)
    return [low / 2] if best == low else [high * 2] if best == high else []


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


def _forecasts(plan: Plan) -> dict[str, str]:
    """Say how long a run on each problem takes, from a few steps and evaluations of the reference."""
    (arm,) = (arm for arm in plan.arms if arm.label == plan.reference)
    times = {}
    for problem in plan.problems:
        run = plan.run(problem, arm, plan.seeds[0])
        limits = {"eval_every": 0, "max_steps": TIMED_STEPS}
        run = replace(run, settings={**run.settings, **limits})
        with tempfile.TemporaryDirectory() as folder:
            execute([run], Path(folder), console=Console(quiet=True))
            (row,) = read_runs(plan, [run], Path(folder))
            if row["state"] != "finished":
                attempt = f"A few steps of {arm.label} on {problem.label} were tried"
                raise Refused(f"{attempt}, and failed: {row['reason']}")
            recorded = read_run(Path(folder, run.path))
            steps = [
                timing["step_seconds"] for timing in recorded.timings if "step_seconds" in timing
            ]
        evaluation = max(0.0, (recorded.summary["wall_seconds"] - sum(steps)) / 2)
        seconds = problem.max_steps(arm) * median(steps[2:] or steps)
        seconds += (1 + len(problem.evaluated_at)) * evaluation
        times[f"a run on {problem.label}"] = f"about {duration(seconds)} on one processor"
    return times


def _print_result(comparison: Comparison, console: Console) -> None:
    """Print scores and verdicts on each problem, what they do not mean, and the path of the report."""
    for family in comparison.judgement.families:
        title = f"{family.problem}: {comparison.plan.metric}, mean over the seeds that did not fail"
        columns = ("failed", "score", f"against {family.reference}", "verdict")
        table = rich_table(title, ("arm",), columns)
        for arm in family.arms:
            difference = family.against_reference.get(arm.arm)
            cells = (difference.apart, difference.verdict) if difference else ("", "reference")
            table.add_row(arm.arm, arm.count, number(arm.mean), *cells)
        console.rich.print(table)
        console.note(comparison.headline(family.problem))
        for text in (
            *family.sentences(),
            *(caveat.text for caveat in comparison.caveats[family.problem]),
        ):
            console.note(f"- {text}")
    for run in comparison.table.runs.query("failed").itertuples():
        console.warn(f"{run.problem}: {run.arm}, seed {run.seed}, failed: {run.reason}")
    text, command = comparison.proposal or ("", "")
    notes = [text, f"report  {comparison.output_dir / 'report.html'}", f"next    {command}"]
    for note in notes if text else notes[1:2]:
        console.note(note)
