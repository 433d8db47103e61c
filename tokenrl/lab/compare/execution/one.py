"""Makes one run of a comparison, and writes the command line that makes the same run."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenrl.errors import Stopped, TokenrlError, describe
from tokenrl.lab.compare.records import PlannedRun
from tokenrl.runs.files import write_json
from tokenrl.runs.signals import SIGNALS

ONE_THREAD = {"threads": 1}
"""Runs take place beside each other, so each computes with one thread. It also makes them repeatable: with
more threads sums are rounded in another order."""
UNMEASURED = {
    **{"mixed_precision": "no", "training_attention": "as_loaded"},
    **{"compile_sampling": False, "compile_training": False},
}
"""What `tokenrl train` would choose by a measurement, which could differ between the arms of a comparison."""


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        path: its directory, relative to that of the comparison.
        state: `finished`, also if the run ended before its budget was used; or `failed`.
        reason: why it failed, in words; else empty.
        seconds: how long it took, the loading of its model included; of a run that was continued, the last
            part.
    """

    path: str
    state: Literal["finished", "failed"]
    reason: str
    seconds: float


class Interrupted(Stopped):
    """Raised when a signal ended runs, which the same command goes on with.

    Attributes:
        exit_code: 128 plus the number of the signal, as the exit code of a command.
    """

    def __init__(self, number: int, message: str) -> None:
        """Make the error for the signal of a number; its name comes before the message."""
        self.exit_code = 128 + number
        super().__init__(f"{SIGNALS.get(self.exit_code, f'signal {number}')}: {message}")


def settings_file(run: PlannedRun, root: Path) -> Path:
    """Return the file beside a run's directory that holds its settings, such as seed_0.json."""
    return root / f"{run.path}.json"


def write_settings(run: PlannedRun, root: Path) -> Path:
    """Write a run's settings into a file that `tokenrl train --config` reads (control alike); return it."""
    path = settings_file(run, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"kind": run.kind, **_settings(run)})
    return path


def _settings(run: PlannedRun) -> dict[str, Any]:
    """Return the settings of a run, with nothing left to a measurement."""
    usual = UNMEASURED if run.kind == "train" else {}
    left_open = {name: value for name, value in usual.items() if run.settings.get(name) is None}
    return {**run.settings, **left_open, **ONE_THREAD}


def commands(runs: Sequence[PlannedRun], root: Path) -> list[str]:
    """Return one command line for each run, for any scheduler; it makes or continues what `run_one` would.

    The lines are independent of each other and of their order. They belong into the current directory, from
    which the paths in them lead. Each reads the settings of its run from a file, which is written here.

    Args:
        runs: the runs.
        root: the directory of the comparison.
    """
    return [_command(run, root) for run in runs]


def _command(run: PlannedRun, root: Path) -> str:
    settings, output_dir = str(write_settings(run, root)), str(root / run.path)
    words = ["env", "OMP_NUM_THREADS=1", "tokenrl", run.kind, "--config", settings]
    return shlex.join([*words, "--output-dir", output_dir, "--resume", "auto", "--quiet"])


def run_one(run: PlannedRun, root: Path) -> RunEnd:
    """Make a run, or continue it where it was; whatever goes wrong in it is told as its end.

    Args:
        run: the run.
        root: the directory of the comparison.

    Raises:
        Interrupted: a signal asked the run to stop, and it has been saved.
    """
    began = time.monotonic()
    where: dict[str, Any] = {"output_dir": str(root / run.path), "resume": "auto", "quiet": True}
    try:
        write_settings(run, root)
        code = _training(run.kind)(**{**_settings(run), **where}).exit_code
    except TokenrlError as error:
        return RunEnd(run.path, "failed", str(error), time.monotonic() - began)
    except Exception as error:
        traceback.print_exc()
        return RunEnd(run.path, "failed", describe(error), time.monotonic() - began)
    if code > 128:
        raise Interrupted(code - 128, f"the run {root / run.path} was stopped and saved.")
    return RunEnd(run.path, "finished", "", time.monotonic() - began)


def _training(kind: str) -> Any:
    if kind == "control":
        from tokenrl.control.training import train_agent

        return train_agent
    from tokenrl.language.training.loop import train

    return train


def run_logged(run: PlannedRun, root: Path) -> RunEnd:
    """Make a run as `run_one`; what is printed meanwhile goes to a file beside its directory, seed_0.log."""
    try:
        with _printing_to(root / f"{run.path}.log"):
            return run_one(run, root)
    except OSError as error:
        return RunEnd(run.path, "failed", f"What it prints could not be kept: {describe(error)}", 0.0)


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Append to a file what this process prints, libraries in C included; an empty file is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = {number: os.dup(number) for number in (1, 2)}
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for number in before:
            os.dup2(file, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in before.items():
            os.dup2(kept, number)
            os.close(kept)
        os.close(file)
        if path.stat().st_size == 0:
            path.unlink()
