"""Saves and verifies checkpoints, each of which is either complete or absent.

A checkpoint is written to a hidden folder beside its place and synced to the disk; its files are listed with
their hashes in manifest.json; last, the folder is renamed. A crash at any moment leaves the older checkpoints
and at most one hidden folder, which the next save removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenrl.errors import Refused, Stopped, describe
from tokenrl.runs.files import not_written, sync_file, sync_folder, write_json

_NAME = re.compile(r"step_\d{6,}")
_MANIFEST = "manifest.json"


class Resumable(Protocol):
    """A part of a training whose state must be saved to continue the run."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain values, tensors and arrays; see `runs.states`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class Latest(NamedTuple):
    """The newest complete checkpoint, if any, and for each damaged newer one what is wrong with it."""

    path: Path | None
    skipped: list[str]


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], *, keep: int | None) -> Path:
    """Save one checkpoint, verify it, and then remove the oldest ones.

    Args:
        folder: the run's folder `checkpoints`; made if absent. Only one process may save there.
        step: number of updates made so far. A complete checkpoint of this step is not written again.
        write: fills the empty folder that it is given; the name manifest.json is reserved there.
        keep: how many checkpoints to keep, with this one, at least 1; None keeps all.

    Returns:
        The path of the checkpoint, such as `folder`/step_000100.

    Raises:
        Refused: `keep` is below 1.
        Stopped: `write` failed or the disk is full; older checkpoints are unchanged.
    """
    if keep is not None and keep < 1:
        raise Refused(f"keep was given as {keep} checkpoints; it must be 1 or more, or None for all.")
    final = folder / f"step_{step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(exist_ok=True)
        # Left by a crash. Nobody is writing there now, because this run holds the lock of the directory.
        for stale in folder.glob(".step_*.partial"):
            shutil.rmtree(stale)
        if final.exists() and _is_complete(final):
            return final
        partial.mkdir()
        write(partial)
        _seal(partial, step)
        if final.exists():  # a damaged checkpoint of the same step
            shutil.rmtree(final)
        os.rename(partial, final)
        sync_folder(folder)
        verify_checkpoint(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, Stopped) or not isinstance(error, Exception):
            raise
        raise Stopped(
            f"The checkpoint of step {step} could not be saved in {folder} ({describe(error)})."
        ) from error
    _prune(folder, step, keep)
    return final


def verify_checkpoint(path: Path) -> None:
    """Check every file of a checkpoint against its manifest (size, then SHA-256).

    Raises:
        Refused: a file is missing or altered; the message names it.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError as error:
        raise Refused(
            f"The checkpoint {path} is not complete: it has no {_MANIFEST}. Use an earlier one."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"The {_MANIFEST} of the checkpoint {path} is damaged ({error!r}); use an earlier one."
        ) from error
    for name, size, digest in expected:
        file = path / name
        if not file.is_file():
            raise Refused(f"The checkpoint {path} lacks its file {name}; use an earlier one.")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise Refused(
                f"The file {name} of the checkpoint {path} was altered or cut short; use an earlier one."
            )


def latest_checkpoint(folder: Path) -> Latest:
    """Find the newest complete checkpoint; damaged newer ones are skipped, and the result says why."""
    skipped = []
    for path in reversed(_steps(folder)):
        try:
            verify_checkpoint(path)
        except Refused as fault:
            skipped.append(str(fault))
        else:
            return Latest(path, skipped)
    return Latest(None, skipped)


def _steps(folder: Path) -> list[Path]:
    """List the checkpoints, oldest first, by number: as text, step_1000000 would come before step_999999."""
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _is_complete(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except Refused:
        return False
    return True


def _seal(partial: Path, step: int) -> None:
    """Sync every file to the disk, then write the manifest, which lists them with size and hash."""
    files = {}
    for file in sorted(partial.rglob("*")):
        if file.is_dir():
            sync_folder(file)
            continue
        sync_file(file)
        name = file.relative_to(partial).as_posix()
        files[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    write_json(partial / _MANIFEST, {"step": step, "files": files})


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _prune(folder: Path, step: int, keep: int | None) -> None:
    if keep is None:
        return
    older = [path for path in _steps(folder) if _step_of(path) < step]
    for path in older[: max(0, len(older) - (keep - 1))]:
        doomed = folder / f".{path.name}.partial"
        os.rename(path, doomed)  # first: an interrupted removal must not leave half a checkpoint here
        shutil.rmtree(doomed, ignore_errors=True)


def replace_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Write a new folder aside and rename it to `directory`, so that no reader sees it half written.

    Raises:
        Stopped: the folder could not be written; an old one is unchanged.
    """
    aside = None
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        aside.chmod(0o755)  # mkdtemp lets only the owner read
        write(aside)
        if directory.exists():
            old = aside.with_suffix(".old")
            os.rename(directory, old)
            os.rename(aside, directory)
            shutil.rmtree(old)
        else:
            os.rename(aside, directory)
    except Stopped:
        raise
    except Exception as error:  # on a full disk, tokenizers raises a bare Exception
        raise not_written(directory, error) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
