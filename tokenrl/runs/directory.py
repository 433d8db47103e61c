"""Makes and locks the directory of a run, and knows where its files lie.

`RunDirectory.create` checks everything before it writes or removes anything. It then holds a lock until
`release`, so that two runs never mix their files.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.errors import Refused
from tokenrl.runs.files import write_json
from tokenrl.runs.folders import settle

_WRITTEN = (
    *("learning_curve.png", "report.html", "summary.json", "timings.jsonl", "metrics.jsonl", ".*.partial"),
    *("model", "tensorboard", "videos/*episode*.mp4", "completions/step_*.parquet"),
    *("completions/.step_*", "checkpoints/step_[0-9]*", "checkpoints/.step_*", "config.json"),
)
"""What a run writes, as patterns; config.json is the last, so that a removal cut short can be repeated."""
_PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "peft", "gymnasium", "numpy", "safetensors"),
    "tokenizers",
)


class RunDirectory:
    """The locked folder of one run, as a context manager that releases the lock at its end.

    Attributes:
        path: the folder.
        config, metrics, timings, completions, checkpoints, summary, model, report, plot: paths inside the
            folder, which need not exist yet.
    """

    def __init__(self, path: Path, lock: Any, *, made: Sequence[Path] = ()) -> None:
        """Wrap a folder whose lock is already held; use `create` instead.

        `made` are the folders that did not exist before, the innermost first.
        """
        self.path = path
        self._lock = lock
        self._made = made
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
    def create(
        cls, path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False
    ) -> RunDirectory:
        """Make the folder, or use one that is empty or holds a run, and lock it.

        Args:
            path: the folder; its parents are made too.
            overwrite: replace the run that the folder holds. It is removed by `write_config` and not before,
                so that a refusal in between loses no results. Only files that a run writes are removed.
            resume: continue the run that the folder may hold.

        Raises:
            Refused: the path contains `..` or is a file; the folder holds a run that is neither to be
                replaced nor continued; it holds files that no run wrote; another run is using it; or it
                cannot be written.
        """
        run = Path(path)
        if ".." in run.parts:
            raise Refused(f"The output directory {str(run)!r} contains '..'; give its path without it.")
        try:
            if run.exists() and not run.is_dir():
                raise Refused(f"The output directory {run} is a file; give a directory that is new or empty.")
            _refuse_foreign(run)
            made = [folder for folder in (run, *run.parents) if not folder.exists()]
            run.mkdir(parents=True, exist_ok=True)
            busy = f"Another run is using {run} and holds its lock"
            lock = acquire_lock(run, f"{busy}; wait for it to end or give another directory.")
        except Refused:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise Refused(
                f"The output directory {str(run)!r} cannot be used ({error}); give another one."
            ) from error
        try:
            with contextlib.suppress(OSError):  # what a crash left while the model was replaced
                settle(run / "model")
            _refuse_foreign(run)  # again: another run may have written here before we had the lock
            if _holds_run(run) and not (overwrite or resume):
                raise Refused(
                    f"The output directory {run} already holds a run; give another directory, continue that "
                    "run with --resume auto (in Python: resume='auto'), or replace it with --overwrite."
                )
        except BaseException:
            lock.release()
            raise
        return cls(run, lock, made=made)

    def write_config(self, config: Mapping[str, Any], *, keep: bool = False) -> None:
        """Write `config` and the versions of the packages to config.json.

        Args:
            config: the entries of config.json.
            keep: continue the run that the folder holds; otherwise it is removed.

        Raises:
            Refused: a file of that run cannot be removed.
        """
        try:
            if not keep:
                _remove_run(self.path)
        except OSError as error:
            message = f"The run in {self.path} cannot be replaced ({error}); give another directory."
            raise Refused(message) from error
        write_json(self.config, {"versions": versions(), **config})

    @property
    def steps(self) -> int | None:
        """Number of steps of the run that has ended in the folder; None if that is not known."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(self.summary.read_text(encoding="utf-8"))["steps"])
        return None

    def release(self) -> None:
        """Release the lock, so that another run may use the directory.

        Folders that `create` made are removed if nothing has been written into them, as after a check.
        """
        with contextlib.suppress(OSError):  # it is not empty; or Windows, where an open file stays
            if self._made and [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()  # while it is held, so that no other run can take it
                for folder in self._made:
                    folder.rmdir()
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which is replaced as a whole."""
        write_json(self.summary, summary)


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that decide the numbers of a run.

    So does the processor: with another one PyTorch may choose instructions that round differently.
    """
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "tokenrl": import_module("tokenrl").__version__,
    }
    found["processor"] = processor()
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def processor() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _holds_run(run: Path) -> bool:
    return (run / "config.json").exists() or (run / "metrics.jsonl").exists()


def _written_by_run(run: Path) -> bool:
    """Return whether tokenrl wrote what looks like a run; a saved model also has a config.json."""
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
        f"The output directory {run} is not empty and holds no run of tokenrl ({shown}). Nothing in it was "
        "touched. Give a directory that is new or empty."
    )


def acquire_lock(folder: Path, busy: str) -> Any:
    """Lock a folder and return the lock; the system unlocks it if this process is killed.

    Args:
        folder: the folder, which exists.
        busy: what to say if another process holds the lock.

    Raises:
        Refused: another process holds the lock.
        OSError: nothing can be written there.
    """
    from filelock import FileLock, Timeout

    # Where nothing can be written, this raises an OSError; the lock alone would call it a timeout.
    (folder / ".lock").touch()
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Refused(busy) from error
    return lock


def _remove_run(run: Path) -> None:
    """Remove what a run has written; a link is removed, never followed."""
    for path in [path for pattern in _WRITTEN for path in run.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name in ("videos", "completions", "checkpoints"):
        with contextlib.suppress(OSError):  # it is not there, or holds files of others
            (run / name).rmdir()
