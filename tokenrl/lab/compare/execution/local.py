"""Makes runs in processes of this machine, each of which makes one run after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from tokenrl.lab.compare.execution import worker
from tokenrl.lab.compare.execution.one import RunEnd
from tokenrl.lab.compare.records import PlannedRun

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""Environment variables that libraries read when they are imported."""
_PROGRAM = f"""import sys
sys.path[:] = sys.argv[1:]  # what this program can import, such as a user's rewards, the other can too
from {worker.__name__} import main
sys.exit(main())"""


class Death(NamedTuple):
    """The process of a run ended before the run did.

    Attributes:
        path: the directory of the run, relative to that of the comparison.
        reason: how the process ended, in words.
    """

    path: str
    reason: str


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LocalProcesses:
    """Processes that live as long as there are runs, so that each imports torch only once.

    They are no processes of `multiprocessing`, which would run the user's main program again in each of them,
    and would lose all of them when one is killed.

    Attributes:
        places: number of runs at the same time.
    """

    def __init__(self, root: Path, workers: int | None) -> None:
        """Prepare for runs of the comparison in `root`; `workers` at the same time, or one per processor."""
        self.places = processors() if workers is None else workers
        self._root = root
        self._idle: list[subprocess.Popen[str]] = []
        self._running: dict[subprocess.Popen[str], str] = {}
        self._answers: SimpleQueue[tuple[subprocess.Popen[str], str]] = SimpleQueue()

    def start(self, run: PlannedRun) -> None:
        """Start a run in an idle process or in a new one; call it only while fewer than `places` run."""
        process = self._idle.pop() if self._idle else self._born()
        self._running[process] = run.path
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"run": asdict(run), "root": str(self._root)}) + "\n")
            process.stdin.flush()
        except OSError:
            pass  # it has died, which the end of its answers tells

    def wait(self, seconds: float) -> list[RunEnd | Death]:
        """Wait for the end of a run, at most so long; return those that ended."""
        try:
            process, line = self._answers.get(timeout=seconds)
        except Empty:
            return []
        path = self._running.pop(process, None)
        if line:
            self._idle.append(process)
            return [RunEnd(**json.loads(line))]
        if path is None:
            self._idle = [one for one in self._idle if one is not process]
            return []
        return [Death(path, _in_words(process.wait()))]

    def stop(self) -> None:
        """Ask the runs to save and stop; `wait` then returns their ends."""
        for process in self._running:
            process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End all processes at once."""
        for process in [*self._idle, *self._running]:
            process.kill()
            process.wait()

    def _born(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **ONE_THREAD, "PYTHONIOENCODING": "utf-8"},
        )
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._answers.put((process, line))
        self._answers.put((process, ""))


def _in_words(code: int) -> str:
    """Say how a process ended, from its exit code, or minus the number of the signal that killed it."""
    number = -code if code < 0 else code - 128 if code > 128 else None
    if number is None:
        return f"its process ended with exit code {code}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = "; if the memory was full, fewer workers may help" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"
