"""Reads the directories of runs: whether they are done, their evaluations, and the scores of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenrl.control.arguments import ControlArguments
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.lab.compare.records import PlannedRun, Problem, RunRecord
from tokenrl.lab.compare.scores import scores_of
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs.files import plain
from tokenrl.runs.metrics import read_completions, read_metrics
from tokenrl.runs.recorded import recorded_config, recorded_rows, recorded_summary
from tokenrl.runs.resume import FREE, ROUNDING
from tokenrl.settings import arguments, shown

ENDED = ("finished", "learnt", "stuck", "solved")
"""The exit reasons of a run that ended by itself; all but the first may come before its budget is used."""
DECIDING = {"max_steps", "max_samples", "stop_after_zero_spread", "stop_after_nonfinite"}
"""Settings that a run may change when it continues, but that decide what a comparison reads from it."""
CURVES = ("reward", "reward_greedy", "entropy", "completions/mean_length", "completions/clipped_ratio")
COUNTS = {"completions": "num_samples", "environment steps": "num_env_steps"}
"""By the unit of the budget, the metric that counts samples since the start; episodes are added up."""
SAMPLES = 8
"""Completions of a run that are kept for the report."""

Rows = Sequence[Mapping[str, Any]]


def is_done(run: PlannedRun, root: Path) -> bool:
    """Return whether a run has ended by itself; one that failed or was stopped by a signal has not.

    Args:
        run: the run.
        root: directory of the comparison.

    Raises:
        Refused: its directory holds a run with other settings, or a damaged one.
    """
    directory = root / run.path
    config = recorded_config(directory)
    if not config:
        return False
    given, stored = _comparable(_as_recorded(run)), _comparable(config)
    wrong = [
        f"{name} {shown(stored.get(name), 80)}, where the comparison plans {shown(value, 80)}"
        for name, value in given.items()
        if stored.get(name) != value and (value is not None or name.startswith("estimator."))
    ]
    if wrong:
        raise Refused(
            f"{directory} holds another run, with {'; '.join(wrong)}. Remove that directory, and the run is "
            "made again; or give another output_dir."
        )
    return recorded_summary(directory).get("exit_reason") in ENDED


def _as_recorded(run: PlannedRun) -> dict[str, Any]:
    """Return the settings of a run as its command records them, such as a single reward as a list of one."""
    given = {name: value for name, value in run.settings.items() if value is not None}
    args = arguments(ControlArguments if run.kind == "control" else TrainArguments, given)
    return {name: getattr(args, name) for name in given}


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the numbers of a run, as JSON holds them, with all axes by name."""
    left_out = {*FREE, *ROUNDING} - DECIDING
    found = plain({name: value for name, value in settings.items() if name not in left_out})
    axes = plain(arguments(Estimator, found.pop("estimator", None) or {}))
    return {**found, **{f"estimator.{name}": value for name, value in axes.items()}}


def read_record(run: PlannedRun, root: Path, problem: Problem) -> RunRecord:
    """Read what a comparison needs of a run, finished or not.

    A run that ended before its budget was used keeps the values of its last evaluation at the places where it
    would have been evaluated later; that is so for a failed run too, whose scores are thus those that it had
    at its end.

    Args:
        run: the run.
        root: directory of the comparison.
        problem: what it trains on.

    Raises:
        Refused: a file of the run is damaged, or its directory holds a run with other settings.
    """
    directory = root / run.path
    done = is_done(run, root)
    if not (directory / "metrics.jsonl").is_file():
        return RunRecord(run, "missing", "It has not been run.")
    rows, summary = recorded_rows(directory), recorded_summary(directory)
    at = dict(zip((row["step"] for row in rows), _samples(rows, problem.unit), strict=True))
    evaluated = _evaluations(rows, summary)
    places = due_places(problem)
    samples = [at[row["step"]] for row in evaluated]
    early = summary.get("exit_reason") != "finished"
    missed = [place for place in places if place > samples[-1]] if samples and early else []
    curves = {
        name: (*values, *[values[-1]] * len(missed)) for name in CURVES if (values := _curve(evaluated, name))
    }
    seconds = _seconds(directory, evaluated)
    samples += missed
    training = _training(rows, recorded_config(directory))
    return RunRecord(
        run,
        "finished" if done else "failed",
        "" if done else _why(summary),
        samples=tuple(samples),
        curves=curves,
        seconds=(*seconds, *seconds[-1:] * len(missed)),
        training=training,
        scores=scores_of(samples, curves, training, places),
        completions=tuple(_completions(directory)),
    )


def due_places(problem: Problem) -> list[float]:
    """Return the samples at which runs are evaluated, without that before training; the last is the budget.

    An arm with larger steps, because of greedy completions or refills, is evaluated a little later.
    """
    every = problem.settings.get("eval_every") or math.inf
    plain_step = problem.prompts_per_step * problem.num_generations
    if problem.unit == "environment steps":
        plain_step *= problem.settings["num_steps"]
    count = math.ceil(problem.budget / (every * plain_step)) or 1
    return [float(min(place * every * plain_step, problem.budget)) for place in range(1, count + 1)]


def _samples(rows: Rows, unit: str) -> list[float]:
    """Return for each row of metrics the number of samples that the run had generated until then."""
    if unit == "episodes":
        return list(accumulate(float(row.get("episodes") or 0) for row in rows))
    return list(accumulate((float(row.get(COUNTS[unit]) or 0) for row in rows), max))


def _evaluations(rows: Rows, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with an evaluation.

    A run that ends early is evaluated after its last step's row was written; then summary.json alone has it.
    """
    found = [dict(row) for row in rows if "eval_reward" in row]
    last = summary.get("eval_after") or {}
    if last and rows and "eval_reward" not in rows[-1]:
        found.append({"step": rows[-1]["step"], **{f"eval_{name}": value for name, value in last.items()}})
    return found


def _curve(evaluated: Rows, name: str) -> tuple[float, ...]:
    """Return a metric of all evaluations, nan where it was not measured; empty if none has it."""
    values = [row.get(f"eval_{name}") for row in evaluated]
    known = any(value is not None for value in values)
    return tuple(math.nan if value is None else float(value) for value in values) if known else ()


def _seconds(directory: Path, evaluated: Rows) -> tuple[float, ...]:
    """Return the seconds of training steps up to each evaluation."""
    path = directory / "timings.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    spent = {row.get("step"): float(row.get("step_seconds") or 0) for row in rows}
    return tuple(
        sum(value for step, value in spent.items() if isinstance(step, int) and step <= row["step"])
        for row in evaluated
    )


def _training(rows: Rows, config: Mapping[str, Any]) -> dict[str, float]:
    """Return the means over training steps that gates and sentences need; see `RunRecord`.

    `skipped` and `idle` are shares of all updates. A Gaussian head has no `entropy_start`, because the
    entropy of a density may be negative without harm.
    """
    steps = [row for row in rows if row["step"] > 0]
    if not steps:
        return {}
    tenth = max(1, len(steps) // 10)
    first, last = steps[:tenth], steps[-tenth:]
    found = {
        "entropy": _mean(last, "entropy"),
        "entropy_start": None if config.get("head") == "gaussian" else _mean(first, "entropy"),
        "kl": _mean(last, "kl"),
        "frac_reward_zero_std_start": _mean(first, "frac_reward_zero_std"),
        "clipped_ratio": _mean(steps, "completions/clipped_ratio"),
        "grad_clipped": _mean(steps, "grad_clipped"),
    }
    updates = len(steps) * config.get("num_iterations", 1) * config.get("num_minibatches", 1)
    for name in ("skipped", "idle"):
        found[name] = float(steps[-1].get(f"{name}_steps") or 0) / updates
    return {name: value for name, value in found.items() if value is not None}


def _mean(rows: Iterable[Mapping[str, Any]], name: str) -> float | None:
    known = [float(row[name]) for row in rows if row.get(name) is not None]
    return fmean(known) if known else None


def _why(summary: Mapping[str, Any]) -> str:
    """Say why a run has not ended by itself."""
    if summary.get("error"):
        return str(summary["error"])
    reason = summary.get("exit_reason")
    return f"It was stopped by {reason} before its end." if reason else "It was ended from outside."


def _completions(directory: Path) -> list[dict[str, Any]]:
    """Return some completions of the last table that the run wrote, from all over the step."""
    files = sorted((directory / "completions").glob("step_*.parquet"))
    rows = read_completions(files[-1]) if files else []
    kept = rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]
    return [{name: row.get(name) for name in ("prompt", "completion", "reward")} for row in kept]
