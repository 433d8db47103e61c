"""Writes folders whole and hashed: a reader sees the old folder or the new one, and notices damaged files.

Checkpoints, models, warm starts and comparisons are written so: into a hidden folder beside their place,
which is synced to the disk, hashed, and renamed last. The hashes stand in its manifest.json:
{name: [size, SHA-256]}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, TokenrlError
from tokenrl.runs.files import not_written, sync, write_json

MANIFEST = "manifest.json"
_CARD = "README.md"  # people edit the card of a model before they share it
_MEND = f"Use another copy or an earlier checkpoint; unverified it loads from a copy without {MANIFEST}."


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a hidden empty folder, which becomes `directory` when the block ends without an error.

    A crash at any moment leaves the old folder or the new one; between two renames the old one is hidden, and
    `settle` brings it back. Only one process may write there.

    Args:
        directory: the folder to make or to replace. Its parent is made if absent, but not those above.

    Raises:
        Stopped: the block failed or the disk is full; an old folder is unchanged.
    """
    aside, old = _beside(directory)
    try:
        directory.parent.mkdir(exist_ok=True)
        settle(directory)
        aside.mkdir()
        yield aside
        _seal(aside)
        if directory.exists():
            os.rename(directory, old)
        os.rename(aside, directory)
        sync(directory.parent)
        sync(directory.parent.parent)  # which may have got the parent only now
    except TokenrlError:
        raise
    except Exception as error:  # on a full disk, tokenizers raises a bare Exception
        raise not_written(directory, error) from error
    finally:
        with contextlib.suppress(OSError):
            settle(directory)


def settle(directory: Path) -> None:
    """Bring back the folder that an interrupted `atomic_directory` had hidden, and remove what it left."""
    aside, old = _beside(directory)
    if old.exists() and not directory.exists():
        os.rename(old, directory)
    for path in (aside, old):
        if path.exists():
            shutil.rmtree(path)


def verify(folder: Path) -> None:
    """Check that a folder holds the files that its manifest names, unchanged; other files do not count.

    Raises:
        Refused: the manifest or a file is missing, altered or cut short; the message names it.
    """
    for name, entry in (_manifest(folder) or {MANIFEST: None}).items():
        with contextlib.suppress(OSError):
            if _entry(folder / name) == entry:
                continue
        fault = f"its file {name} is missing, altered, cut short or of an earlier release"
        raise Refused(f"The folder {folder} cannot be used: {fault}. {_MEND}")


def model_directory(name_or_path: str | Path) -> str | Path:
    """Return where a model lies: `model/` for a run directory, else the path or hub name itself.

    A folder with a manifest, or inside of one, is verified. Others pass, since nothing says what they should
    hold.

    Raises:
        Refused: the folder is damaged, or it lies where a checkpoint should be and is none.
    """
    run = Path(name_or_path)
    there = os.path.exists(run / "metrics.jsonl") and os.path.isdir(run / "model")
    found = run / "model" if there else name_or_path
    if os.path.isdir(found):
        place = Path(found).resolve()
        for folder in (place, place.parent):
            in_checkpoints = folder.parent.name == "checkpoints" and folder.name.startswith("step_")
            if in_checkpoints or _manifest(folder) is not None:
                verify(folder)
    return found


def _seal(folder: Path) -> None:
    """Sync a folder with all that is in it to the disk, and write its manifest last."""
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file() and path.name != _CARD:
            files[path.relative_to(folder).as_posix()] = _entry(path)
    write_json(folder / MANIFEST, files)
    sync(folder)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the entries of a manifest; none if it is damaged, None without one or with another program's."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    is_ours = isinstance(found, dict) and all(isinstance(entry, list) for entry in found.values())
    return found if is_ours else None


def _entry(file: Path) -> list[Any]:
    """Return the size of a file and its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]


def _beside(directory: Path) -> tuple[Path, Path]:
    """Return the hidden folders beside a folder for what will replace it and for what it replaces."""
    return directory.with_name(f".{directory.name}.partial"), directory.with_name(f".{directory.name}.old")
