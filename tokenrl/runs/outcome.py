"""The result of a run, as Python returns it and summary.json records it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The result of a run; each training adds fields of its own.

    Attributes:
        output_dir: the run directory.
        exit_reason: `finished`, `check`, `SIGTERM`, `SIGINT`, or another reason that the training gives.
        exit_code: 0; 2 if a check found a problem; 128 plus the number of the signal that ended the run.
        steps: number of updates made.
        eval_before: metrics of the evaluation before training.
        eval_after: metrics of the evaluation after the last update; may be empty after a signal.
        wall_seconds: seconds since the run printed its header.
    """

    output_dir: Path
    exit_reason: str
    exit_code: int
    steps: int
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    wall_seconds: float

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json: the fields with `repr`, without directory and exit code."""
        shown = [f.name for f in fields(self) if f.repr and f.name not in ("output_dir", "exit_code")]
        return {name: getattr(self, name) for name in shown}
