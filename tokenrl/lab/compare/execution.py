"""Makes runs by their command lines, several at a time, on this machine or on a Ray cluster."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, Protocol

from tokenrl.configuration import read_config
from tokenrl.errors import Interrupted, Refused, is_special, refusing
from tokenrl.files import MANIFEST, appending, atomic_directory, remove, write_json
from tokenrl.lab.compare.intervals import LEAST_PAIRS
from tokenrl.lab.compare.looks import looked_twice
from tokenrl.lab.compare.plan import Plan, PlannedRun, differing, read_plan
from tokenrl.lab.compare.table import is_done
from tokenrl.runs import Console, GracefulStop, in_use

TICK = 0.2
"""Seconds between two looks at the runs under way."""
LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


class Process(Protocol):
    """A run under way: a process of this machine, or a task of Ray."""

    def poll(self) -> int | None:
        """Return its exit code, or minus the number of the signal that ended it; None as long as it runs."""

    def terminate(self) -> None:
        """Ask it to save and stop."""


def collect(
    plan: Plan,
    runs: Sequence[PlannedRun],
    directories: Sequence[str],
    root: Path,
    announce: Callable[[str], None],
) -> None:
    """Copy runs that have ended in the directories of other comparisons.

    Args:
        plan: the comparison.
        runs: the runs that are wanted.
        directories: the directories, each as another machine made it.
        root: the directory of the comparison, which this process has locked.
        announce: prints a line.

    Raises:
        Refused: a directory holds no comparison, was judged where this one does not look, or has a run with other
            settings, or with a link.
        Stopped: a run cannot be copied.
    """
    for source in map(Path, directories):
        if not (source / "plan.json").is_file():
            raise Refused(
                f"collect has {str(source)!r}, which holds no comparison: it has no plan.json."
            )
        _check_looks(plan, source)
        ended = [run for run in runs if is_done(run, source) and not (root / run.path).exists()]
        for run in ended:
            ours = read_config(_write_settings(run, root))
            original = source / run.path
            if changes := differing(read_config(Path(f"{original}.json")), ours):
                raise Refused(
                    f"{original} was made with other settings than this comparison has: {changes}. Give "
                    "the settings that it was made with, or leave it out of collect."
                )
            for path in (original, *original.rglob("*")):
                place = source.resolve() / path.relative_to(source)
                if is_special(path) or path.resolve() != place:
                    raise Refused(
                        f"{path} is a link, a pipe or a device, and plain files alone are copied. Remove it, or leave "
                        f"{source} out of collect."
                    )
            with atomic_directory(root / run.path) as folder:
                shutil.copytree(original, folder, dirs_exist_ok=True)
            remove(root / run.path / MANIFEST)  # its report may be written again
        announce(f"{len(ended)} of {len(runs)} runs copied from {source}")


def _check_looks(plan: Plan, source: Path) -> None:
    """Refuse runs that were judged already, unless that was one of the looks of this comparison.

    Fewer than six seeds have no verdict, so whoever saw them has decided nothing.
    """
    theirs = read_plan(source)
    judged = {look: theirs.seeds[:look] for look in theirs.looks if look >= LEAST_PAIRS}
    allowed = {look: plan.seeds[:look] for look in plan.looks}
    if judged.items() <= allowed.items() or not (source / "comparison.json").is_file():
        return
    first = min(judged.keys() - allowed.keys(), default=min(judged))
    raise Refused(
        f"The runs in {source} were judged after {first} seeds. {looked_twice(first, len(plan.seeds))} Machines that "
        f"share a comparison make fewer than {LEAST_PAIRS} seeds each, which have no verdict."
    )


def _write_settings(run: PlannedRun, root: Path) -> Path:
    """Write the settings of a run into a file beside its directory, and return the file."""
    path = root / f"{run.path}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in run.settings.items() if value is not None}
    write_json(path, {"kind": run.kind, **settings})
    return path


def execute(
    runs: Sequence[PlannedRun],
    root: Path,
    *,
    executor: Literal["local", "ray"] = "local",
    workers: int | None = None,
    console: Console,
) -> None:
    """Make the runs that have not ended yet, each in its own directory; those that had begun are continued.

    How a run ended is read from its directory. A run that fails lets the others go on. If this process is killed,
    its runs save and stop; the same call continues them.

    Args:
        runs: the runs.
        root: the directory of the comparison, which this process has locked.
        executor: `local` for processes of this machine, `ray` for tasks of a Ray cluster.
        workers: number of runs at the same time; None for one per processor.
        console: where progress is shown.

    Raises:
        Refused: there is no Ray.
        Interrupted: a signal asked to stop, whose exit code it has. The runs under way have been saved.
    """
    start: Callable[..., Process] = start_process
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if executor == "ray":
        start, processors = connect_to_ray()
    waiting = [run for run in runs if not is_done(run, root)]
    with (
        GracefulStop(quiet=console.rich.quiet) as stop,
        ThreadPoolExecutor(workers or processors) as pool,
    ):
        paths = {pool.submit(_make, run, root, start, stop): root / run.path for run in waiting}
        pending = {*paths}
        ended = len(runs) - len(paths)
        while pending:
            done, pending = wait(pending, TICK, FIRST_COMPLETED)
            for future in done:
                path = paths[future]
                code = future.result()
                if code is not None:
                    ended += 1
                    result = "ended" if code == 0 else f"failed (exit code {code}; {path}.log)"
                    console.note(f"run {ended}/{len(runs)}  {path}: {result}")
    if stop.requested:
        raise Interrupted(
            f"{signal.Signals(stop.requested).name}: the runs under way were saved. The same command goes on.",
            stop.exit_code,
        )


def _make(
    run: PlannedRun, root: Path, start: Callable[..., Process], stop: GracefulStop
) -> int | None:
    """Make a run, which is asked to save and stop when this process is; return its exit code, None if not begun."""
    path = root / run.path
    while in_use(path) and not stop.requested:
        time.sleep(TICK)  # a run of a comparison that was killed may still be saving itself
    if stop.requested:
        return None
    words = [run.kind, "--config", str(_write_settings(run, root)), "--output-dir", str(path)]
    # a run can import what this program can, such as rewards
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = start([*words, "--quiet", "--resume", "auto"], f"{path}.log", environment)
    is_stopping = False
    while (code := process.poll()) is None:
        if stop.requested and not is_stopping:
            process.terminate()
            is_stopping = True
        time.sleep(TICK)
    return code


def start_process(
    words: Sequence[str], log: str, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command of tokenrl whose output goes to a file.

    On Linux the command is also asked to stop if the thread that started it dies.
    """
    with appending(Path(log)) as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tokenrl", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            preexec_fn=None
            if LIBRARY is None
            else lambda: LIBRARY.prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG
        )


def connect_to_ray() -> tuple[Callable[..., Process], int]:
    """Connect to Ray or start it; return the function that starts a command there, and its processors.

    The cluster is the one that RAY_ADDRESS names; without it a local one is started. On a cluster of several
    machines tokenrl must be installed on each. The current directory, the comparison's directory and the
    cache of models must be on a file system that all share, under the same paths.
    """
    remedy = "Install it with pip install ray, set RAY_ADDRESS, or leave executor at local."
    with refusing("executor ray needs Ray, which cannot be started or reached", remedy):
        ray: Any = importlib.import_module("ray")
        cluster: dict[str, Any] = {}
        if not os.environ.get("RAY_ADDRESS"):
            cluster = {"address": "local", "include_dashboard": False}
        ray.init(log_to_driver=False, ignore_reinit_error=True, **cluster)
    task = ray.remote(num_cpus=1, max_retries=0)(_run_in_task)

    class Task:
        """A command that runs as a task of Ray."""

        def __init__(self, *start: Any) -> None:
            self.pending = task.remote(os.getcwd(), *start)

        def poll(self) -> int | None:
            if not ray.wait([self.pending], timeout=0)[0]:
                return None
            try:
                return int(ray.get(self.pending))
            except ray.exceptions.RayError:
                return -int(signal.SIGKILL)

        def terminate(self) -> None:
            ray.cancel(self.pending)

    return Task, int(ray.cluster_resources().get("CPU", 1))


def _run_in_task(directory: str, *start: Any) -> int:
    """Run a command in a process of Ray, whose KeyboardInterrupt asks it to save and stop."""
    os.chdir(directory)
    process = start_process(*start)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()
