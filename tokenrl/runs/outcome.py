"""The result of a run, and where its model lies."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tokenrl.runs.checkpoint import verify_source


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


def model_directory(name_or_path: str | Path) -> str | Path:
    """Return where a model lies: `model/` for a run directory, else the path or hub name itself.

    Raises:
        Refused: the path is a damaged checkpoint; the message names the file.
    """
    run = Path(name_or_path)
    there = os.path.exists(run / "metrics.jsonl") and os.path.isdir(run / "model")
    found = run / "model" if there else name_or_path
    if os.path.isdir(found):
        verify_source(Path(found))
    return found
