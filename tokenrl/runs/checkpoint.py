"""A checkpoint is complete or absent.

It is written to a hidden folder beside its place, synced, listed with hashes in manifest.json, and renamed
last. A crash at any moment leaves the older checkpoints and at most one hidden folder, which the next save
removes.
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
from typing import Any, NamedTuple

from tokenrl.errors import Refused, Stopped
from tokenrl.runs.files import sync_file, sync_folder, write_json

_NAME = re.compile(r"step_\d{6,}")
_MANIFEST = "manifest.json"


class Latest(NamedTuple):
    """The newest complete checkpoint, if any, and what is wrong with each newer one that was skipped."""

    path: Path | None
    skipped: list[str]


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], *, keep: int | None) -> Path:
    """Save one checkpoint and, once it is verified, remove the oldest ones.

    Args:
        folder: the run's `checkpoints`; made if absent. Only one process may save there.
        step: number of updates made. A step is saved once: a complete checkpoint of it is returned as it is.
        write: called with an empty folder to fill; the name manifest.json at its top is taken.
        keep: how many checkpoints to keep, this one included, at least 1; None keeps all.

    Returns:
        The path, `folder`/step_000100.

    Raises:
        Refused: `keep` below 1.
        Stopped: `write` failed or the disk is full; the partial is gone, older checkpoints are as they were.
    """
    if keep is not None and keep < 1:
        raise Refused(f"{keep} checkpoints to keep is too few; keep 1 or more, or None for all.")
    final = folder / f"step_{step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(
            ".step_*.partial"
        ):  # left by a crash; the run's lock says nobody is writing it
            shutil.rmtree(stale)
        if final.exists() and _is_complete(final):
            return final
        partial.mkdir()
        write(partial)
        _seal(partial, step)
        if final.exists():  # a damaged one of the same step
            shutil.rmtree(final)
        os.rename(partial, final)
        sync_folder(folder)
        verify_checkpoint(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, Stopped) or not isinstance(error, Exception):
            raise
        kept = latest_checkpoint(folder).path
        raise Stopped(
            f"The checkpoint of step {step} could not be saved in {folder} ({error!r}); "
            + (f"the last good one is {kept}." if kept else "there is no earlier one.")
        ) from error
    _prune(folder, step, keep)
    return final


def verify_checkpoint(path: Path) -> None:
    """Check every file of a checkpoint against its manifest (size, then SHA-256).

    Raises:
        Refused: naming the file that is missing or altered.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError as error:
        raise Refused(
            f"The checkpoint {path} has no {_MANIFEST}: it is not complete; use an earlier one."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{_MANIFEST} of the checkpoint {path} is damaged ({error!r}); use an earlier one."
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
    """Find the newest checkpoint that verifies; a damaged newer one is skipped and its fault told."""
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
    """List the checkpoints, oldest first: by number, since step_1000000 sorts before step_999999 by name."""
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
    """Sync every file and list it; the manifest comes after what it lists."""
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
        os.rename(path, doomed)  # a removal cut short must not leave half a checkpoint under a good name
        shutil.rmtree(doomed, ignore_errors=True)


def replace_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder aside, then put it in place of `directory`: no reader sees a part of it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        aside.chmod(0o755)  # mkdtemp's is private
        write(aside)
        if directory.exists():
            old = aside.with_suffix(".old")
            os.rename(directory, old)
            os.rename(aside, directory)
            shutil.rmtree(old)
        else:
            os.rename(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
