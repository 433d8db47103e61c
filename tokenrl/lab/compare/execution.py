"""Makes runs by their command lines, some at the same time: on this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import ctypes
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from tokenrl.errors import Refused, Stopped, describe
from tokenrl.lab.compare.plan import PlannedRun
from tokenrl.lab.compare.planning import KINDS
from tokenrl.runs.console import Console
from tokenrl.runs.directory import acquire_lock
from tokenrl.runs.files import write_json
from tokenrl.runs.signals import SIGNALS, GracefulStop

TICK = 0.2
"""Seconds between two looks at the runs under way."""
DEATHS = 2
"""A run counts as failed once its process was ended from outside so often."""
FIXED = {
    **{"threads": 1, "mixed_precision": "no"},
    **{"training_attention": "as_loaded", "compile": "off"},
}
"""How all runs compute, unless the user says otherwise: each beside others, with one thread."""


class Interrupted(Stopped):
    """Raised when a signal ended runs, which the same command goes on with.

    Attributes:
        exit_code: 128 plus the number of the signal, as the exit code of a command.
    """

    def __init__(self, number: int, message: str) -> None:
        """Make the error for the signal of a number; its name comes before the message."""
        self.exit_code = 128 + number
        super().__init__(f"{SIGNALS.get(self.exit_code, f'signal {number}')}: {message}")


class Process(Protocol):
    """A run under way: what `subprocess.Popen` and a task of Ray have in common."""

    def poll(self) -> int | None:
        """Return the exit code, or minus the number of the signal that ended the process; None before."""

    def terminate(self) -> None:
        """Ask the run to save and stop."""


def command(run: PlannedRun, root: Path) -> str:
    """Return the command line that makes or continues a run, for any scheduler, and write its settings.

    It belongs into the current directory, from which its paths lead, and takes the settings from a file
    beside the directory of the run, such as seed_0.json.

    Args:
        run: the run.
        root: the directory of the comparison.
    """
    known = {field.name for field in fields(KINDS[run.kind])}
    usual = {name: value for name, value in FIXED.items() if name in known}
    path = root / f"{run.path}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in run.settings.items() if value is not None}
    write_json(path, {"kind": run.kind, **usual, **given})
    words = ["env", "OMP_NUM_THREADS=1", "tokenrl", run.kind, "--config", str(path)]
    return shlex.join([*words, "--output-dir", str(root / run.path), "--resume", "auto", "--quiet"])


def execute(
    runs: Sequence[PlannedRun],
    root: Path,
    *,
    executor: Literal["local", "ray"] = "local",
    workers: int | None = None,
    console: Console,
) -> None:
    """Make runs, each in its own directory; those that had begun are continued.

    How a run ended is read from its directory. A run that fails lets the others go on. One whose process is
    killed is continued once. If this process is killed, its runs save and stop; the same call continues them.

    Args:
        runs: the runs.
        root: the directory of the comparison.
        executor: `local` for processes of this machine, `ray` for tasks of a Ray cluster.
        workers: number of runs at the same time; None for one per processor.
        console: where progress is shown.

    Raises:
        Refused: another process makes runs of this comparison, or there is no Ray.
        Interrupted: a signal asked to stop. The runs under way have been saved.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(root, f"Another process makes the runs of {root}. Wait for it, or give another one.")
    try:
        start, places = _ray(root, workers) if executor == "ray" else _local(root, workers)
        with GracefulStop(quiet=console.rich.quiet) as stop:
            done = _make_all(runs, root, start, places, stop, console)
    finally:
        lock.release()
    if stop.requested:
        raise Interrupted(
            stop.requested,
            f"{done} of {len(runs)} runs have ended, and those under way were saved. The same command goes "
            "on with the others.",
        )


def _make_all(
    runs: Sequence[PlannedRun],
    root: Path,
    start: Callable[[PlannedRun], Process],
    places: int,
    stop: GracefulStop,
    console: Console,
) -> int:
    """Keep all places busy until every run has ended, or a signal comes; return how many have ended."""
    waiting, running, deaths, done = deque(runs), dict[str, tuple[PlannedRun, Process]](), Counter[str](), 0
    asked = False
    try:
        while running or (waiting and not stop.requested):
            free = () if stop.requested else (run for run in waiting if not _in_use(root / run.path))
            for run in list(islice(free, places - len(running))):
                waiting.remove(run)
                running[run.path] = run, start(run)
            for run, process in list(running.values()):
                code = process.poll()
                if code is None:
                    continue
                del running[run.path]
                deaths[run.path] += code < 0 or code > 128
                if code and (code < 0 or code > 128) and deaths[run.path] < DEATHS:
                    waiting.appendleft(run)
                elif not stop.requested:
                    done += 1
                    log = Path(f"{root / run.path}.log")
                    if log.is_file() and not log.stat().st_size:
                        log.unlink()
                    ending = "ended" if code == 0 else f"failed (exit code {code}; {root / run.path}.log)"
                    console.note(f"run {done}/{len(runs)}  {run.problem}: {run.arm}, {_named(run)}: {ending}")
            if stop.requested and not asked:
                asked = True
                for _, process in running.values():
                    process.terminate()
            time.sleep(TICK)
    finally:
        for _, process in running.values():
            process.terminate()
    return done


def _named(run: PlannedRun) -> str:
    rate = f", learning rate {run.settings.get('learning_rate'):g}" if run.role == "tuning" else ""
    return f"seed {run.seed}{rate}{', against itself' if run.role == 'itself' else ''}"


def _in_use(directory: Path) -> bool:
    """Return whether a process of a program that was killed still saves a run."""
    if not directory.is_dir():
        return False
    try:
        acquire_lock(directory, "").release()
    except Refused:
        return True
    return False


def _local(root: Path, workers: int | None) -> tuple[Callable[[PlannedRun], Process], int]:
    """Return what starts a run on this machine, and how many take place at the same time."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    paths = os.pathsep.join(sys.path)  # what this program can import, such as a user's rewards, a run can too
    environment = {**os.environ, "PYTHONPATH": paths}
    return lambda run: _start(command(run, root), f"{root / run.path}.log", environment), workers or usable


def _start(line: str, log: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command; what it prints goes to a file. On Linux it is asked to stop if this process dies."""
    _, variable, _, *words = shlex.split(line)
    name, _, value = variable.partition("=")
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tokenrl", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**environment, name: value},
            preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
        )


def _stop_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _ray(root: Path, workers: int | None) -> tuple[Callable[[PlannedRun], Process], int]:
    """Connect with Ray, or start it; return what starts a run there, and how many at the same time.

    The cluster is the one that RAY_ADDRESS names; without it a local one is started. On a cluster of several
    machines tokenrl must be installed on each, and the current directory, that of the comparison and the
    cache of models must be on a file system that all share, under the same paths.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise Refused(
            f"executor ray needs Ray, which cannot be imported ({describe(error)}). Install it with "
            "pip install 'tokenrl-lm[ray]', or leave executor at local."
        ) from error
    try:
        local = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
        ray.init(log_to_driver=False, ignore_reinit_error=True, **local)
    except Exception as error:  # of many kinds, such as ConnectionError and RuntimeError
        raise Refused(f"Ray cannot be started or reached ({describe(error)}).") from error
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    task = ray.remote(num_cpus=1, max_retries=0)(_call)

    def start(run: PlannedRun) -> Process:
        log = f"{root / run.path}.log"
        return _RayTask(ray, task.remote(command(run, root), log, os.getcwd(), environment))

    return start, workers or int(ray.cluster_resources().get("CPU", 1))


def _call(line: str, log: str, directory: str, environment: dict[str, str]) -> int:
    """Run a command in a process of Ray; asked to stop, it passes that on and waits."""
    os.chdir(directory)
    process = _start(line, log, environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()


class _RayTask:
    """A run as a task of Ray, with the methods of a process."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def poll(self) -> int | None:
        if not self._ray.wait([self._reference], timeout=0)[0]:
            return None
        try:
            return int(self._ray.get(self._reference))
        except self._ray.exceptions.RayError:
            return -int(signal.SIGKILL)

    def terminate(self) -> None:
        self._ray.cancel(self._reference)
