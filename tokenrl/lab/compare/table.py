"""Reads runs into one table: how each ended, its scores and curves, and facts about its training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from tokenrl.configuration import read_config
from tokenrl.errors import read_file
from tokenrl.lab.compare.equality import check_equal
from tokenrl.lab.compare.plan import SCORES, Plan, PlannedRun
from tokenrl.runs import RecordedRun, ended_by_itself, in_use, read_run

State = Literal["finished", "failed", "stopped", "running", "absent"]
"""How a run stands: it ended as its training decided; it broke off; a signal ended it; it is under way; or it has
not begun. Verdicts are about runs of the first two states alone."""
ENDED: tuple[State, ...] = ("finished", "failed")
CURVES = (
    "reward",
    "reward_greedy",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
)
COUNTS = {
    "completions": "num_samples",
    "environment steps": "num_env_steps",
    "episodes": "episodes",
}
"""The metric that counts samples, by the unit of the budget."""
TRAINED = {"entropy": "entropy", "grad_clipped": "grad_clipped", "completions/clipped_ratio": "cut"}
"""Metrics of training steps, with the names of their means in the table; entropy is the mean of the last tenth."""
LOG_TAIL = 400


class Axis(NamedTuple):
    """Where the curves of runs are read.

    Attributes:
        counter: the metric that counts samples; `step` where runs are compared by their steps.
        points: the numbers of samples or steps; the last is the budget.
    """

    counter: str
    points: tuple[int, ...]

    def along(self, steps: pd.DataFrame) -> pd.Series[float]:
        """Return how far a run was at each step, from its metrics by step."""
        if self.counter == "step":
            return steps.index.to_series().astype(float)
        counts = steps[self.counter].fillna(0.0)
        return counts.cumsum() if self.counter == "episodes" else counts.cummax()


def read_runs(plan: Plan, runs: Iterable[PlannedRun], root: Path) -> list[dict[str, Any]]:
    """Read runs of a comparison, ended or not.

    A run with refills generates more samples than the budget; it is read at the budget, and what comes later is
    ignored.

    Args:
        plan: the comparison.
        runs: the runs.
        root: its directory.

    Returns:
        For each run `problem`, `arm`, `seed`, `role`, `path`, `learning_rate`, and what `row_of` returns.

    Raises:
        Refused: a file of a run is damaged, or two runs cannot be compared (see `check_equal`).
    """
    rows = []
    recorded = []
    axis = Axis(COUNTS[plan.unit], plan.evaluated_at)
    for run in runs:
        directory = root / run.path
        record = read_run(directory) if (directory / "metrics.jsonl").is_file() else None
        if record is not None:
            recorded.append((run.arm, record))
        row = {**vars(run), "learning_rate": run.learning_rate}
        del row["settings"]
        rows.append(row | row_of(directory, record, axis, plan.metric, plan.failure_below))
    check_equal(recorded, varying=["learning_rate"])
    return rows


def row_of(
    directory: Path,
    run: RecordedRun | None,
    axis: Axis,
    metric: str,
    failure_below: float | None,
) -> dict[str, Any]:
    """Return what the table says of a run, ended or not.

    A run that ended before the budget keeps the values of its last evaluation, also if it failed.

    Args:
        directory: its directory.
        run: what its files say; None where it has written none.
        axis: where its curve is read.
        metric: the score that decides.
        failure_below: the reward at the end below which it failed; None for no such reward.

    Returns:
        `state`; `reason`, why it has not finished or has failed; `failed`, also without a score or by its reward at
        the end; `flags` of its own verdict, as summary.json has them; `samples`; the scores; means over training
        steps; and its `curve`, a frame of the metrics of evaluations by `samples`, interpolated between evaluations
        and constant after the last; None without any.
    """
    state, reason = _state(directory, run)
    flags = run.summary.get("flags", []) if run else []
    row: dict[str, Any] = {
        "state": state,
        "flags": " ".join(flags),
        **dict.fromkeys(SCORES, math.nan),
    }
    row["curve"] = None
    if run and run.metrics:
        row |= _scores(run, axis)
    threshold = -math.inf if failure_below is None else failure_below
    if state == "finished" and math.isnan(row[metric]):
        reason = f"It has no {metric}."
    elif state == "finished" and row["reward"] < threshold:
        reason = f"Its reward at the end, {row['reward']:.3g}, is below {threshold:g}."
    return row | {"reason": reason, "failed": state in ENDED and reason != ""}


def _scores(run: RecordedRun, axis: Axis) -> dict[str, Any]:
    """Return the scores and facts of a run, and its curve at the points at which all arms are compared.

    Arms are evaluated after nearly, but not always exactly, the same numbers of samples: a step of ReMax, for
    example, has more of them. Between two evaluations a curve is interpolated linearly.
    """
    columns = ["step", *COUNTS.values(), *TRAINED]
    steps = pd.DataFrame(run.metrics, columns=columns).set_index("step").astype(float)
    samples = axis.along(steps)
    curve = pd.DataFrame({"samples": [0.0, *axis.points]})
    for name in CURVES:
        evaluated, values = run.series(f"eval_{name}")
        if values:
            at = samples.reindex(evaluated, method="ffill")
            curve[name] = np.interp(curve["samples"], at, values)
    scores = {"samples": samples.iloc[-1], "curve": curve}
    for name in curve.columns.intersection(["reward", "reward_greedy"]):
        scores[name.replace("reward", "area")] = curve[name].iloc[1:].mean()
        scores[name] = curve[name].iloc[-1]
    within = (steps.index > 0) & (samples.shift(fill_value=0.0) < axis.points[-1])
    trained = steps[within]
    tenth = max(1, len(trained) // 10)
    scores |= trained[[*TRAINED]].mean().rename(TRAINED)
    return scores | {"entropy": trained["entropy"][-tenth:].mean()}


def _state(directory: Path, run: RecordedRun | None) -> tuple[State, str]:
    """Return how a run stands, and why it has not finished."""
    summary = run.summary if run else {}
    log = Path(f"{directory}.log")
    printed = read_file(log).decode("utf-8", "replace").strip()[-LOG_TAIL:] if log.is_file() else ""
    if ended_by_itself(summary):
        return "finished", ""
    if in_use(directory):
        return "running", "It is under way."
    if str(summary.get("exit_reason")).startswith("SIG"):
        return "stopped", f"{summary['exit_reason']} stopped it; the same command goes on with it."
    if not (run or printed):
        return "absent", "It has not begun."
    error = summary.get("error") or " ".join(printed.split())
    return "failed", str(error or "It was ended from outside, as for want of memory.")


def is_done(run: PlannedRun, root: Path) -> bool:
    """Return whether a run has ended by itself; one that failed or was stopped by a signal has not."""
    summary = root / run.path / "summary.json"
    return summary.is_file() and ended_by_itself(read_config(summary))
