"""Shows how far the runs of a comparison are: live on a terminal, else a line for each run that ended."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenrl.lab.compare.execution.one import RunEnd
from tokenrl.lab.compare.records import PlannedRun
from tokenrl.runs.console import Console, duration, visible

TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl in which its last line is looked for."""


class GridProgress:
    """Shows runs that ended, failed and are under way, and the time left, as a context manager."""

    def __init__(self, console: Console, runs: Sequence[PlannedRun], root: Path, places: int) -> None:
        """Prepare the lines; they appear on entering the context.

        Args:
            console: where to print.
            runs: all runs.
            root: the directory of the comparison.
            places: number of runs at the same time.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._rich, self._root, self._places = console.rich, root, places
        self._left = {run.path: run for run in runs}
        self._began: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {}
        self._failed, self._total = 0, len(runs)
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(20))
        line = TextColumn("{task.fields[line]}")
        self._live = Progress(*columns, line, console=self._rich, disable=not self._rich.is_terminal)
        self._whole = self._live.add_task("runs", total=self._total, line="")
        self._lines: dict[str, Any] = {}

    def __enter__(self) -> GridProgress:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def started(self, run: PlannedRun) -> None:
        """Show a run that has been started."""
        self._began[run.path] = time.monotonic()
        self._lines[run.path] = self._live.add_task(f"  {named(run)}", total=None, line="")

    def broken(self, run: PlannedRun, reason: str) -> None:
        """Take away the line of a run that is started again."""
        self._take_away(run)
        self._print(f"{named(run)}: {reason}; it is continued", "yellow")

    def ended(self, run: PlannedRun, end: RunEnd) -> None:
        """Show the end of a run."""
        self._take_away(run)
        del self._left[run.path]
        self._failed += end.state == "failed"
        if end.state == "finished":
            self._seconds.setdefault(run.problem, []).append(end.seconds)
        count = f"{self._total - len(self._left)}/{self._total}"
        if end.state == "failed":
            self._print(f"run {count}  {named(run)}: failed: {end.reason}", "yellow")
        elif not self._rich.is_terminal:
            taken = f"{named(run)}: finished in {duration(end.seconds)}"
            self._print("  ".join(part for part in (f"run {count}", taken, self._said()) if part))

    def tick(self) -> None:
        """Show the present steps of the runs under way, and the time left."""
        if not self._rich.is_terminal:
            return
        for path, line in self._lines.items():
            step, total = steps(self._root / path)
            self._live.update(line, completed=step, total=total)
        done = self._total - len(self._left)
        self._live.update(self._whole, completed=done, line=self._said())

    def _said(self) -> str:
        """Return how many runs failed, and the time left."""
        failed = f"{self._failed} failed" if self._failed else ""
        left = seconds_left(self._left.values(), self._began, self._seconds, self._places, time.monotonic())
        return "  ".join(part for part in (failed, "" if left is None else f"ETA {duration(left)}") if part)

    def _take_away(self, run: PlannedRun) -> None:
        self._live.remove_task(self._lines.pop(run.path))
        del self._began[run.path]

    def _print(self, line: str, style: str = "") -> None:
        self._rich.print(visible(line), style=style or None, soft_wrap=True)


def named(run: PlannedRun) -> str:
    """Name a run by what it is made of, for people."""
    rate = run.settings.get("learning_rate")
    purposes = {"tuning": f", learning rate {rate}", "itself": ", against itself", "comparison": ""}
    return f"{run.problem}: {run.arm}, seed {run.seed}{purposes[run.role]}"


def seconds_left(
    left: Any, began: dict[str, float], seconds: dict[str, list[float]], places: int, now: float
) -> float | None:
    """Return the seconds until all runs have ended, from those that finished; None before the first of them.

    A run takes as long as the finished runs of its problem did on average; of a problem without any, as long
    as all finished runs.

    Args:
        left: the runs that have not ended.
        began: when those under way began, by path.
        seconds: how long finished runs took, by problem.
        places: number of runs at the same time.
        now: the present time, on the clock of `began`.
    """
    runs = list(left)
    if not seconds or not runs:
        return None
    overall = fmean(one for several in seconds.values() for one in several)
    needed = []
    for run in runs:
        whole = fmean(seconds.get(run.problem, [overall]))
        needed.append(max(0.0, whole - (now - began[run.path] if run.path in began else 0.0)))
    return max(sum(needed) / min(places, len(runs)), max(needed))


def steps(directory: Path) -> tuple[int, int | None]:
    """Return the number of the last step in a run directory, and the number of steps of the run if known."""
    step, total = 0, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        total = int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["max_steps"])
        with (directory / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            step = int(json.loads(file.read().rsplit(b"\n", 2)[-2])["step"])
    return step, total
