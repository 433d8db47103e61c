"""Reads runs into one table: how each ended, its scores and curves, and facts about its training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tokenrl.configuration import read_config
from tokenrl.errors import read_file
from tokenrl.lab.compare.equality import check_equal
from tokenrl.lab.compare.plan import SCORES, Plan, PlannedRun
from tokenrl.runs import ENDED, RecordedRun, ended_by_itself, read_run, state_of

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


def points(budget: int, every: int) -> tuple[int, ...]:
    """Return the numbers at which runs are evaluated, up to the budget; `every` is 0 for the budget alone."""
    step = every or budget
    return (*range(step, budget, step), budget)


def read_runs(plan: Plan, runs: Iterable[PlannedRun], root: Path) -> list[dict[str, Any]]:
    """Read runs of a comparison, ended or not.

    A run with refills generates more samples than the budget; it is read at the budget, and what comes later is
    ignored.

    Args:
        plan: the comparison.
        runs: the runs.
        root: its directory.

    Returns:
        For each run `problem`, `arm`, `seed`, `role`, `path`, `learning_rate`, and what `rows_of` returns.

    Raises:
        Refused: a file of a run is damaged, or two runs cannot be compared (see `check_equal`).
    """
    read = []
    for run in runs:
        directory = root / run.path
        record = read_run(directory) if (directory / "metrics.jsonl").is_file() else None
        facts = {**vars(run), "learning_rate": float(run.settings["learning_rate"])}
        del facts["settings"]
        read.append((facts, directory, record))
    axis = Axis(COUNTS[plan.unit], points(plan.budget, plan.every))
    return rows_of(read, axis, plan.metric, plan.failure_below, varying=["learning_rate"])


def rows_of(
    runs: Sequence[tuple[Mapping[str, Any], Path, RecordedRun | None]],
    axis: Axis,
    metric: str,
    failure_below: float | None,
    varying: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the rows of runs, ended or not, once it is sure that they can be compared.

    A run that ended before the budget keeps the values of its last evaluation, also if it failed.

    Args:
        runs: for each what is known beforehand, its `arm` among that, its directory, and what its files say; None
            where it has written none.
        axis: where the curves are read.
        metric: the score that decides.
        failure_below: the reward at the end below which a run failed; None for no such reward.
        varying: settings that may differ between the runs of an arm, beside the seed.

    Returns:
        For each run what is known, and `state`; `reason`, why it has not finished or has failed; `failed`, also
        without a score or by its reward at the end; `flags` of its own verdict, as summary.json has them; `samples`;
        the scores; means over training steps; and its `curve`, a frame of the metrics of evaluations by `samples`,
        interpolated between evaluations and constant after the last; None without any.

    Raises:
        Refused: two runs cannot be compared (see `check_equal`).
    """
    check_equal([(facts["arm"], run) for facts, _, run in runs if run is not None], varying)
    threshold = -math.inf if failure_below is None else failure_below
    rows = []
    for facts, directory, run in runs:
        log = Path(f"{directory}.log")
        printed = read_file(log).decode("utf-8", "replace") if log.is_file() else ""
        state, reason = state_of(directory, run, printed)
        row = {**facts, "state": state, "flags": "", **dict.fromkeys(SCORES, math.nan)}
        row["curve"] = None
        if run is not None:
            row["flags"] = " ".join(run.summary.get("flags", []))
            row |= _scores(run, axis) if run.metrics else {}
        if state == "finished" and math.isnan(row[metric]):
            reason = f"It has no {metric}."
        elif state == "finished" and row["reward"] < threshold:
            reason = f"Its reward at the end, {row['reward']:.3g}, is below {threshold:g}."
        rows.append(row | {"reason": reason, "failed": state in ENDED and reason != ""})
    return rows


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


def is_done(run: PlannedRun, root: Path) -> bool:
    """Return whether a run has ended by itself; one that failed or was stopped by a signal has not."""
    summary = root / run.path / "summary.json"
    return summary.is_file() and ended_by_itself(read_config(summary))
