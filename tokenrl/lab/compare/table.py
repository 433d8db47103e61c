"""Reads runs into one table: how each ended, its scores and curves, and facts about its training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tokenrl.configuration import read_config
from tokenrl.errors import Refused
from tokenrl.lab.compare.plan import SCORES, Plan, PlannedRun, Problem
from tokenrl.runs.reader import RecordedRun, read_run, series
from tokenrl.runs.signals import SIGNALS, ended_by_itself

DECISIVE = (
    *("task", "env", "model", "dtype", "base_seed", "chat", "system_prompt", "stop"),
    *("max_completion_length", "teacher", "teacher_template"),
)
"""Settings that decide data and models; runs in which one differs may differ in these too."""
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


class RunTable(NamedTuple):
    """All runs of a comparison.

    Attributes:
        runs: one row for each: `problem`, `arm`, `seed`, `role`, `state` (`finished`, `failed` or `missing`),
            `reason` (why it did not finish), `failed` (also without a score, or by its reward at the end),
            `flags` (of its own verdict, as summary.json has them), `learning_rate`, `samples`, the scores, means
            over training steps, and `path`.
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

    def of(self, problem: str, role: str = "comparison") -> pd.DataFrame:
        """Return the rows of the runs on a problem."""
        return self.runs.query("problem == @problem and role == @role")


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
        Refused: a file of a run is damaged, or runs differ in code, data or models.
    """
    problems = {problem.label: problem for problem in plan.problems}
    hashes = dict[str, tuple[str, str]]()
    threshold = -math.inf if plan.failure_below is None else plan.failure_below
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
            "flags": " ".join(recorded.summary.get("flags", [])) if recorded else "",
            **dict.fromkeys(SCORES, math.nan),
            "curve": None,
        }
        del row["settings"]
        if recorded:
            _check_hashes(run, recorded, hashes)
        if recorded and recorded.metrics:
            scores, curve = _scores(recorded, problems[run.problem])
            labels = {name: row[name] for name in ("problem", "arm", "role", "path")}
            row |= scores | {"curve": curve.assign(**labels)}
        if state == "finished" and math.isnan(row[plan.metric]):
            row["reason"] = f"It has no {plan.metric}."
        elif state == "finished" and row["reward"] < threshold:
            row["reason"] = f"Its reward at the end, {row['reward']:.3g}, is below {threshold:g}."
        row["failed"] = state != "missing" and row["reason"] != ""
        rows.append(row)
    return rows


def _check_hashes(
    run: PlannedRun, recorded: RecordedRun, hashes: dict[str, tuple[str, str]]
) -> None:
    """Refuse a run whose code, data or models differ from those of a run before it, whose hashes are kept."""
    decisive = [run.settings.get(name) for name in DECISIVE]
    for name, digest in recorded.config.get("hashes", {}).items():
        first, path = hashes.setdefault(f"{name} {decisive}", (digest, run.path))
        if digest != first:
            raise Refused(
                f"The runs {path} and {run.path} cannot be compared, as they differ in {name}. Make all runs with "
                "the same code, data and models, in an empty --output-dir."
            )


def _scores(run: RecordedRun, problem: Problem) -> tuple[dict[str, float], pd.DataFrame]:
    """Return the scores and facts of a run, and its curve at the samples at which all arms are compared.

    Arms are evaluated after nearly, but not always exactly, the same numbers of samples: a step of ReMax, for
    example, has more of them. Between two evaluations a curve is interpolated linearly.
    """
    count = COUNTS[problem.unit]
    steps = pd.DataFrame(run.metrics, columns=["step", count, *TRAINED]).set_index("step")
    steps = steps.astype(float)
    counts = steps[count].fillna(0.0)
    samples = counts.cumsum() if problem.unit == "episodes" else counts.cummax()
    curve = pd.DataFrame({"samples": [0.0, *problem.evaluated_at]})
    for name in CURVES:
        evaluated, values = series(run.evaluations, name)
        if evaluated:
            at = samples.reindex(evaluated, method="ffill")
            curve[name] = np.interp(curve["samples"], at, values)
    scores = {"samples": samples.iloc[-1]}
    for name, area in (("reward", "area"), ("reward_greedy", "area_greedy")):
        if name in curve:
            scores[area] = curve[name].iloc[1:].mean()
            scores[name] = curve[name].iloc[-1]
    trained = steps[(steps.index > 0) & (samples.shift(fill_value=0.0) < problem.budget)]
    tenth = max(1, len(trained) // 10)
    scores |= {name: trained[metric].mean() for metric, name in TRAINED.items()}
    return scores | {"entropy": trained["entropy"][-tenth:].mean()}, curve


def _state(recorded: RecordedRun | None, directory: Path) -> tuple[str, str]:
    """Return whether a run finished, failed or is still to be made, and why it has not finished."""
    summary = recorded.summary if recorded else {}
    log = Path(f"{directory}.log")
    printed = log.read_text("utf-8", "replace").strip()[-LOG_TAIL:] if log.is_file() else ""
    if ended_by_itself(summary):
        return "finished", ""
    if summary.get("exit_reason") in SIGNALS.values() or not (recorded or printed):
        return "missing", "It has not ended; the same command goes on with it."
    error = summary.get("error") or " ".join(printed.split())
    return "failed", str(error or "It was ended from outside, as for want of memory.")


def is_done(run: PlannedRun, root: Path) -> bool:
    """Return whether a run has ended by itself; one that failed or was stopped by a signal has not."""
    summary = root / run.path / "summary.json"
    return summary.is_file() and ended_by_itself(read_config(summary))
