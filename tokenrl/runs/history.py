"""Remembers of a run what later steps, its summary, and its continuation need."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


class History:
    """What is known of the steps so far: evaluations, warnings that were given, time.

    Attributes:
        step: number of the current step, from 1; 0 before the first.
        flags: warnings about the outcome.
        ended: why the run ended by itself before its last step, if it did; else None.
    """

    def __init__(self) -> None:
        """Start before the first step."""
        self.step = 0
        self.flags: list[str] = []
        self.ended: str | None = None
        self._evaluations: dict[int, dict[str, float]] = {}  # metrics by step
        self._warned: set[str] = set()
        self._began, self._seconds = time.monotonic(), 0.0  # seconds before the run was continued

    @property
    def eval_before(self) -> dict[str, float]:
        """The metrics of the evaluation before training; empty if there was none."""
        return self._evaluations.get(0, {})

    @property
    def is_evaluated(self) -> bool:
        """Whether the current step has been evaluated."""
        return self.step in self._evaluations

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken, without those between its end and its continuation."""
        return self._seconds + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation must know; of the evaluations the first and the last."""
        kept = sorted({0, max(self._evaluations, default=0)} & self._evaluations.keys())
        return {
            "evaluations": {str(step): self._evaluations[step] for step in kept},
            "warned": sorted(self._warned),
            "flags": list(self.flags),
            "ended": self.ended,
            "seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._evaluations = {int(step): dict(metrics) for step, metrics in state["evaluations"].items()}
        self._warned, self.flags = set(state["warned"]), list(state["flags"])
        self.ended, self._seconds = state["ended"], state["seconds"]
