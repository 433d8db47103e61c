"""Reads run directories that exist as a comparison: their arms are the settings in which they differ."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrl.configuration import RECORDED
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.lab.compare.arms import MEASURE, changed_axes
from tokenrl.lab.compare.plan import Arm, Problem, Run
from tokenrl.lab.compare.scores import samples_of, unit_of
from tokenrl.runs.files import plain
from tokenrl.runs.reader import RecordedRun, read_run, series
from tokenrl.runs.resume import FREE, ROUNDING
from tokenrl.settings import arguments

BUDGET = ("max_steps", "max_samples", "eval_every")
PLACE = ("task", "env", "model", *(name for name in MEASURE if name not in BUDGET))
"""Settings that say what a run was trained on and how it was measured: they must be the same."""
NOT_COMPARED = {"seed", "estimator", *RECORDED, *FREE, *ROUNDING, *PLACE, *BUDGET}


def read_existing(patterns: Sequence[str], output_dir: str) -> tuple[list[Problem], list[Arm], list[Run]]:
    """Find the runs that patterns such as `runs/*` name, and say by which settings they differ.

    Raises:
        Refused: there are no such runs, two have the same arm and seed, or all have the same settings.
    """
    paths = sorted({path for pattern in patterns for path in glob.glob(os.path.expanduser(pattern))})
    found = [read_run(path) for path in paths if os.path.isfile(os.path.join(path, "metrics.jsonl"))]
    wrong = [run.path for run in found if run.kind not in ("train", "control") or "seed" not in run.config]
    if wrong or not found:
        what = f"{wrong[0]} is no run of tokenrl train or control" if wrong else "no run directory was found"
        raise Refused(f"runs was given as {' '.join(patterns)}; {what}. Give directories that these wrote.")
    places = [{n: run.config[n] for n in PLACE if run.config.get(n) is not None} for run in found]
    by_problem: dict[str, list[RecordedRun]] = {}
    for run, label in zip(found, _labels(places), strict=True):
        by_problem.setdefault(label, []).append(run)
    arms: dict[str, Arm] = {}
    runs: dict[tuple[str, str, int], Run] = {}
    for problem, several in by_problem.items():
        estimators = [arguments(Estimator, run.config.get("estimator") or {}) for run in several]
        others = [{n: x for n, x in run.config.items() if n not in NOT_COMPARED} for run in several]
        named = [{"estimator": _name(e), **more} for e, more in zip(estimators, others, strict=True)]
        for run, label, estimator, more in zip(several, _labels(named), estimators, others, strict=True):
            key, path = (problem, label, run.config["seed"]), os.path.relpath(run.path, output_dir)
            if key in runs:
                other = os.path.normpath(Path(output_dir, runs[key].path))
                raise Refused(f"{other} and {run.path} have the same settings and seed; name one of them.")
            arms.setdefault(
                label,
                Arm(label, plain({"estimator": changed_axes(estimator), **more}), estimator.bias_status),
            )
            runs[key] = Run(
                problem, label, "comparison", key[2], float(run.config.get("learning_rate") or 0), path
            )
    if len(arms) < 2:
        raise Refused(
            "All runs have the same settings but for their seeds, or were measured in different ways, so "
            "there is nothing to compare. Name the directories of two arms or more."
        )
    problems = [_problem(label, several) for label, several in by_problem.items()]
    return problems, list(arms.values()), list(runs.values())


def _name(estimator: Estimator) -> str:
    """Name an estimator by its preset, if it is one, else by the axes that are not the usual ones."""
    axes = changed_axes(estimator)
    presets = (name for name in PRESETS if changed_axes(Estimator.preset(name)) == axes)
    return next(presets, ",".join(f"{axis}={value}" for axis, value in axes.items()))


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name runs by the settings in which they differ; task, environment and estimator need no name before."""
    plainly = ("task", "env", "estimator")
    keys = list(dict.fromkeys(key for one in settings for key in one))
    keys = [k for k in keys if k in ("task", "env") or len({str(one.get(k)) for one in settings}) > 1]
    labels = [
        ", ".join(str(one.get(k)) if k in plainly else f"{k}={one.get(k)}" for k in keys) for one in settings
    ]
    return [label or "all runs" for label in labels]


def _problem(label: str, runs: Sequence[RecordedRun]) -> Problem:
    """Make the problem of runs that exist; all are read up to the smallest of their budgets."""
    unit = unit_of(runs[0])
    samples = [samples_of(run, unit) for run in runs]
    ends = [
        of.iloc[-1]
        for of, run in zip(samples, runs, strict=True)
        if run.summary.get("exit_reason") == "finished"
    ]
    budget = int(min(ends or [of.iloc[-1] for of in samples]))
    steps, _ = series(runs[0].evaluations, "reward")
    places = {min(float(x), float(budget)) for x in samples[0].reindex(steps, method="ffill")}
    solved = runs[0].config.get("solved")
    return Problem(
        label=label,
        settings={},
        budget=budget,
        unit=unit,
        per_step=round(samples[0].iloc[-1] / max(1, samples[0].index[-1])),
        places=tuple(sorted({*places, float(budget)} - {0.0})),
        solved=solved if isinstance(solved, float) else None,
    )
