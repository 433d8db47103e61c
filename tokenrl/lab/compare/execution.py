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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any, Literal

from tokenrl.configuration import read_config
from tokenrl.errors import Interrupted, Refused, refusing
from tokenrl.lab.compare.plan import PlannedRun
from tokenrl.lab.compare.table import is_done
from tokenrl.runs.console import Console
from tokenrl.runs.directory import in_use
from tokenrl.runs.files import MANIFEST, appending, atomic_directory, plain, remove, write_json
from tokenrl.runs.signals import GracefulStop

ATTEMPTS = 2
TICK = 0.2
"""Seconds between two looks at the runs under way."""
LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
"""Environment variables of each run, in addition to the variables of this program."""

RunCommand = Callable[[Sequence[str], str, Callable[[], bool]], int]
"""Runs a command of tokenrl whose output goes to a file, and terminates it once `is_over()` returns True.

It returns the exit code, or minus the number of the signal that ended the process."""


def command(run: PlannedRun, root: Path) -> list[str]:
    """Return the words after `tokenrl` that make or continue a run; its settings are in a file beside it.

    The paths in them may be relative to the current directory.

    Args:
        run: the run.
        root: the directory of the comparison.
    """
    path = str(root / run.path)
    settings = f"{path}.json"
    flags = ["--config", settings, "--output-dir", path, "--resume", "auto", "--quiet"]
    return [run.kind, *flags]


def _settings(run: PlannedRun) -> dict[str, Any]:
    """Return the settings of a run as its command reads them from a file."""
    settings = {name: value for name, value in run.settings.items() if value is not None}
    return plain({"kind": run.kind, **settings})  # type: ignore[no-any-return]


def collect(
    runs: Sequence[PlannedRun],
    directories: Sequence[str],
    root: Path,
    announce: Callable[[str], None],
) -> None:
    """Copy runs that have ended in the directories of other comparisons.

    Args:
        runs: the runs that are wanted.
        directories: the directories, each as another machine made it.
        root: the directory of the comparison, which this process has locked.
        announce: prints a line.

    Raises:
        Refused: a directory holds no comparison, or has a run with other settings, code, data or models, or
            with a link.
        Stopped: a run cannot be copied.
    """
    for source in map(Path, directories):
        if not (source / "plan.json").is_file():
            raise Refused(
                f"collect has {str(source)!r}, which holds no comparison: it has no plan.json."
            )
        new = [run for run in runs if is_done(run, source) and not (root / run.path).exists()]
        for run in new:
            path = source.resolve() / run.path
            file = Path(f"{path}.json")
            for part in (file, *path.rglob("*")):
                # a copy would hold what a link points to, and would wait for a pipe
                if part.resolve() != part or not (part.is_file() or part.is_dir()):
                    raise Refused(
                        f"{part} is a link, or no ordinary file, so its run is not copied. Give a directory that "
                        "holds the files themselves, or leave it out of collect."
                    )
            settings = _settings(run)
            theirs = read_config(file)
            names = [name for name in settings | theirs if settings.get(name) != theirs.get(name)]
            if names:
                raise Refused(
                    f"{source / run.path} was made with other settings than this comparison has: "
                    f"{', '.join(sorted(names))}. Give the settings that it was made with, or leave it out of collect."
                )
            _write_settings(run, root)
            with atomic_directory(root / run.path) as folder:
                # a link that is put there meanwhile stays a link
                shutil.copytree(path, folder, symlinks=True, dirs_exist_ok=True)
            remove(root / run.path / MANIFEST)  # its report may be written again
        announce(f"{len(new)} of {len(runs)} runs copied from {source}")


def _write_settings(run: PlannedRun, root: Path) -> None:
    """Write the settings of a run, which its command reads."""
    path = root / f"{run.path}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _settings(run))


def execute(
    runs: Sequence[PlannedRun],
    root: Path,
    *,
    executor: Literal["local", "ray"] = "local",
    workers: int | None = None,
    console: Console,
) -> None:
    """Make the runs that have not ended yet, each in its own directory; those that had begun are continued.

    How a run ended is read from its directory. A run that fails lets the others go on. One whose process is
    killed is continued once. If this process is killed, its runs save and stop; the same call continues them.

    Args:
        runs: the runs.
        root: the directory of the comparison, which this process has locked.
        executor: `local` for processes of this machine, `ray` for tasks of a Ray cluster.
        workers: number of runs at the same time; None for one per processor.
        console: where progress is shown.

    Raises:
        Refused: there is no Ray, or a run was made with other code, data or models than those before it.
        Interrupted: a signal asked to stop, whose exit code it has. The runs under way have been saved.
    """
    over = Event()
    call: RunCommand = _call
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    if executor == "ray":
        call, processors = _ray_executor()
    unmade = [run for run in runs if not is_done(run, root)]
    ended = len(runs) - len(unmade)
    with (
        GracefulStop(quiet=console.rich.quiet) as stop,
        ThreadPoolExecutor(workers or processors) as pool,
    ):

        def is_over() -> bool:
            return over.is_set() or bool(stop.requested)

        futures = {pool.submit(_run_until_ended, run, root, call, is_over): run for run in unmade}
        try:
            for future in as_completed(futures):
                run = futures[future]
                code = future.result()
                log = Path(f"{root / run.path}.log")
                if log.is_file() and not log.stat().st_size:
                    log.unlink()
                if stop.requested:
                    break
                ended += 1
                about = f"{run.problem}: {run.arm}, seed {run.seed}, learning rate {run.learning_rate:g}"
                ending = "ended" if code == 0 else f"failed (exit code {code}; {log})"
                console.note(f"run {ended}/{len(runs)}  {about}: {ending}")
        finally:
            over.set()
    if stop.requested:
        raise Interrupted(
            f"{signal.Signals(stop.requested).name}: {ended} of {len(runs)} runs have ended, and those under "
            "way were saved. The same command goes on with the others.",
            stop.exit_code,
        )


def _run_until_ended(
    run: PlannedRun, root: Path, call: RunCommand, is_over: Callable[[], bool]
) -> int:
    """Make or continue a run, and once more if its process was killed; return the exit code."""
    path = root / run.path
    _write_settings(run, root)
    code = -int(signal.SIGTERM)
    for _ in range(ATTEMPTS):
        while not is_over() and in_use(path):
            time.sleep(TICK)  # a run of a comparison that was killed is still being saved
        if is_over():
            break
        code = call(command(run, root), f"{path}.log", is_over)
        if 0 <= code <= 128:
            break
    return code


def _environment() -> dict[str, str]:
    """Return environment variables with which a run can import what this program can, such as rewards."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **ENVIRONMENT}


def _call(
    words: Sequence[str],
    log: str,
    is_over: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a command; a request to stop, such as a KeyboardInterrupt, is passed on to it and awaited.

    On Linux the command is also asked to stop if the thread that started it dies.
    """
    with appending(Path(log)) as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tokenrl", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment or _environment(),
            preexec_fn=None
            if LIBRARY is None
            else lambda: LIBRARY.prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG
        )
    patience: float | None = TICK
    while True:
        try:
            return process.wait(patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            if is_over() or isinstance(error, KeyboardInterrupt):
                process.terminate()
                patience = None


def _ray_executor() -> tuple[RunCommand, int]:
    """Connect to Ray or start it; return the function that runs a command there, and its processors.

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

    def call(words: Sequence[str], log: str, is_over: Callable[[], bool]) -> int:
        pending = task.remote(words, log, os.getcwd(), _environment())
        while not ray.wait([pending], timeout=TICK)[0] and not is_over():
            pass
        if is_over():
            ray.cancel(pending)
        try:
            return int(ray.get(pending))
        except ray.exceptions.RayError:
            return -int(signal.SIGKILL)

    return call, int(ray.cluster_resources().get("CPU", 1))


def _run_in_task(
    words: Sequence[str], log: str, directory: str, environment: Mapping[str, str]
) -> int:
    """Run a command in a process of Ray, which interrupts it to stop it."""
    os.chdir(directory)
    return _call(words, log, lambda: False, environment)
