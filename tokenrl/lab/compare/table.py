"""Reads runs into one table: how each ended, its scores and curves, and facts about its training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tokenrl.configuration import read_config
from tokenrl.lab.compare.plan import SCORES, Plan, PlannedRun, Problem
from tokenrl.runs.reader import RecordedRun, read_run, series
from tokenrl.runs.signals import SIGNALS

ENDED = ("finished", "learnt", "stuck", "solved")
"""Exit reasons of a run that ended by itself; all but the first may occur before its budget is used."""
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
LOG_TAIL = 400


class RunTable(NamedTuple):
    """All runs of a comparison.

    Attributes:
        runs: one row for each: `problem`, `arm`, `seed`, `role`, `state` (`finished`, `failed` or `missing`),
            `reason` (why it did not finish), `failed` (also by its reward at the end), `learning_rate`,
            `samples`, the scores, means over training steps, and `path`.
        curves: one row for each run and number of samples: `problem`, `arm`, `role`, `path`, `samples` and
            the metrics of evaluations, interpolated between evaluations and constant after the last.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> RunTable:
        """Make the table from the rows that `read_runs` returns."""
        curves = [pd.DataFrame(columns=["problem", "arm", "role", "path", "samples", "reward"])]
        curves += [row["curve"] for row in rows if row["curve"] is not None]
        runs = pd.DataFrame(rows).drop(columns="curve")
        return cls(runs, pd.concat(curves, ignore_index=True))

    def of(self, problem: str, arm: str | None = None, role: str = "comparison") -> pd.DataFrame:
        """Return the rows of the runs on a problem, of one arm or of all."""
        runs = self.runs.query("problem == @problem and role == @role")
        return runs if arm is None else runs.query("arm == @arm")

    def curves_of(self, problem: str) -> pd.DataFrame:
        """Return the curves of the runs on a problem that are compared."""
        return self.curves.query("problem == @problem and role == 'comparison'")


def read_runs(plan: Plan, runs: Iterable[PlannedRun], root: Path) -> list[dict[str, Any]]:
    """Read runs of a comparison, finished or not.

    A run that ended before the budget keeps the values of its last evaluation, also if it failed. A run with
    refills generates more samples than the budget; it is read at the budget, and what comes later is ignored.

    Args:
        plan: the comparison.
        runs: the runs.
        root: its directory.

    Returns:
        A row for each run, as `RunTable.runs` has them, and its `curve`: None, or rows of `RunTable.curves`.

    Raises:
        Refused: a file of a run is damaged.
    """
    problems = {problem.label: problem for problem in plan.problems}
    rows = []
    for run in runs:
        path = root / run.path
        recorded = read_run(path) if (path / "metrics.jsonl").is_file() else None
        state, reason = _state(recorded, path)
        row = {
            **vars(run),
            "learning_rate": run.learning_rate,
            "state": state,
            "reason": reason,
            **dict.fromkeys(SCORES, math.nan),
            "curve": None,
        }
        del row["settings"]
        if recorded and recorded.metrics:
            scores, curve = _scores(recorded, problems[run.problem])
            labels = {name: row[name] for name in ("problem", "arm", "role", "path")}
            row |= scores | {"curve": curve.assign(**labels)}
        row["failed"] = state == "failed"
        if plan.failure_below is not None and row["reward"] < plan.failure_below:
            row["failed"] = True
            row["reason"] = (
                reason
                or f"Its reward at the end, {row['reward']:.3g}, is below {plan.failure_below:g}."
            )
        rows.append(row)
    return rows


def samples_of(run: RecordedRun, unit: str) -> pd.Series:
    """Return by step the number of samples that a run had generated."""
    metric = COUNTS[unit]
    steps = pd.DataFrame(run.metrics, columns=["step", metric]).set_index("step")
    counts = steps[metric].astype(float).fillna(0.0)
    return counts.cumsum() if unit == "episodes" else counts.cummax()


def _scores(run: RecordedRun, problem: Problem) -> tuple[dict[str, float], pd.DataFrame]:
    """Return the scores and facts of a run, and its curve at the samples at which all arms are compared.

    Arms are evaluated after nearly, but not always exactly, the same numbers of samples: a step of ReMax, for
    example, has more of them. Between two evaluations a curve is interpolated linearly.
    """
    samples = samples_of(run, problem.unit)
    curve = pd.DataFrame({"samples": [0.0, *problem.evaluated_at]})
    for name in CURVES:
        steps, values = series(run.evaluations, name)
        if steps:
            evaluated = samples.reindex(steps, method="ffill")
            curve[name] = np.interp(curve["samples"], evaluated, values)
    scores = {"samples": samples.iloc[-1]}
    for name, area in (("reward", "area"), ("reward_greedy", "area_greedy")):
        if name in curve:
            scores[area] = curve[name].iloc[1:].mean()
            scores[name] = curve[name].iloc[-1]
    if "reward" in curve:
        scores["before"] = curve["reward"].iloc[0]
        scores["gain"] = scores["reward"] - scores["before"]
    before_step = samples.shift(fill_value=0.0)
    last_step = before_step.index[before_step < problem.budget][-1]
    return scores | _training_facts(run, last_step), curve


def _state(recorded: RecordedRun | None, directory: Path) -> tuple[str, str]:
    """Return whether a run finished, failed or is still to be made, and why it has not finished."""
    summary = recorded.summary if recorded else {}
    ending = summary.get("exit_reason")
    if ending in ENDED:
        return "finished", ""
    if ending in SIGNALS.values():
        return "missing", f"It was stopped by {ending}; the same command continues it."
    if summary:
        return "failed", str(summary.get("error") or f"It ended as {ending}.")
    log = Path(f"{directory}.log")
    printed = log.read_text("utf-8", "replace").strip()[-LOG_TAIL:] if log.is_file() else ""
    if printed:
        return "failed", " ".join(printed.split())
    if recorded:
        return "failed", "It was ended from outside, as for want of memory."
    return "missing", "It has not been run."


def is_done(run: PlannedRun, root: Path) -> bool:
    """Return whether a run has ended by itself; one that failed or was stopped by a signal has not."""
    summary = root / run.path / "summary.json"
    return summary.is_file() and read_config(summary).get("exit_reason") in ENDED


def _training_facts(run: RecordedRun, last_step: int) -> dict[str, float]:
    """Return means up to a step: entropy in the last tenth of them, and what `tokenrl.runs.rules` read.

    A Gaussian head has no `early_entropy`, because the entropy of a density may be negative without harm.
    """
    config = run.config
    steps = pd.DataFrame(run.metrics).query("0 < step <= @last_step")
    tenth = max(1, len(steps) // 10)
    early = steps[:tenth].mean(numeric_only=True)
    whole = steps.mean(numeric_only=True)
    late = steps[-tenth:].mean(numeric_only=True)
    updates_per_step = config.get("num_iterations", 1) * config.get("num_minibatches", 1)
    updates = max(1, len(steps)) * updates_per_step
    counts = steps.filter(["skipped_steps"]).fillna(0).max() / updates
    means = {
        "entropy": late.get("entropy"),
        "early_entropy": early.get("entropy"),
        "early_equal": early.get("frac_reward_zero_std"),
        "recent_cut": whole.get("completions/clipped_ratio"),
        "grad_clipped": whole.get("grad_clipped"),
        "skipped": counts.get("skipped_steps"),
    }
    if config.get("head") == "gaussian":
        del means["early_entropy"]
    return {name: float(value) for name, value in means.items() if value is not None}


def thresholds(problem: Problem, table: RunTable) -> pd.DataFrame:
    """Count the samples until the reward that counts as solved, else until half of the best arm's gain.

    Returns:
        By arm, how many runs reach it in an evaluation, and the median of the samples until the first such
        evaluation, in which a run without one counts as infinite.
    """
    runs = table.of(problem.label)
    curves = table.curves_of(problem.label)
    threshold = problem.solved
    origin = "solved"
    if threshold is None:
        start = runs["before"].mean()
        best = runs.groupby("arm")["reward"].mean().max()
        if not best > start:
            return pd.DataFrame(columns=["problem", "arm"])
        threshold = (start + best) / 2
        origin = "half of the best arm's gain"
    first = curves.query("reward >= @threshold").groupby("path")["samples"].min()
    needed = runs["path"].map(first).fillna(math.inf)
    by_arm = pd.DataFrame(
        {
            "arm": runs["arm"],
            "needed": needed,
            "reached": np.isfinite(needed),
        }
    )
    summary = by_arm.groupby("arm", sort=False).agg(
        runs=("needed", "size"),
        reached=("reached", "sum"),
        median_samples=("needed", "median"),
    )
    return summary.reset_index().assign(
        problem=problem.label,
        threshold=threshold,
        chosen=origin,
    )
