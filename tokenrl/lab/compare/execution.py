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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tokenrl.errors import Refused, Stopped, describe
from tokenrl.lab.compare.plan import Plan, Run
from tokenrl.lab.compare.planning import KINDS
from tokenrl.runs.console import Console
from tokenrl.runs.directory import acquire_lock
from tokenrl.runs.files import write_json
from tokenrl.runs.signals import GracefulStop
from tokenrl.settings import field_types

TICK = 0.2
"""Seconds between two looks at the runs under way."""
FIXED = {"threads": 1, "mixed_precision": "no", "training_attention": "as_loaded", "compile": "off"}
"""How all runs compute, unless the user says otherwise: each beside others, with one thread."""


class Process(Protocol):
    """A run under way: what `subprocess.Popen` and a task of Ray have in common."""

    def poll(self) -> int | None:
        """Return the exit code, or minus the number of the signal that ended the process; None before."""

    def terminate(self) -> None:
        """Ask the run to save and stop."""


def command(plan: Plan, run: Run, root: Path) -> str:
    """Return the command line that makes or continues a run, for any scheduler, and write its settings.

    It belongs into the current directory, from which its paths lead, and takes the settings from a file
    beside the directory of the run, such as seed_0.json.

    Args:
        plan: the comparison.
        run: the run.
        root: the directory of the comparison.
    """
    known, path = field_types(KINDS[plan.kind]), root / f"{run.path}.json"
    settings = {name: value for name, value in FIXED.items() if name in known} | plan.settings(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"kind": plan.kind, **{n: value for n, value in settings.items() if value is not None}})
    words = ["env", "OMP_NUM_THREADS=1", "tokenrl", plan.kind, "--config", str(path)]
    return shlex.join([*words, "--output-dir", str(root / run.path), "--resume", "auto", "--quiet"])


def execute(
    plan: Plan,
    runs: Sequence[Run],
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
        plan: the comparison.
        runs: the runs.
        root: the directory of the comparison.
        executor: `local` for processes of this machine, `ray` for tasks of a Ray cluster.
        workers: number of runs at the same time; None for one per processor.
        console: where progress is shown.

    Raises:
        Refused: another process makes runs of this comparison, or there is no Ray.
        Stopped: a signal asked to stop, whose exit code it has. The runs under way have been saved.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(root, f"Another process makes the runs of {root}. Wait for it, or give another one.")
    try:
        start, places = _ray() if executor == "ray" else (_start, _processors())
        with GracefulStop(quiet=console.rich.quiet) as stop:
            ended = _make_all(plan, runs, root, start, workers or places, stop, console)
    finally:
        lock.release()
    if stop.requested:
        error = Stopped(
            f"{signal.Signals(stop.requested).name}: {ended} of {len(runs)} runs have ended, and those under "
            "way were saved. The same command goes on with the others."
        )
        error.exit_code = stop.exit_code
        raise error


def _make_all(
    plan: Plan,
    runs: Sequence[Run],
    root: Path,
    start: Callable[[str, str], Process],
    places: int,
    stop: GracefulStop,
    console: Console,
) -> int:
    """Keep all places busy until every run has ended, or a signal comes; return how many have ended."""
    waiting, running, killed, ended = list(runs), dict[Run, Process](), set[Run](), 0
    while any(_in_use(root / run.path) for run in runs) and not stop.requested:
        time.sleep(TICK)  # runs of a comparison that was killed are still being saved
    try:
        while (running or waiting) and not stop.requested:
            while waiting and len(running) < places:
                run = waiting.pop(0)
                running[run] = start(command(plan, run, root), f"{root / run.path}.log")
            time.sleep(TICK)
            codes = {run: process.poll() for run, process in running.items()}
            for run, code in ((run, code) for run, code in codes.items() if code is not None):
                del running[run]
                if (code < 0 or code > 128) and run not in killed and not stop.requested:
                    killed.add(run)
                    waiting.insert(0, run)
                    continue
                ended += 1
                log = Path(f"{root / run.path}.log")
                if log.is_file() and not log.stat().st_size:
                    log.unlink()
                ending = "ended" if code == 0 else f"failed (exit code {code}; {log})"
                rate = f", learning rate {run.learning_rate:g}" * (run.role == "tuning")
                itself = ", against itself" * (run.role == "itself")
                said = f"{run.problem}: {run.arm}, seed {run.seed}{rate}{itself}: {ending}"
                console.note(f"run {ended}/{len(runs)}  {said}")
    finally:
        for process in running.values():
            process.terminate()
    while any(process.poll() is None for process in running.values()):
        time.sleep(TICK)
    return ended


def _in_use(directory: Path) -> bool:
    """Return whether a process still works in the directory of a run."""
    try:
        if directory.is_dir():
            acquire_lock(directory, "").release()
    except Refused:
        return True
    return False


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment() -> dict[str, str]:
    """Return variables with which a run imports what this program can, such as a user's rewards."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _start(line: str, log: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a command; what it prints goes to a file. On Linux it is asked to stop if this process dies."""
    _, variable, _, *words = shlex.split(line)
    name, _, value = variable.partition("=")
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tokenrl", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**(environment or _environment()), name: value},
            preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
        )


def _stop_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _ray() -> tuple[Callable[[str, str], Process], int]:
    """Connect with Ray, or start it; return what starts a command there, and the number of processors.

    The cluster is the one that RAY_ADDRESS names; without it a local one is started. On a cluster of several
    machines tokenrl must be installed on each, and the current directory, that of the comparison and the
    cache of models must be on a file system that all share, under the same paths.
    """
    try:
        ray: Any = importlib.import_module("ray")
        local = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
        ray.init(log_to_driver=False, ignore_reinit_error=True, **local)
    except Exception as error:  # of many kinds, such as ImportError, ConnectionError and RuntimeError
        raise Refused(
            f"executor ray needs Ray, which cannot be started or reached ({describe(error)}). Install it "
            "with pip install 'tokenrl-lm[ray]', set RAY_ADDRESS, or leave executor at local."
        ) from error
    task = ray.remote(num_cpus=1, max_retries=0)(_call)
    environment = _environment()

    def start(line: str, log: str) -> Process:
        return _RayTask(ray, task.remote(line, log, os.getcwd(), environment))

    return start, int(ray.cluster_resources().get("CPU", 1))


def _call(line: str, log: str, directory: str, environment: Mapping[str, str]) -> int:
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
