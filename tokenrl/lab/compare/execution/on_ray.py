"""Makes runs as tasks of a Ray cluster, or of a local one that is started for them. Needs the extra `ray`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, describe
from tokenrl.lab.compare.execution.local import ONE_THREAD, Death, processors
from tokenrl.lab.compare.execution.one import RunEnd, run_logged, settings_file, write_settings
from tokenrl.lab.compare.execution.worker import exit_at_once
from tokenrl.lab.compare.records import PlannedRun
from tokenrl.runs.quiet import hush_libraries

PATIENCE = 30
"""Seconds to wait until a task of a killed program has ended."""


class RayTasks:
    """Runs as tasks of Ray, each on one processor.

    The cluster is the one that this program is connected with, or else the one that the environment variable
    RAY_ADDRESS names (`auto`: the one that runs on this machine); without either a local one is started, and
    ended. On a cluster of several machines tokenrl must be installed on each, and the directory of the
    comparison, the current directory and the cache of models (TOKENRL_CACHE) must be on a file system that
    all share, under the same paths.

    Attributes:
        places: number of runs at the same time.
    """

    def __init__(self, root: Path, workers: int | None) -> None:
        """Connect with Ray, or start it.

        Args:
            root: the directory of the comparison.
            workers: number of runs at the same time; None for as many as the cluster has processors now.

        Raises:
            Refused: Ray is not installed, or the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError as error:
            raise Refused(
                f"executor ray needs Ray, which cannot be imported ({describe(error)}). Install it with "
                "pip install 'tokenrl-lm[ray]', or leave executor at local."
            ) from error
        self._ray: Any = ray
        self._root = root
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **_cluster(workers))
            except Exception as error:  # of many kinds, such as ConnectionError and RuntimeError
                raise Refused(
                    f"Ray cannot be started, or the cluster at RAY_ADDRESS cannot be reached "
                    f"({describe(error)}). Start the cluster, or leave executor at local."
                ) from error
        self.places = workers or int(self._ray.cluster_resources().get("CPU", 1))
        self._task = ray.remote(num_cpus=1, max_retries=0)(_task)
        self._running: dict[Any, str] = {}

    def start(self, run: PlannedRun) -> None:
        """Start a run, as soon as the cluster has a processor for it."""
        write_settings(run, self._root)
        reference = self._task.remote(asdict(run), str(self._root), os.getcwd(), sys.path, _environment())
        self._running[reference] = run.path

    def wait(self, seconds: float) -> list[RunEnd | Death]:
        """Wait for the end of a run, at most so long; return those that ended."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [self._end(reference, self._running.pop(reference)) for reference in ready]

    def _end(self, reference: Any, path: str) -> RunEnd | Death:
        try:
            return RunEnd(**self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            return Death(path, f"its process ended ({describe(error)[:300]})")

    def stop(self) -> None:
        """Ask the runs to save and stop, as Ctrl-C does."""
        for reference in self._running:
            self._ray.cancel(reference)

    def close(self) -> None:
        """End the runs that are left, and Ray if it was started here."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._own:
            self._ray.shutdown()


def _await_end(directory: Path) -> None:
    """Wait until a run in a directory has ended: Ray ends the tasks of a killed program, but not at once."""
    from filelock import FileLock, Timeout

    if directory.is_dir():
        with contextlib.suppress(Timeout), FileLock(directory / ".lock", timeout=PATIENCE):
            pass


def _cluster(workers: int | None) -> dict[str, Any]:
    """Return the options with which Ray finds its cluster, or starts one with processors for all workers."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    return {"address": "local", "num_cpus": workers or processors(), "include_dashboard": False}


def _environment() -> dict[str, str]:
    """Return the environment variables that decide what a run computes and where it looks."""
    names = [name for name in os.environ if name.startswith(("TOKENRL_", "HF_", "XDG_CACHE_HOME"))]
    return {**{name: os.environ[name] for name in names}, **ONE_THREAD}


def _task(
    run: dict[str, Any], root: str, directory: str, paths: list[str], environment: dict[str, str]
) -> dict[str, Any]:
    """Make a run in a process of Ray; return its end as a dict."""
    planned = PlannedRun(**run)
    os.environ.update(environment)
    hush_libraries()
    try:
        os.chdir(directory)
        found = settings_file(planned, Path(root)).is_file()
    except OSError:
        found = False
    if not found:
        reason = (
            f"The machine {os.uname().nodename} does not see {Path(directory, root)}. Give an output_dir on "
            "a file system that all machines of the cluster share, and start the comparison there."
        )
        return asdict(RunEnd(planned.path, "failed", reason, 0.0))
    _await_end(Path(root, planned.path))
    sys.path.extend(path for path in paths if path not in sys.path)
    before = signal.signal(signal.SIGINT, exit_at_once)  # libraries might catch an exception
    try:
        return asdict(run_logged(planned, Path(root)))
    finally:
        signal.signal(signal.SIGINT, before)
