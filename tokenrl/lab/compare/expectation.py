"""Says before a comparison starts what it will cost, and how small a difference it can show."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tokenrl.errors import Refused
from tokenrl.lab.compare.execution.local import processors
from tokenrl.lab.compare.execution.one import run_one
from tokenrl.lab.compare.planning import planned_run, runs_of
from tokenrl.lab.compare.records import Plan, Problem
from tokenrl.lab.compare.statistics.paired import LEAST_PAIRS
from tokenrl.lab.compare.statistics.power import detectable_difference
from tokenrl.runs.metrics import read_metrics

POWER = 0.8
STEPS = 6
"""Steps of the run that is timed; the first two are left out, because they are slower than later ones."""


@dataclass(frozen=True)
class Expectation:
    """What may be expected of a comparison.

    Attributes:
        runs: number of runs of the comparison itself, those of the reference against itself included.
        tuning_runs: about how many runs the choice of learning rates takes.
        detectable: the smallest difference that this many pairs show with a power of 80 %, as a multiple of
            the standard deviation of a paired difference; None with fewer pairs than a verdict needs.
        seconds: by problem, the seconds of one run, if they were measured.
        total_seconds: seconds of all runs together on the processors that there are, if they were measured.
    """

    runs: int
    tuning_runs: int
    detectable: float | None
    seconds: dict[str, float]
    total_seconds: float | None


def expectation(plan: Plan, workers: int | None = None, *, measure: bool = False) -> Expectation:
    """Return what may be expected of a comparison.

    Args:
        plan: the comparison.
        workers: runs at the same time; None for the number of processors.
        measure: also time a few training steps and an evaluation of each problem.

    Raises:
        Refused: `measure` is set and the reference cannot be trained.
    """
    runs, pairs = len(runs_of(plan)), len(plan.seeds)
    others, problems = len(plan.arms) - 1, len(plan.problems)
    tuning, left = 0, float(len(plan.rates))
    for _ in plan.tuning_seeds:
        tuning += int(left)
        left = -(-left // 2)
    tuning *= problems * len(plan.arms)
    found = detectable_difference(pairs, 1.0, others, POWER) if pairs >= LEAST_PAIRS else None
    seconds = {problem.label: _seconds(plan, problem) for problem in plan.problems} if measure else {}
    total = None
    if seconds:
        each = (runs + tuning) / problems
        total = sum(seconds.values()) * each / (workers or processors())
    return Expectation(runs, tuning, found, seconds, total)


def _seconds(plan: Plan, problem: Problem) -> float:
    """Time a short run of the reference: the seconds of a whole run follow from its steps and evaluations."""
    arm = next(arm for arm in plan.arms if arm.label == plan.reference)
    run = planned_run(plan, problem, arm, plan.seeds[0], "comparison")
    per_step = problem.num_generations * problem.prompts_per_step
    length = {"max_samples": STEPS * per_step} if problem.kind == "train" else {"max_steps": STEPS}
    short = replace(run, path="run", settings={**run.settings, **length, "eval_every": 0})
    with tempfile.TemporaryDirectory() as folder:
        end = run_one(short, Path(folder))
        if end.state != "finished":
            raise Refused(
                f"A few steps of {arm.label} on {problem.label} were tried, and failed: {end.reason}"
            )
        directory = Path(folder, "run")
        steps = [
            row["step_seconds"] for row in read_metrics(directory / "timings.jsonl") if "step_seconds" in row
        ]
        whole = json.loads((directory / "summary.json").read_text())["wall_seconds"]
    evaluation = max(0.0, (whole - sum(steps)) / 2)
    count = float(run.settings["max_steps"]) if problem.kind == "control" else problem.budget / per_step
    every = run.settings["eval_every"]
    evaluations = 1 + (count / every if every else 1.0)
    return float(count * median(_steady(steps)) + evaluations * evaluation)


def _steady(seconds: Sequence[float]) -> Sequence[float]:
    return seconds[2:] or seconds
