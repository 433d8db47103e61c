"""Plans a comparison of run directories that exist: their arms are the settings in which they differ."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.arms import MEASURE, changed_axes
from tokenrl.lab.compare.plan import Arm, Kind, Plan, PlannedRun, Problem
from tokenrl.lab.compare.planning import margin_of, reference_of
from tokenrl.lab.compare.scores import COUNTS
from tokenrl.runs.files import plain
from tokenrl.runs.reader import RecordedRun, read_run
from tokenrl.runs.resume import FREE, ROUNDING
from tokenrl.settings import arguments

PLACE = ("kind", "task", "env", "model", *MEASURE)
"""Settings that say what a run was trained on and how it was measured: they must be the same."""
NOT_COMPARED = {"versions", "command", "title", "solved", "seed", *FREE, *ROUNDING, *PLACE}


def plan_of_runs(args: CompareArguments, command: str = "") -> Plan:
    """Plan a comparison of the runs that `args.runs` names.

    Args:
        args: the arguments.
        command: the command line that repeats the comparison.

    Raises:
        Refused: there are no such runs, two have the same arm and seed, or all have the same settings.
    """
    paths = sorted({path for pattern in args.runs for path in glob.glob(os.path.expanduser(pattern))})
    runs = [read_run(path) for path in paths if os.path.isfile(os.path.join(path, "metrics.jsonl"))]
    wrong = [run for run in runs if run.kind not in ("train", "control") or "seed" not in run.config]
    if wrong or not runs:
        what = (
            f"{wrong[0].path} is no run of tokenrl train or control"
            if wrong
            else "no run directory was found"
        )
        raise Refused(f"runs was given as {' '.join(args.runs)}; {what}. Give directories that these wrote.")
    by_problem: dict[str, list[RecordedRun]] = {}
    for run, label in zip(runs, _labels([_place(run.config) for run in runs]), strict=True):
        by_problem.setdefault(label, []).append(run)
    problems = tuple(_problem(label, several) for label, several in by_problem.items())
    planned: list[PlannedRun] = []
    arms: dict[str, Arm] = {}
    for problem, several in zip(problems, by_problem.values(), strict=True):
        compared = [{k: v for k, v in run.config.items() if k not in NOT_COMPARED} for run in several]
        for run, label, settings in zip(
            several, _labels([_told(c) for c in compared]), compared, strict=True
        ):
            label = label or "all runs"
            estimator = arguments(Estimator, run.config.get("estimator") or {})
            arms.setdefault(label, Arm(label, plain(settings), estimator.bias_status))
            path = os.path.relpath(run.path, args.output_dir)
            kind: Kind = problem.kind
            own = {"learning_rate": run.config.get("learning_rate")}
            planned.append(
                PlannedRun(problem.label, label, run.config["seed"], "comparison", kind, path, own)
            )
    _check(planned, list(arms), args.output_dir)
    return Plan(
        problems=problems,
        arms=tuple(arms.values()),
        reference=reference_of(args, list(arms)),
        metric=args.metric,
        margins={p.label: margin_of(args, p) for p in problems},
        seeds=tuple(sorted({run.seed for run in planned})),
        failure_below=args.failure_below,
        all_pairs=args.all_pairs,
        existing=tuple(planned),
        command=command,
    )


def _place(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that say what a run was trained on, the task or environment first."""
    skipped = ("max_steps", "max_samples", "eval_every", "kind")
    return {name: config[name] for name in PLACE if config.get(name) is not None and name not in skipped}


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an arm by which it is named: the preset if there is one, else its axes."""
    axes = changed_axes(arguments(Estimator, config.get("estimator") or {}))
    presets = [name for name in PRESETS if changed_axes(Estimator.preset(name)) == axes]
    name = presets[0] if presets else ",".join(f"{axis}={value}" for axis, value in axes.items())
    return {"estimator": name, **{key: value for key, value in config.items() if key != "estimator"}}


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name runs by the settings in which they differ; task, environment and estimator need no name before."""
    plainly = ("task", "env", "estimator")
    keys = list(dict.fromkeys(key for one in settings for key in one))
    keys = [k for k in keys if k in plainly[:2] or len({str(one.get(k)) for one in settings}) > 1]
    return [
        ", ".join(str(one.get(k)) if k in plainly else f"{k}={one.get(k)}" for k in keys) for one in settings
    ]


def _problem(label: str, runs: Sequence[RecordedRun]) -> Problem:
    """Make the problem of runs that exist; all are read up to the smallest of their budgets."""
    config = runs[0].config
    unit = (
        "completions"
        if runs[0].kind == "train"
        else "environment steps"
        if config.get("num_steps")
        else "episodes"
    )
    ends = [sum(r.get("episodes") or 0 for r in run.metrics) if unit == "episodes"
            else max((r.get(COUNTS[unit]) or 0 for r in run.metrics), default=0)
            for run in runs if run.summary.get("exit_reason") == "finished"]  # fmt: skip
    size = config.get("num_generations") or config.get("num_envs") or 1
    per_step = size * (config.get("prompts_per_step") or config.get("num_steps") or 1)
    budget = int(min(ends, default=per_step * (config.get("max_steps") or 1)))
    evaluations = [one["step"] * per_step for one in runs[0].evaluations if one["step"]]
    places = sorted({float(min(place, budget)) for place in evaluations} | {float(budget)})
    solved = config.get("solved")
    return Problem(
        label=label,
        kind="control" if runs[0].kind == "control" else "train",
        settings={},
        budget=budget,
        unit=unit,
        per_step=per_step,
        num_generations=size,
        learning_rate=float(config.get("learning_rate") or 0.0),
        places=tuple(places),
        solved=solved if isinstance(solved, float) else None,
    )


def _check(runs: Sequence[PlannedRun], arms: Sequence[str], output_dir: str) -> None:
    """Refuse runs of one arm only, and two runs with the same arm and seed."""
    if len(arms) < 2:
        raise Refused(
            "All runs have the same settings but for their seeds, or were measured in different ways, so "
            "there is nothing to compare. Name the directories of two arms or more."
        )
    seen: dict[tuple[str, str, int], str] = {}
    for run in runs:
        key = (run.problem, run.arm, run.seed)
        if key in seen:
            one, other = (Path(os.path.normpath(Path(output_dir, path))) for path in (seen[key], run.path))
            raise Refused(f"{one} and {other} have the same settings and seed; name one of them.")
        seen[key] = run.path
