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
from tokenrl.lab.compare.plan import Arm, Problem, Run
from tokenrl.lab.compare.scores import samples_of, unit_of
from tokenrl.runs.files import plain
from tokenrl.runs.reader import RecordedRun, finite, read_run, series
from tokenrl.runs.resume import FREE, ROUNDING
from tokenrl.settings import arguments

BUDGET = ("max_steps", "max_samples", "eval_every")
HOW_MEASURED = (
    *("reward", "reward_weights", "prompt_column", "prompt_template", "split", "eval_split", "eval_size"),
    *("eval_generations", "num_envs", "num_steps", "eval_episodes", "max_episode_steps"),
)
MEASURE = (*HOW_MEASURED, *BUDGET)
"""Settings that decide what is measured, or how often and on how many samples: all arms share them."""
PLACE = ("task", "env", "model", *HOW_MEASURED)
"""Settings that say what a run was trained on and how it was measured: they must be the same."""
NOT_COMPARED = {"seed", "estimator", *RECORDED, *FREE, *ROUNDING, *PLACE, *BUDGET}


def changed_axes(estimator: Estimator) -> dict[str, Any]:
    """Return the axes in which an estimator differs from the default one, as JSON holds them."""
    values, usual = plain(estimator), plain(Estimator())
    return {name: value for name, value in values.items() if value != usual[name]}


def read_existing(patterns: Sequence[str], output_dir: str) -> tuple[list[Problem], list[Arm], list[Run]]:
    """Find the runs that patterns such as `runs/*` name, and say by which settings they differ.

    Raises:
        Refused: there are no such runs, two have the same arm and seed, or all have the same settings.
    """
    paths = sorted({path for pattern in patterns for path in glob.glob(os.path.expanduser(pattern))})
    found = [read_run(path) for path in paths if os.path.isfile(os.path.join(path, "metrics.jsonl"))]
    if not found:
        text = f"runs was given as {' '.join(patterns)}; no run directory was found"
        raise Refused(f"{text}. Give directories that tokenrl train or control wrote.")
    for run in found:
        if run.kind not in ("train", "control") or "seed" not in run.config or not run.metrics[1:]:
            raise Refused(f"{run.path} is no run of tokenrl train or control that made a step. Leave it out.")
        if run.path.resolve().is_relative_to(Path(output_dir).resolve()):
            raise Refused(f"The run {run.path} lies in the output directory {output_dir}. Give another one.")
    by_problem: dict[str, list[RecordedRun]] = {}
    places = [{n: run.config[n] for n in PLACE if run.config.get(n) is not None} for run in found]
    for run, label in zip(found, _labels(places), strict=True):
        by_problem.setdefault(label, []).append(run)
    arms: dict[str, Arm] = {}
    runs: dict[tuple[str, str, int], Run] = {}
    for problem, several in by_problem.items():
        settings = [_settings(run) for run in several]
        for run, label, own in zip(several, _labels(settings), settings, strict=True):
            key = problem, label, run.config["seed"]
            if key in runs:
                first = os.path.normpath(os.path.join(output_dir, runs[key].path))
                raise Refused(f"{first} and {run.path} have the same settings and seed; name one of them.")
            arms.setdefault(label, Arm(label, own))
            rate, path = float(run.config.get("learning_rate") or 0), os.path.relpath(run.path, output_dir)
            runs[key] = Run(problem, label, "comparison", key[-1], rate, path)
    if len(arms) < 2:
        raise Refused(
            "All runs have the same settings but for their seeds, or were measured in different ways, so "
            "there is nothing to compare. Name the directories of two arms or more."
        )
    problems = [_problem(label, several) for label, several in by_problem.items()]
    return problems, list(arms.values()), list(runs.values())


def _settings(run: RecordedRun) -> dict[str, Any]:
    """Return the settings in which arms may differ, of the estimator the axes that are not the usual ones."""
    estimator = arguments(Estimator, run.config.get("estimator") or {})
    others = {name: value for name, value in run.config.items() if name not in NOT_COMPARED}
    return {"estimator": changed_axes(estimator), **plain(others)}


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name runs by the settings in which they differ; an estimator by its preset, if it is one."""
    keys = list(dict.fromkeys(key for one in settings for key in one))
    keys = [k for k in keys if k in ("task", "env") or len({str(one.get(k)) for one in settings}) > 1]
    presets = {str(changed_axes(Estimator.preset(name))): name for name in reversed(PRESETS)}

    def text(key: str, value: Any) -> str:
        if key == "estimator":
            return presets.get(str(value)) or ",".join(f"{axis}={x}" for axis, x in value.items())
        return str(value) if key in ("task", "env") else f"{key}={value}"

    return [", ".join(text(key, one.get(key)) for key in keys) or "all runs" for one in settings]


def _problem(label: str, runs: Sequence[RecordedRun]) -> Problem:
    """Make the problem of runs that exist; all are read up to the smallest of their budgets."""
    unit = unit_of(runs[0])
    samples = [samples_of(run, unit) for run in runs]
    whole = [run.summary.get("exit_reason") == "finished" for run in runs]
    ends = [of.iloc[-1] for of, is_whole in zip(samples, whole, strict=True) if is_whole or not any(whole)]
    steps, _ = series(runs[0].evaluations, "reward")
    evaluated = samples[0].reindex(steps, method="ffill")
    return Problem(
        label=label,
        settings={},
        budget=int(min(ends)),
        unit=unit,
        per_step=round(samples[0].iloc[-1] / max(1, samples[0].index[-1])),
        every=int(evaluated[evaluated > 0].min()) if (evaluated > 0).any() else 0,
        solved=finite(runs[0].config.get("solved")),
    )
