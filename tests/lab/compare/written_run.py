"""Run directories with chosen metrics, written as a session writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from made_comparison import PROBLEM

from tokenrl.lab.compare.records import PlannedRun, Problem, RunRecord
from tokenrl.lab.compare.results import read_record
from tokenrl.runs.files import write_json
from tokenrl.runs.metrics import MetricsLog

FINISHED = {"exit_reason": "finished"}
FIVE = dict(zip((10, 20, 30, 40, 50), (0.2, 0.3, 0.5, 0.7, 0.8), strict=True))
"""Rewards by step at the evaluations that the problem plans."""

Row = dict[str, Any]


def planned(problem: Problem = PROBLEM, **settings: Any) -> PlannedRun:
    made = {
        **problem.settings,
        "estimator": {},
        "learning_rate": problem.learning_rate,
        "seed": 3,
        **settings,
    }
    return PlannedRun(problem.label, "rloo", 3, "comparison", problem.kind, "runs/digits/rloo/seed_3", made)


def rows_of(
    evaluations: Mapping[int, float], *, last: int = 50, per_step: int = 8, **metrics: Any
) -> list[Row]:
    """A row for each step, before training too; those with an evaluation have its reward."""
    rows: list[Row] = [{"step": 0, "eval_reward": 0.1, "eval_reward_greedy": 0.0}]
    for step in range(1, last + 1):
        rows.append({"step": step, "num_samples": per_step * step, **metrics})
        if step in evaluations:
            reward = evaluations[step]
            rows[-1] |= {"eval_reward": reward, "eval_reward_greedy": 1 - reward}
    return rows


def write_run(
    root: Path, rows: Sequence[Row], summary: Row | None = FINISHED, config: Row | None = None
) -> PlannedRun:
    """Write a run as a session writes it; each step took half a second."""
    run = planned()
    folder = root / run.path
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**run.settings, "kind": "train", "versions": {}, **(config or {})})
    with MetricsLog(folder / "metrics.jsonl", folder / "timings.jsonl") as log:
        for row in rows:
            log.write(row["step"], row, {"step_seconds": 0.5} if row["step"] else None)
    if summary is not None:
        write_json(folder / "summary.json", summary)
    return run


def read(root: Path, rows: Sequence[Row], summary: Row | None = FINISHED, **config: Any) -> RunRecord:
    return read_record(write_run(root, rows, summary, config), root, PROBLEM)
