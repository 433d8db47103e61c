"""What a run came to, and where its model lies."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a run came to; each training adds what is its own.

    Attributes:
        output_dir: the run directory.
        exit_reason: `finished`, `check`, `SIGTERM` or `SIGINT`, or how else the training says it ended.
        exit_code: 0, or 128 plus the signal's number.
        steps: updates made.
        eval_before: metrics of the evaluation before training.
        eval_after: those of the evaluation after it; empty if a signal ended the run between two evaluations.
        wall_seconds: from the first evaluation to the last.
    """

    output_dir: Path
    exit_reason: str
    exit_code: int
    steps: int
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    wall_seconds: float

    def summary(self) -> dict[str, Any]:
        """What summary.json says: all fields that are shown but the directory and the exit code."""
        shown = [f.name for f in fields(self) if f.repr and f.name not in ("output_dir", "exit_code")]
        return {name: getattr(self, name) for name in shown}


def model_directory(name_or_path: str | Path) -> str | Path:
    """Return where a model lies: a run directory keeps it in `model/`, anything else is the place itself."""
    run = Path(name_or_path)
    return run / "model" if (run / "metrics.jsonl").exists() and (run / "model").is_dir() else name_or_path
