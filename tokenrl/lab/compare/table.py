"""Reads runs into one table: how each ended, its scores and curves, and facts about its training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokenrl.configuration import read_config
from tokenrl.errors import Refused, read_file
from tokenrl.lab.compare.plan import SCORES, Plan, PlannedRun
from tokenrl.runs.findings import Mean, evaluations
from tokenrl.runs.reader import RecordedRun, read_run
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


def read_runs(plan: Plan, runs: Iterable[PlannedRun], root: Path) -> list[dict[str, Any]]:
    """Read runs of a comparison, finished or not.

    A run that ended before the budget keeps the values of its last evaluation, also if it failed. A run with
    refills generates more samples than the budget; it is read at the budget, and what comes later is ignored.

    Args:
        plan: the comparison.
        runs: the runs.
        root: its directory.

    Returns:
        For each run `problem`, `arm`, `seed`, `role`, `path`, `state` (`finished`, `failed` or `missing`),
        `reason` (why it did not finish), `failed` (also without a score, or by its reward at the end), `flags`
        (of its own verdict, as summary.json has them), `learning_rate`, `samples`, the scores, means over
        training steps, and its `curve`: a frame of the metrics of evaluations by `samples`, interpolated
        between evaluations and constant after the last; None without any.

    Raises:
        Refused: a file of a run is damaged, or runs differ in code, data or models.
    """
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
            "flags": " ".join(recorded.summary.get("flags", [])) if recorded else "",
            **dict.fromkeys(SCORES, math.nan),
            "curve": None,
        }
        del row["settings"]
        if recorded:
            _check_hashes(run, recorded, hashes)
        if recorded and recorded.metrics:
            row |= _scores(recorded, plan)
        if state == "finished" and math.isnan(row[plan.metric]):
            reason = f"It has no {plan.metric}."
        elif state == "finished" and row["reward"] < threshold:
            reason = f"Its reward at the end, {row['reward']:.3g}, is below {threshold:g}."
        rows.append(row | {"reason": reason, "failed": state != "missing" and reason != ""})
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


def _scores(run: RecordedRun, plan: Plan) -> dict[str, Any]:
    """Return the scores and facts of a run, and its curve at the samples at which all arms are compared.

    Arms are evaluated after nearly, but not always exactly, the same numbers of samples: a step of ReMax, for
    example, has more of them. Between two evaluations a curve is interpolated linearly.
    """
    count = COUNTS[plan.unit]
    steps = pd.DataFrame(run.metrics, columns=["step", count, *TRAINED]).set_index("step")
    steps = steps.astype(float)
    counts = steps[count].fillna(0.0)
    samples = counts.cumsum() if plan.unit == "episodes" else counts.cummax()
    curve = pd.DataFrame({"samples": [0.0, *plan.evaluated_at]})
    for name in CURVES:
        means = pd.DataFrame(evaluations(run.evaluations, name), columns=Mean._fields)
        if len(means):
            at = samples.reindex(means["step"], method="ffill")
            curve[name] = np.interp(curve["samples"], at, means["value"])
    scores = {"samples": samples.iloc[-1], "curve": curve}
    for name in curve.columns.intersection(["reward", "reward_greedy"]):
        scores[name.replace("reward", "area")] = curve[name].iloc[1:].mean()
        scores[name] = curve[name].iloc[-1]
    trained = steps[(steps.index > 0) & (samples.shift(fill_value=0.0) < plan.budget)]
    tenth = max(1, len(trained) // 10)
    scores |= trained[[*TRAINED]].mean().rename(TRAINED)
    return scores | {"entropy": trained["entropy"][-tenth:].mean()}


def _state(recorded: RecordedRun | None, directory: Path) -> tuple[str, str]:
    """Return whether a run finished, failed or is still to be made, and why it has not finished."""
    summary = recorded.summary if recorded else {}
    log = Path(f"{directory}.log")
    printed = read_file(log).decode("utf-8", "replace").strip()[-LOG_TAIL:] if log.is_file() else ""
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
