"""Runs a comparison: as long as runs of the plan are missing, they are made and read; then all are judged.

Which runs are missing is a function of the plan and of the runs that have been made. Where learning rates are
tuned, the rate of each arm is chosen by successive halving over seeds that the comparison does not use: all rates
of a grid are tried on the first tuning seed, the better half of them on the next seed, and so on; the rate
with the best mean score over all its seeds wins. Each run has the whole budget, because a rate that is best
for a short run is not best for a long one.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas as pd

from tokenrl.errors import Interrupted, Refused, Stopped
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.comparison import Comparison, findings_of, judge_runs
from tokenrl.lab.compare.execution import collect, execute
from tokenrl.lab.compare.page import write_comparison
from tokenrl.lab.compare.plan import (
    Plan,
    PlannedRun,
    lock_plan,
    read_earlier_plan,
    read_plan,
    write_plan,
)
from tokenrl.lab.compare.problems import make_plan
from tokenrl.lab.compare.table import RunTable, read_runs
from tokenrl.runs.console import Console, duration, number
from tokenrl.runs.directory import directory_path
from tokenrl.runs.files import plain
from tokenrl.runs.output import rich_table
from tokenrl.runs.reader import read_run

TIMED_STEPS = 6
"""Steps of the run that is timed; the first two are slower, so their median counts."""
CHANGEABLE = ("labels", "seeds", "reference", "metric", "failure_below", "all_pairs", "margins")
"""Which runs there are and how they are judged, which may change when a comparison goes on."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that are tried, relative to the recommended one: four times that often destroys a policy."""
WIDENINGS = 2
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
        The result; its directory holds the same in files, with a report. With `dry_run` the plan.

    Raises:
        Refused: an argument cannot be used; raised before anything is run.
        Interrupted: a signal ended the comparison; the same call goes on with it.
        Stopped: a file of a run that it made is damaged; the same call goes on with it.

    Example:
        >>> import tokenrl
        >>> result = tokenrl.compare(task="sort_digits", arms=("reinforce", "rloo"), seeds=6, max_steps=100)
        >>> result.judgement.verdicts()
    """
    args = arguments_of_call(CompareArguments, args, with_shared(options) if options else {})
    console = Console(quiet=args.quiet)
    root = directory_path(args.output_dir)
    new_plan = make_plan(args, console.note)
    if args.dry_run:
        plan = continue_plan(new_plan, root)
        console.start("tokenrl compare", plan.describe() | _forecasts(plan, console), note=NOTE)
        return plan
    lock = lock_plan(root)
    rows = list[dict[str, Any]]()
    try:
        plan = continue_plan(new_plan, root)
        write_plan(plan, root)
        console.start("tokenrl compare", plan.describe(), note=NOTE)
        while runs := missing(plan, rows):
            collect(runs, args.collect, root, console.note)
            read_runs(plan, runs, root)  # refuses what cannot be compared before more is made
            execute(runs, root, executor=args.executor, workers=args.workers, console=console)
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


def continue_plan(plan: Plan, output_dir: Path) -> Plan:
    """Compare a plan with the plan that the directory holds; return it with the changes between the two.

    A plan may gain runs, of more seeds or arms, and judge them in another way. If runs of the older plan have
    begun, such changes are noted as exploratory: who looks at results before choosing what to compare, or
    when to stop, will find differences by chance more often than the level says.

    Args:
        plan: the plan.
        output_dir: the directory of the comparison.

    Raises:
        Refused: the directory holds a comparison with runs that the plan lacks, or has with other settings;
            or something else.
    """
    old = read_earlier_plan(output_dir)
    if old is None:
        return plan
    runs = {run.path: run for run in plan.runs()}
    difference = ""
    if old.tuning_seeds != plan.tuning_seeds:
        difference = "its learning rates are chosen in another way"
    for run in old.runs():
        difference = difference or _difference(run, runs.get(run.path))
    if difference:
        raise Refused(
            f"{output_dir} holds another comparison: {difference[:900]}. Give the arguments that it was "
            "started with (plan.json has its command), or another --output-dir."
        )
    if not any((output_dir / "runs").rglob("config.json")):
        return plan
    changes = list(old.changes)
    for name in CHANGEABLE:
        earlier = getattr(old, name)
        value = getattr(plan, name)
        if value != earlier:
            changes.append(f"{name} changed from {earlier} to {value} after runs had begun")
    return replace(plan, changes=tuple(dict.fromkeys(changes)))


def _difference(earlier: PlannedRun, run: PlannedRun | None) -> str:
    """Describe how a run is planned otherwise than before; empty text if it is not."""
    if run is None:
        return f"it has {earlier.path}, which these arguments do not make"
    before = plain(earlier.settings)
    now = plain(run.settings)
    names = [name for name in before | now if before.get(name) != now.get(name)]
    changes = [f"{name} {before.get(name)}, now {now.get(name)}" for name in names]
    return f"{run.path} has {'; '.join(changes)}" if changes else ""


def missing(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[PlannedRun]:
    """Return the runs to make next: the runs of a round of tuning, or all others once the rates are chosen.

    Args:
        plan: the comparison.
        rows: a row for each run that has been made, failed or not, with its score (see `table.read_runs`).
            A run that failed keeps the score that it had at its end, so a rate that destroys the policy is a
            bad rate and not a missing one; a run without a score is the worst.
    """
    scores: Any = defaultdict(dict)
    for row in rows:
        if row["role"] == "tuning":
            score = row[plan.metric]
            of_arm = scores[row["problem"], row["arm"]]
            of_arm[row["learning_rate"], row["seed"]] = -math.inf if math.isnan(score) else score
    rates = {}
    runs = []
    for problem, arm in product(plan.problems, plan.arms) if plan.tuning_seeds else ():
        key = problem.label, arm.label
        usual = plan.run(problem, arm, plan.seeds[0]).learning_rate
        rates[key], untried = tune(usual, plan.tuning_seeds, scores[key])
        runs += [plan.run(problem, arm, seed, "tuning", rate) for rate, seed in untried]
    if runs:
        return runs
    paths = {row["path"] for row in rows}
    return [run for run in plan.runs(rates) if run.path not in paths]


def tune(
    usual: float, seeds: Sequence[int], scores: Mapping[tuple[float, int], float]
) -> tuple[float, list[tuple[float, int]]]:
    """Return the best learning rate so far, and the pairs of rate and seed to try next; none at the end.

    Args:
        usual: the recommended rate.
        seeds: the tuning seeds.
        scores: the score of each pair of rate and seed that has been tried.
    """
    rates = [factor * usual for factor in FACTORS]
    for count, seed in enumerate(seeds, start=1):
        for widened in range(WIDENINGS + 1):
            untried = [(rate, seed) for rate in rates if (rate, seed) not in scores]
            if untried:
                return rates[0], untried
            rates.sort()  # of equal rates the smaller counts as better
            rates.sort(key=lambda rate: -fmean(scores[rate, each] for each in seeds[:count]))
            beyond = {min(rates): rates[0] / 2, max(rates): rates[0] * 2}
            if count == 1 and widened < WIDENINGS and rates[0] in beyond:
                rates.append(beyond[rates[0]])
        rates = rates[: math.ceil(len(rates) / 2)]
    return rates[0], []


def judge_directory(output_dir: str | Path) -> Comparison:
    """Judge the runs that a comparison has made so far, without making any.

    Args:
        output_dir: the directory of the comparison.

    Raises:
        Refused: the plan or a run is damaged.
        Stopped: nothing can be judged yet.
    """
    root = Path(output_dir)
    rows = list[dict[str, Any]]()
    plan = read_plan(root)
    while runs := missing(plan, rows):
        rows += read_runs(plan, runs, root)
    return judge_runs(root, plan, RunTable.of_rows(rows))


def _forecasts(plan: Plan, console: Console) -> dict[str, str]:
    """Forecast from a few steps of the reference how long a run takes, and what cannot give a signal in it."""
    arm = next(arm for arm in plan.arms if arm.label == plan.reference)
    forecasts = {}
    for problem in plan.problems:
        run = plan.run(problem, arm, plan.seeds[0])
        run = replace(run, settings={**run.settings, "eval_every": 0, "max_steps": TIMED_STEPS})
        console.note(
            f"timing {TIMED_STEPS} steps on {problem.label}; a model that has no warm start yet gets it first, "
            "which may take minutes and then counts in the time of a run ..."
        )
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            try:
                execute([run], root, console=Console(quiet=True))
            except Interrupted as error:
                text = "The dry run was interrupted. It keeps nothing, so the same command begins anew."
                raise Interrupted(text, error.exit_code) from error
            (row,) = read_runs(plan, [run], root)
            if row["state"] != "finished":
                raise Refused(
                    f"A few steps of {arm.label} on {problem.label} failed: {row['reason']}"
                )
            recorded = read_run(root / run.path)
            steps = [row["step_seconds"] for row in recorded.timings if "step_seconds" in row]
            evaluation = (recorded.summary["wall_seconds"] - sum(steps)) / 2
        seconds = problem.max_steps(arm) * median(steps)
        seconds += (1 + len(problem.evaluated_at)) * evaluation
        forecasts[f"a run on {problem.label}"] = f"about {duration(seconds)} on one processor"
        for finding in findings_of(arm, problem, pd.DataFrame([row])):
            forecasts[f"{finding.flag} on {problem.label}"] = finding.text
    return forecasts


def _print_result(comparison: Comparison, console: Console) -> None:
    """Print scores and verdicts on each problem, what they do not mean, and the path of the report."""
    for family in comparison.judgement.families:
        title = f"{family.problem}: {comparison.plan.metric}, mean over the seeds that did not fail"
        columns = ("failed", "score", f"against {family.reference}", "verdict")
        table = rich_table(title, ("arm",), columns)
        for arm in family.arms:
            difference = family.against_reference.get(arm.arm)
            cells = (difference.interval, difference.verdict) if difference else ("", "reference")
            table.add_row(arm.arm, arm.count, number(arm.mean), *cells)
        console.rich.print(table)
        words = comparison.words[family.problem]
        console.note(words.headline)
        for sentence in words.sentences + words.caveats:
            console.note(f"- {sentence}")
    for run in comparison.table.runs.query("failed").itertuples():
        console.warn(f"{run.problem}: {run.arm}, seed {run.seed}, failed: {run.reason}")
    console.note(f"report  {comparison.output_dir / 'report.html'}")
