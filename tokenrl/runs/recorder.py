"""Records and shows the steps of a run: in metrics.jsonl and timings.jsonl, in trackers, on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenrl.runs.console import Console, Progress
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.metrics import MetricsLog
from tokenrl.runs.timings import peak_memory
from tokenrl.runs.trackers import TrackerArguments, Trackers


class Recorder:
    """The logs of a run and its live line; without `start`, as on all processes but the main one, it is idle.

    Attributes:
        last: the last step in the logs.
    """

    def __init__(self, console: Console, tracking: TrackerArguments | None) -> None:
        """Look the trackers up.

        Raises:
            Refused: a tracker cannot be used.
        """
        self.last = 0
        self._console = console
        self._trackers = Trackers(tracking or TrackerArguments(), console.warn)
        self._logs: list[MetricsLog | Trackers] = []
        self._progress: Progress | None = None

    def start(self, directory: RunDirectory, config: Mapping[str, Any]) -> None:
        """Open the logs in a run directory, and start the trackers with the run's configuration."""
        self._trackers.start(config, directory.path)
        self._logs = [MetricsLog(directory.metrics, directory.timings), self._trackers]

    def show(self, total: int, first: int) -> None:
        """Show the live line of a run of `total` steps after `first`."""
        self._progress = self._console.progress(total, first).__enter__()

    def hide(self) -> None:
        """Take the live line away, which prints a line; a second call does nothing."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.__exit__()

    def write(self, step: int, metrics: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Record and show the metrics of a step; with its timings go the memory that the run has held."""
        timings = None if timings is None else {**timings, **peak_memory()}
        for log in self._logs:
            log.write(step, metrics, timings)
        self.last = step
        if self._progress is not None:
            self._progress.update(step, {**metrics, **(timings or {})})

    def track(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the trackers what was measured after the step's line was written."""
        self._trackers.write(step, metrics)

    def close(self) -> None:
        """Close the files, and end the trackers, which may take a while."""
        for log in self._logs:
            log.close()
