"""One directory is the whole truth of a run: who may write there, and what lies where.

`RunDirectory.create` checks everything before it writes or removes anything, then holds a lock until it is
released, so that two runs never mix their files.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused
from tokenrl.runs.files import write_json
from tokenrl.settings import read_config

_OWN_ENTRY = re.compile(r"\.?step_\d{6,}(\.parquet)?(\.partial)?|episode-episode-\d+\.mp4")
_FILES = (
    "config.json",
    "metrics.jsonl",
    "timings.jsonl",
    "summary.json",
    "report.html",
    "learning_curve.png",
)
_FOLDERS = ("completions", "checkpoints", "model", "videos")
_PACKAGES = (
    *("tokenrl", "torch", "transformers", "accelerate", "datasets", "peft"),
    *("gymnasium", "numpy", "safetensors", "tokenizers"),
)


class RunDirectory:
    """The folder of one run, held under a lock; a context manager that gives the lock back.

    Attributes:
        path: the folder.
        config, metrics, timings, completions, checkpoints, summary, model, report, plot: the paths inside it;
            none of them need exist yet.
    """

    def __init__(self, path: Path, lock: Any, *, begun: bool) -> None:
        """Wrap a folder whose lock is held; `create` is the way in."""
        self.path = path
        self._lock = lock
        self._begun = begun
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.timings = path / "timings.jsonl"
        self.completions = path / "completions"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.model = path / "model"
        self.report = path / "report.html"
        self.plot = path / "learning_curve.png"

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, overwrite: bool = False) -> RunDirectory:
        """Make the folder, or take an empty one, and lock it.

        Args:
            path: where the run goes; parents are made.
            overwrite: replace the run that is there, though not before `begin`: whoever is refused in between
                has lost no results. Only what a run writes is removed; other files stay.

        Raises:
            Refused: `..` in the path; a file in its place; a run there and not `overwrite`; files there that
                no run wrote; another run at work there; a folder that cannot be written.
        """
        run = Path(path)
        if ".." in run.parts:
            raise Refused(
                f"The output directory {str(run)!r} contains '..'; give the directory meant, without it."
            )
        try:
            if run.exists() and not run.is_dir():
                raise Refused(f"The output directory {run} is a file; give a directory that is new or empty.")
            _refuse_foreign(run)
            run.mkdir(parents=True, exist_ok=True)
            lock = _acquire(run)
        except Refused:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise Refused(
                f"The output directory {str(run)!r} cannot be used ({error}); give another one."
            ) from error
        try:
            _refuse_foreign(run)  # again: another run may have come and gone before the lock was ours
            if _holds_run(run) and not overwrite:
                raise Refused(
                    f"The output directory {run} already holds a run; give another directory, "
                    "or replace that run with --overwrite (in Python: overwrite=True)."
                )
        except BaseException:
            lock.release()
            raise
        return cls(run, lock, begun=not _holds_run(run))

    def begin(self) -> None:
        """Remove the run that was there, once; `write_config` does it if nobody has.

        Raises:
            Refused: something of it cannot be removed.
        """
        try:
            if not self._begun:
                _remove_run(self.path)
        except OSError as error:
            message = f"The run in {self.path} cannot be replaced ({error}); give another directory."
            raise Refused(message) from error
        self._begun = True

    def release(self) -> None:
        """Give the lock back; another run may then take the directory."""
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Begin, and write config.json in one step: `config` and, under "versions", what it ran on."""
        self.begin()
        write_json(self.config, {"versions": versions(), **config})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, replaced in one step."""
        write_json(self.summary, summary)


def versions() -> dict[str, str]:
    """Name the Python, the platform and the packages that decide a run's numbers; imports none of them."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "tokenrl":  # run from a source tree; the key still marks the file as a run's
                found[package] = "unknown"
    return found


def _holds_run(run: Path) -> bool:
    return (run / "config.json").exists() or (run / "metrics.jsonl").exists()


def _written_by_run(run: Path) -> bool:
    """Tell a run from a folder that only looks like one; a saved model, too, holds a config.json."""
    try:
        if (run / "config.json").exists():
            return "tokenrl" in read_config(run).get("versions", {})
        with (run / "metrics.jsonl").open(encoding="utf-8") as file:
            return "step" in json.loads(file.readline() or '{"step": 0}')
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _refuse_foreign(run: Path) -> None:
    names = sorted(entry.name for entry in run.iterdir()) if run.is_dir() else []
    names = [name for name in names if name != ".lock" and not name.endswith(".partial")]
    if not names or (_holds_run(run) and _written_by_run(run)):
        return
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise Refused(
        f"The output directory {run} is not empty and holds no run of tokenrl ({shown}); nothing there was "
        "touched. Give a directory that is new or empty."
    )


def _acquire(run: Path) -> Any:
    from filelock import FileLock, Timeout

    (
        run / ".lock"
    ).touch()  # says by an OSError what the lock would call a timeout: that nothing can be written here
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Refused(
            f"Another run is at work in {run} and holds its lock; wait for it or give another directory."
        ) from error
    return lock


def _remove_run(run: Path) -> None:
    """Remove what a run writes; the marks of a run go last, so that a removal cut short can be repeated."""
    for folder in _FOLDERS:
        inside = run / folder
        if inside.is_symlink() or inside.is_file():
            inside.unlink()  # a link is never followed out of the run
        elif folder == "model" and inside.is_dir():
            shutil.rmtree(inside)
        elif inside.is_dir():
            for entry in inside.iterdir():
                if _OWN_ENTRY.fullmatch(entry.name):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            if not any(inside.iterdir()):
                inside.rmdir()
    for name in reversed(_FILES):
        (run / name).unlink(missing_ok=True)
        (run / f".{name}.partial").unlink(missing_ok=True)
