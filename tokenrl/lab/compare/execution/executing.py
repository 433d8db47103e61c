"""Makes many runs, some at the same time, and goes on with them after a kill or a stop."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from tokenrl.lab.compare.execution.local import Death, LocalProcesses
from tokenrl.lab.compare.execution.one import Interrupted, RunEnd
from tokenrl.lab.compare.execution.progress import GridProgress
from tokenrl.lab.compare.records import PlannedRun
from tokenrl.runs.console import Console
from tokenrl.runs.directory import acquire_lock
from tokenrl.runs.signals import GracefulStop

TICK = 0.5
"""Seconds between two looks at the runs under way."""
DEATHS = 2
"""A run counts as failed once its process was ended from outside so often."""


class Places(Protocol):
    """Where runs take place: processes of this machine, or tasks of a Ray cluster.

    Attributes:
        places: number of runs at the same time.
    """

    places: int

    def start(self, run: PlannedRun) -> None:
        """Start a run; called only while fewer than `places` are under way."""

    def wait(self, seconds: float) -> Sequence[RunEnd | Death]:
        """Wait for the end of a run, at most so long; return those that ended."""

    def stop(self) -> None:
        """Ask the runs to save and stop; `wait` then returns their ends."""

    def close(self) -> None:
        """End all that is left, at once."""


def execute(
    runs: Sequence[PlannedRun],
    root: Path,
    *,
    executor: Literal["local", "ray"] = "local",
    workers: int | None = None,
    console: Console,
) -> dict[str, RunEnd]:
    """Make runs, each in its own directory with one thread; those that had begun are continued.

    A run that fails is told as such, and the others go on. If the process of a run is killed, the run is
    continued once. If this process is killed, its runs end at once; the same call continues them.

    Args:
        runs: the runs.
        root: the directory of the comparison.
        executor: `local` for processes of this machine, `ray` for tasks of a Ray cluster.
        workers: number of runs at the same time; None for one per processor.
        console: where progress is shown.

    Returns:
        How each run ended, by its path.

    Raises:
        Refused: another process makes runs of this comparison, a base model cannot be made, or there is no
            Ray.
        Interrupted: a signal asked to stop. The runs under way have been saved.
    """
    prepare(runs, console.note)
    with (
        _alone(root),
        contextlib.closing(_places(executor, root, workers)) as places,
        GracefulStop(quiet=console.rich.quiet) as stop,
        GridProgress(console, runs, root, places.places) as grid,
    ):
        ends = _make_all(runs, places, stop, grid)
    if stop.requested:
        done = sum(end.state == "finished" for end in ends.values())
        raise Interrupted(
            stop.requested,
            f"{done} of {len(runs)} runs are finished, and those under way were saved. The same command goes "
            "on with the others.",
        )
    return ends


def prepare(runs: Sequence[PlannedRun], announce: Callable[[str], None]) -> None:
    """Warm-start each base model that runs share, which otherwise the first of them would do for the others.

    Args:
        runs: the runs.
        announce: prints a line for people.

    Raises:
        Refused: a task cannot be loaded, or has no model of its own and none is named.
    """
    shared = {
        (str(run.settings.get("task")), run.settings.get("base_seed")): run
        for run in runs
        if run.kind == "train" and run.settings.get("model") is None
    }
    if not shared:
        return
    from tokenrl.language.tasks.task import find_task
    from tokenrl.language.training.arguments import TrainArguments
    from tokenrl.language.training.warm_start import warm_started_base
    from tokenrl.settings import arguments

    for run in shared.values():
        args = arguments(TrainArguments, run.settings)
        warm_started_base(find_task(args)[0], seed=args.base_seed, announce=announce)


def _places(executor: str, root: Path, workers: int | None) -> Places:
    if executor == "ray":
        from tokenrl.lab.compare.execution.on_ray import RayTasks

        return RayTasks(root, workers)
    return LocalProcesses(root, workers)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of the directory of a comparison.

    Raises:
        Refused: another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    busy = f"Another process makes the runs of {root}. Wait for it, or give another directory."
    lock = acquire_lock(root, busy)
    try:
        yield
    finally:
        lock.release()


def _make_all(
    runs: Sequence[PlannedRun], places: Places, stop: GracefulStop, grid: GridProgress
) -> dict[str, RunEnd]:
    """Keep all places busy until every run has ended, or until a signal comes and those under way ended."""
    waiting, running = deque(runs), dict[str, PlannedRun]()
    ends: dict[str, RunEnd] = {}
    deaths, told = Counter[str](), False
    while running or (waiting and not stop.requested):
        while waiting and len(running) < places.places and not stop.requested:
            run = waiting.popleft()
            running[run.path] = run
            places.start(run)
            grid.started(run)
        for end in places.wait(TICK):
            run = running.pop(end.path)
            if isinstance(end, Death):
                if stop.requested:
                    continue
                deaths[run.path] += 1
                if deaths[run.path] < DEATHS:
                    waiting.appendleft(run)
                    grid.broken(run, end.reason)
                    continue
                end = RunEnd(run.path, "failed", f"Twice {end.reason}.", 0.0)
            ends[run.path] = end
            grid.ended(run, end)
        if stop.requested and not told:
            places.stop()
            told = True
        grid.tick()
    return ends
