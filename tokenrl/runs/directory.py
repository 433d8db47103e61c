"""Makes and locks the directory of a run, and knows where its files lie.

`RunDirectory.create` checks everything before it writes or removes anything. It then holds a lock until
`release`, so that two runs never mix their files.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenrl import __version__
from tokenrl.configuration import read_config
from tokenrl.errors import Refused
from tokenrl.runs.checkpoint import settle_directory
from tokenrl.runs.files import write_json, write_text

_OWN_ENTRY = re.compile(r"\.?step_\d{6,}(\.parquet)?(\.partial|\.old)?|episode-episode-\d+\.mp4")
_FILES = (
    "config.json",
    "metrics.jsonl",
    "timings.jsonl",
    "summary.json",
    "report.html",
    "learning_curve.png",
)
_FOLDERS = ("completions", "checkpoints", "model", "tensorboard", "videos")
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

    def __init__(self, path: Path, lock: Any, *, begun: bool, made: Sequence[Path] = ()) -> None:
        """Wrap a folder whose lock is already held; use `create` instead.

        `made` are the folders that did not exist before, the innermost first.
        """
        self.path = path
        self._lock = lock
        self._begun = begun
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
            overwrite: replace the run that the folder holds. It is removed at `begin` and not before, so that
                a refusal in between loses no results. Only files that a run writes are removed; others stay.
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
                settle_directory(run / "model")
            _refuse_foreign(run)  # again: another run may have written here before we had the lock
            if _holds_run(run) and not (overwrite or resume):
                raise Refused(
                    f"The output directory {run} already holds a run; give another directory, continue that "
                    "run with --resume auto (in Python: resume='auto'), or replace it with --overwrite."
                )
        except BaseException:
            lock.release()
            raise
        return cls(run, lock, begun=not _holds_run(run), made=made)

    def begin(self) -> None:
        """Remove the run that the folder held. `write_config` calls this; a second call does nothing.

        Raises:
            Refused: a file of that run cannot be removed.
        """
        try:
            if not self._begun:
                _remove_run(self.path)
        except OSError as error:
            message = f"The run in {self.path} cannot be replaced ({error}); give another directory."
            raise Refused(message) from error
        self._begun = True

    @property
    def steps(self) -> int | None:
        """Number of steps of the run that has ended in the folder; None if that is not known."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(self.summary.read_text(encoding="utf-8"))["steps"])
        return None

    def cut_back(self, step: int) -> None:
        """Keep the run that the folder holds, but remove what it wrote after a step: that is made again.

        Raises:
            Refused: metrics.jsonl or timings.jsonl is damaged; nothing has been removed.
            Stopped: a file cannot be written.
        """
        kept = {path: _until(step, path) for path in (self.metrics, self.timings) if path.exists()}
        self._begun = True
        for path, lines in kept.items():
            write_text(path, lines)
        for path in [*self.completions.glob("step_*.parquet"), *self.checkpoints.glob("step_*")]:
            if _OWN_ENTRY.fullmatch(path.name) and int(path.stem.removeprefix("step_")) > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.summary.unlink(missing_ok=True)

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

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Call `begin`, then write `config` and the versions of the packages to config.json."""
        self.begin()
        write_json(self.config, {"versions": versions(), **config})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which is replaced as a whole."""
        write_json(self.summary, summary)


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that decide the numbers of a run."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "tokenrl": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _until(step: int, path: Path) -> str:
    """Return the lines of metrics.jsonl or timings.jsonl up to a step, without a last one that was cut."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        return "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{path} is damaged ({error!r}), so the run cannot be continued as if nothing had happened. "
            "Mend that file, or start a new run from a checkpoint's weights with --model."
        ) from error


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
    """Remove the files of a run. config.json goes last, so that an interrupted removal can be repeated."""
    for folder in _FOLDERS:
        inside = run / folder
        if inside.is_symlink() or inside.is_file():
            inside.unlink()  # a link is removed, never followed
        elif folder in ("model", "tensorboard") and inside.is_dir():
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
