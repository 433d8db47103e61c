"""Makes and locks the directory of a run, and removes what a run has written.

`RunDirectory` checks everything before it writes or removes anything. It then holds a lock until `release`,
so that two runs never mix their files. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.errors import Refused, refusing
from tokenrl.files import TRAINED_PROMPTS, appending, recover, remove

_FOLDERS = ("videos", "completions", "checkpoints", "warm_start", "tensorboard")
_FILES = (
    *_FOLDERS,
    "report.html",
    "summary.json",
    "timings.jsonl",
    "metrics.jsonl",
    "model",
    TRAINED_PROMPTS,  # of an earlier version
    "config.json",
)
"""What a run writes into its folder; config.json is the last, so that a removal cut short can be repeated."""
_PARTIAL = tuple(f".{name}.partial" for name in _FILES)


class RunDirectory:
    """The locked folder of one run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path, *, may_hold_run: bool = False, new: bool = False) -> None:
        """Make the folder, or use one that is empty or holds a run, and lock it.

        Args:
            path: the folder; its parents are made too.
            may_hold_run: the folder may hold a run, which is to be continued, or replaced: whoever does so calls
                `remove_run_files` as late as possible, so that a refusal in between loses no results.
            new: the folder must not exist yet.

        Raises:
            Refused: the path is a file; the folder holds a run that is neither to be replaced nor continued;
                it holds files that no run wrote, or links where a run removes files; another run is using
                it; or it cannot be written.
            FileExistsError: `new` was asked for, and the folder exists.
        """
        self.path = run = directory_path(path)
        try:
            str(run).encode()  # what a run writes names it, in UTF-8
            _refuse_content(run, may_hold_run)
            self._made = [folder for folder in (run, *run.parents) if not folder.exists()]
            run.mkdir(parents=True, exist_ok=not new)
            busy = f"Another run is using {run}; wait for it to end or give another directory."
            self._lock = acquire_lock(run, busy)
        except Refused:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte, or bytes that are no text
            if new and isinstance(error, FileExistsError):
                raise
            raise Refused(
                f"The output directory {str(run)!r} cannot be used ({error}); give another one."
            ) from error
        self._clean()

    def _clean(self) -> None:
        """Remove what a crash or an interrupt left while something was replaced or removed."""
        with contextlib.suppress(OSError):
            recover(self.path / "model")
            for name in ("completions", "checkpoints"):
                remove_debris(self.path / name)
            for name in _PARTIAL:
                remove(self.path / name)

    def release(self) -> None:
        """Release the lock, so that another run may use the directory.

        Folders that were made are removed if nothing has been written into them, as after a check.
        """
        self._clean()
        with contextlib.suppress(OSError):  # it is not empty; or Windows, where an open file stays
            if self._made and [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()  # while it is held, so that no other run can take it
                for folder in self._made:
                    folder.rmdir()
        self._lock.release()


def directory_path(path: str | Path) -> Path:
    """Return the path of an output directory; one with `..` is resolved, as its folders may not exist yet."""
    is_above = ".." in Path(path).parts and "\0" not in str(path)
    return Path(path).resolve() if is_above else Path(path)


def numbered(kind: str, number: int) -> Path:
    """Return the directory of a run of this command that was given none, by its number."""
    return Path("runs", f"{kind}-{number}")


def newest(kind: str) -> int:
    """Return the largest number of a run of this command that was given no directory; 0 if there is none."""
    names = [path.name.removeprefix(f"{kind}-") for path in Path("runs").glob(f"{kind}-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def new_directory(kind: str) -> RunDirectory:
    """Make and lock a directory with the next number; runs that start at the same time take different ones.

    Raises:
        Refused: it cannot be written.
    """
    while True:
        with contextlib.suppress(FileExistsError):  # another run has just made it
            return RunDirectory(numbered(kind, newest(kind) + 1).absolute(), new=True)


def _refuse_content(run: Path, may_hold_run: bool) -> None:
    """Refuse a folder with files that no run wrote, a run in part behind links, or one that is to stay.

    A saved model also has a config.json.
    """
    for link in filter(Path.is_symlink, (run / name for name in _FOLDERS)):
        raise Refused(
            f"{link} is a link, and a run writes and removes files in its own directory only. Put a folder there, or "
            "give another output directory."
        )
    names = sorted(entry.name for entry in run.iterdir()) if run.is_dir() else []
    names = [name for name in names if name not in (".lock", "warm_start", *_PARTIAL)]
    is_run = "timings.jsonl" in names
    with contextlib.suppress(Refused):
        is_run = is_run or "tokenrl" in read_config(run).get("versions", ())
    if names and not is_run:
        listing = ", ".join(names[:5])
        raise Refused(
            f"The output directory {run} holds no run, but {listing}. Give a new or empty one."
        )
    if names and not may_hold_run:
        raise Refused(
            f"The output directory {run} already holds a run; give another directory, continue it (--resume auto), "
            "or replace it (--overwrite)."
        )


def remove_debris(folder: Path) -> None:
    """Remove what a crash left of checkpoints or tables in a folder, in which no other process writes."""
    for path in list(folder.glob(".step_*")):
        with contextlib.suppress(OSError):
            remove(path)


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
    appending(folder / ".lock").close()
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Refused(busy) from error
    return lock


def in_use(run: Path) -> bool:
    """Return whether a process holds the lock of a run, also of one that may only be read."""
    try:
        import fcntl

        with os.fdopen(os.open(run / ".lock", os.O_RDONLY | os.O_NONBLOCK)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # Windows; or there is no lock that can be opened
        return False
    return False


def remove_run_files(run: Path, keep: Collection[str] = ()) -> None:
    """Remove the files and folders of a run but for what `keep` names; a link is removed, never followed.

    Raises:
        Refused: a file cannot be removed.
    """
    with refusing(f"The run in {run} cannot be replaced", "Give another directory."):
        for name in (*_PARTIAL, *_FILES):
            if name not in keep:
                remove(run / name)
