"""Saves and verifies checkpoints, each of which is either complete or absent.

A checkpoint is written to a hidden folder beside its place and synced to the disk; its files are listed with
their hashes in manifest.json; last, the folder is renamed. A crash at any moment leaves the older checkpoints
and hidden folders, which the next save removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenrl.errors import Refused, Stopped, TokenrlError, describe
from tokenrl.runs.files import not_written, sync_folder, sync_tree
from tokenrl.runs.manifest import is_sealed, seal, verify

_NAME = re.compile(r"step_[0-9]{6,}")
_MEND = (
    "Use an earlier checkpoint; to load the model in it unverified, copy it without manifest.json elsewhere."
)


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
        write: fills the empty folder that it is given with files; no links, no empty folders, and no
            manifest.json, which is added.
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
        for stale in folder.glob(".step_*"):
            if stale.suffix in (".partial", ".old"):
                _remove(stale)
        if final.exists() and _is_complete(final):
            return final
        partial.mkdir()
        write(partial)
        sync_tree(partial)
        seal(partial, step=step)
        if os.path.lexists(final):  # a damaged checkpoint of the same step
            _discard(final)
        os.rename(partial, final)
        sync_folder(folder)
        sync_folder(folder.parent)  # which may have got `folder` only now
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
    """Check that a checkpoint holds exactly the files that were saved, unchanged, and is that of its step.

    Raises:
        Refused: a file is missing, altered or one too many (the message names it), or the folder was renamed
            to another step.
    """
    step, name = verify(path, mend=_MEND), path.resolve().name
    if _NAME.fullmatch(name) and name != f"step_{step:06d}":
        raise Refused(
            f"The folder {path} cannot be used: it is the checkpoint of step {step}. Rename it back."
        )


def verify_source(folder: Path) -> None:
    """Verify a folder from which a model is read, if it is a checkpoint, a copy of one, or inside of one.

    Other folders pass, because nothing says what they should hold.

    Raises:
        Refused: see `verify_checkpoint`.
    """
    place = folder.resolve()
    for path in (place, place.parent):
        if is_sealed(path) or (path.parent.name == "checkpoints" and _NAME.fullmatch(path.name)):
            verify_checkpoint(path)


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


def _prune(folder: Path, step: int, keep: int | None) -> None:
    if keep is None:
        return
    older = [path for path in _steps(folder) if _step_of(path) < step]
    for path in older[: max(0, len(older) - (keep - 1))]:
        with contextlib.suppress(OSError):  # no reason to end a run whose newest checkpoint is complete
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint; rename it first, since an interrupted removal must not leave half of it there."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link in its place; it may be absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_directory(directory: Path, write: Callable[[Path], None], *, sealed: bool = False) -> None:
    """Write a new folder aside and rename it to `directory`, so that no reader sees it half written.

    A crash at any moment leaves the old folder or the new one; between two renames the old one is hidden, and
    `settle_directory` brings it back. Only one process may write there.

    Args:
        directory: the folder to make or to replace; its parent exists.
        write: fills the empty folder that it is given.
        sealed: add a manifest, so that `model_directory` refuses the folder once a file of it was altered.

    Raises:
        Stopped: `write` failed or the disk is full; an old folder is unchanged.
    """
    aside, old = _beside(directory)
    try:
        settle_directory(directory)
        aside.mkdir()
        write(aside)
        sync_tree(aside)
        if sealed:
            seal(aside)
        if directory.exists():
            os.rename(directory, old)
        os.rename(aside, directory)
        sync_folder(directory.parent)
    except TokenrlError:
        raise
    except Exception as error:  # on a full disk, tokenizers raises a bare Exception
        raise not_written(directory, error) from error
    finally:
        with contextlib.suppress(OSError):
            settle_directory(directory)


def settle_directory(directory: Path) -> None:
    """Bring back the folder that an interrupted `replace_directory` had hidden, and remove what it left."""
    aside, old = _beside(directory)
    if old.exists() and not directory.exists():
        os.rename(old, directory)
    _remove(aside)
    _remove(old)


def _beside(directory: Path) -> tuple[Path, Path]:
    """Return the hidden folders beside a folder for what will replace it and for what it replaces."""
    return directory.with_name(f".{directory.name}.partial"), directory.with_name(f".{directory.name}.old")
