"""Reads runs into one table: how each ended, its scores and curves, and facts about its training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokenrl.lab.compare.plan import PlannedRun, Problem
from tokenrl.runs.reader import RecordedRun, read_run, series
from tokenrl.runs.signals import SIGNALS

ENDED = ("finished", "learnt", "stuck", "solved")
"""The exit reasons of a run that ended by itself; all but the first may come before its budget is used."""
SCORES = {
    "area": "mean held-out sampled reward over the evaluations of the budget",
    "reward": "held-out sampled reward at the end",
    "area_greedy": "mean held-out greedy reward over the evaluations of the budget",
    "reward_greedy": "held-out greedy reward at the end",
    "entropy": "entropy in the last tenth of the steps, nats per action (token)",
    "kl": "KL to the reference policy in the last tenth of the steps, nats per completion",
}
"""The scores of a run in words; in control the rewards are returns of episodes. Of the first four a greater
one is better."""
CURVES = ("reward", "reward_greedy", "entropy", "completions/mean_length", "completions/clipped_ratio")
COUNTS = {"completions": "num_samples", "environment steps": "num_env_steps", "episodes": "episodes"}
"""By the unit of the budget, the metric that counts samples."""
LOG_TAIL = 400


@dataclass(frozen=True)
class RunTable:
    """All runs of a comparison.

    Attributes:
        runs: one row for each: `problem`, `arm`, `seed`, `role`, `state` (`finished`, `failed` or `missing`),
            `reason` (why it did not finish), `failed` (also by its reward at the end), `learning_rate`,
            `samples`, the scores, means over training steps, and `path`.
        curves: one row for each run and place: `path`, `samples` and the metrics of evaluations, interpolated
            between evaluations and kept after the last.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame

    def of(self, problem: str, arm: str | None = None, role: str = "comparison") -> pd.DataFrame:
        """Return the rows of the runs on a problem, of one arm or of all."""
        runs = self.runs[(self.runs["problem"] == problem) & (self.runs["role"] == role)]
        return runs if arm is None else runs[runs["arm"] == arm]


def read_runs(
    runs: Iterable[PlannedRun], root: Path, problems: Sequence[Problem], failure_below: float | None
) -> RunTable:
    """Read runs, finished or not.

    A run that ended before its budget was used keeps the values of its last evaluation, also if it failed.

    Args:
        runs: the runs.
        root: directory of the comparison.
        problems: what they train on.
        failure_below: a run with a lower sampled reward at its end failed.

    Raises:
        Refused: a file of a run is damaged.
    """
    by_label, rows, curves = {problem.label: problem for problem in problems}, [], []
    for run in runs:
        row, curve = _read_run(run, root, by_label[run.problem])
        low = failure_below is not None and row.get("reward", math.inf) < failure_below
        if low and not row["reason"]:
            row["reason"] = f"Its reward at the end, {row['reward']:.3g}, is below {failure_below:g}."
        rows.append({**row, "failed": row["state"] == "failed" or low, "path": run.path})
        if curve is not None:
            curves.append(curve.assign(path=run.path))
    table = pd.DataFrame(rows)
    table = table.reindex(columns=[*table.columns, *(n for n in ("area", "reward") if n not in table)])
    empty = pd.DataFrame(columns=["path", "samples", "reward"])
    return RunTable(table, pd.concat(curves, ignore_index=True) if curves else empty)


def _read_run(run: PlannedRun, root: Path, problem: Problem) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Return the row and the curve of a run; None for a curve without any evaluation."""
    found = read_run(root / run.path) if (root / run.path / "metrics.jsonl").is_file() else None
    state, reason = _state(found, root / run.path)
    row = {"problem": run.problem, "arm": run.arm, "seed": run.seed, "role": run.role, "state": state,
           "reason": reason, "learning_rate": run.settings.get("learning_rate")}  # fmt: skip
    if found is None or not found.metrics:
        return row, None
    steps = pd.DataFrame(found.metrics).set_index("step")
    counts = steps.get(COUNTS[problem.unit], pd.Series(0.0, steps.index)).astype(float).fillna(0.0)
    samples = counts.cumsum() if problem.unit == "episodes" else counts.cummax()
    curve = _curve(found, samples, problem.places)
    row |= {"samples": samples.iloc[-1]}
    for name, suffix in (("reward", ""), ("reward_greedy", "_greedy")):
        if name in curve:
            row |= {f"area{suffix}": curve[name].iloc[1:].mean(), f"reward{suffix}": curve[name].iloc[-1]}
    if "reward" not in curve:
        return row, None
    row |= {"before": curve["reward"].iloc[0], "gain": row["reward"] - curve["reward"].iloc[0]}
    return row | _facts(steps[steps.index > 0], found.config), curve


def _state(found: RecordedRun | None, directory: Path) -> tuple[str, str]:
    """Return whether a run finished, failed or is still to be made, and why it has not finished."""
    summary = found.summary if found else {}
    if summary.get("exit_reason") in ENDED:
        return "finished", ""
    if summary.get("exit_reason") in SIGNALS.values():
        return "missing", f"It was stopped by {summary['exit_reason']}; the same command continues it."
    if summary:
        return "failed", str(summary.get("error") or f"It ended as {summary['exit_reason']}.")
    log = Path(f"{directory}.log")
    printed = log.read_text("utf-8", "replace").strip()[-LOG_TAIL:] if log.is_file() else ""
    if printed or found:
        return "failed", " ".join(printed.split()) or "It was ended from outside, as for want of memory."
    return "missing", "It has not been run."


def is_done(run: PlannedRun, root: Path) -> bool:
    """Return whether a run has ended by itself; one that failed or was stopped by a signal has not."""
    there = (root / run.path / "metrics.jsonl").is_file()
    return there and read_run(root / run.path).summary.get("exit_reason") in ENDED


def _curve(found: RecordedRun, samples: pd.Series, places: Sequence[float]) -> pd.DataFrame:
    """Return the metrics of the evaluations at the places where all arms are compared, the first being 0.

    Arms are evaluated after nearly, but not always exactly, the same numbers of samples: a step of ReMax, for
    example, has more of them. Between two evaluations a curve is taken as straight.
    """
    curve = {"samples": np.array([0.0, *places])}
    for name in CURVES:
        steps, values = series(found.evaluations, name)
        if steps:
            at = samples.reindex(steps, method="ffill")
            curve[name] = np.interp(curve["samples"], at, values)
    return pd.DataFrame(curve)


def _facts(steps: pd.DataFrame, config: dict[str, Any]) -> dict[str, float]:
    """Return means over training steps: entropy and KL in the last tenth, and facts of `tokenrl.runs.rules`.

    A Gaussian head has no `early_entropy`, because the entropy of a density may be negative without harm.
    """
    tenth = max(1, len(steps) // 10)
    wanted = {
        "entropy": ("entropy", steps[-tenth:]),
        "kl": ("kl", steps[-tenth:]),
        "early_entropy": ("entropy", steps[: 0 if config.get("head") == "gaussian" else tenth]),
        "early_equal": ("frac_reward_zero_std", steps[:tenth]),
        "recent_cut": ("completions/clipped_ratio", steps),
        "grad_clipped": ("grad_clipped", steps),
    }
    found = {key: float(rows[name].mean()) for key, (name, rows) in wanted.items() if name in rows}
    updates = max(1, len(steps)) * config.get("num_iterations", 1) * config.get("num_minibatches", 1)
    for name in ("skipped", "idle"):
        if f"{name}_steps" in steps:
            found[name] = float(steps[f"{name}_steps"].fillna(0).max()) / updates
    return found


def to_threshold(curves: pd.DataFrame, threshold: float) -> pd.Series:
    """Return by `path` the samples at which a run first reaches a reward; infinite if it never does.

    Between the first place that reaches it and the one before, the curve is taken as straight.

    Args:
        curves: rows with `path`, `samples` and `reward`.
        threshold: the reward.
    """

    def first(curve: pd.DataFrame) -> float:
        at, reward = curve["samples"].to_numpy(), curve["reward"].to_numpy()
        reached = np.flatnonzero(reward >= threshold)
        if not len(reached):
            return math.inf
        place = reached[0]
        if place == 0:
            return 0.0
        return float(np.interp(threshold, reward[place - 1 : place + 1], at[place - 1 : place + 1]))

    return curves.groupby("path", sort=False)[["samples", "reward"]].apply(first)
