"""Measures what a run costs: the time of its updates and the most memory it has held. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_GIB = 1024**3


class Stopwatch:
    """Times updates one by one, without the evaluations between them.

    Attributes:
        last: seconds of the last update.
        total: seconds of all updates so far.
    """

    last = total = 0.0

    def time(self, update: Callable[[], T]) -> T:
        """Make an update and return what it returns."""
        began = time.perf_counter()
        found = update()
        self.last = time.perf_counter() - began
        self.total += self.last
        return found

    def state_dict(self) -> dict[str, float]:
        """Return the time so far."""
        return {"seconds": self.total}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from what `state_dict` returned."""
        self.total = state["seconds"]

    def timings(self, tokens: float) -> dict[str, float]:
        """Return the seconds of the last update, and the mean rate if all of them processed `tokens`."""
        return {"step_seconds": self.last, "tokens_per_second": tokens / max(self.total, 1e-9)}


def peak_memory() -> dict[str, float]:
    """Return the most memory that this process has held so far, in GiB, as far as the system tells it.

    Returns:
        `peak_memory_gib`, the resident set; where there is a GPU, `peak_cuda_memory_gib`, the tensors on it.
    """
    found = {}
    status = Path("/proc/self/status")  # `getrusage` would also count the process that started this one
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            found["peak_memory_gib"] = int(line.split()[1]) * 1024 / _GIB
    torch = sys.modules.get("torch")  # without it nothing is on a GPU
    if torch is not None and torch.cuda.is_available():
        found["peak_cuda_memory_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return found
