"""Seals a folder with a list of its files, by which any later change of them is detected.

manifest.json holds the size and the SHA-256 of every file of the folder, and the SHA-256 of its own content.
A folder verifies only if it holds exactly the listed files, byte for byte, and if the manifest itself is,
byte for byte, the text that `seal` wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tokenrl.errors import Refused
from tokenrl.runs.files import replacing

MANIFEST = "manifest.json"
_EARLIER = {"step", "files"}
_KEYS = {*_EARLIER, "sha256"}


def seal(folder: Path, *, step: int | None = None) -> None:
    """Write the manifest of a folder. The manifest is on the disk when this returns; see `sync_tree`.

    Args:
        folder: holds files and folders of files. A link or an empty folder in it would never verify.
        step: number of updates made when the files were written; None if it has no meaning for them.
    """
    names = sorted(_names(folder))
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names
    }
    with replacing(folder / MANIFEST) as partial:
        partial.write_bytes(_text(step, files))


def is_sealed(folder: Path) -> bool:
    """Return whether a folder has a manifest, intact or damaged; one of another program does not count."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except OSError:
        return (folder / MANIFEST).exists()
    except ValueError:
        return True
    return isinstance(content, dict) and not _KEYS.isdisjoint(content)


def verify(folder: Path, *, mend: str) -> int | None:
    """Check that a folder holds exactly the files of its manifest, unchanged.

    Args:
        folder: the folder.
        mend: the sentence of a refusal that says what to do instead.

    Returns:
        The step that was given to `seal`.

    Raises:
        Refused: the manifest or a file is missing, altered or cut short, or there is a file more; the message
            names it.
    """

    def refuse(fault: str, mend: str = mend) -> NoReturn:
        raise Refused(f"The folder {folder} cannot be used: {fault}. {mend}")

    try:
        step, files = _read(folder, refuse)
        found = set(_names(folder))
        if lost := sorted(set(files) - found):
            refuse(f"it lacks its file {lost[0]}")
        for name, entry in sorted(files.items()):
            file = folder / name
            if file.is_symlink() or not file.is_file():
                refuse(f"its {name} is no longer a file")
            if file.stat().st_size != entry["size"] or _sha256(file) != entry["sha256"]:
                refuse(f"its file {name} was altered or cut short")
    except OSError as error:
        refuse(f"it cannot be read ({error})")
    if more := sorted(found - set(files)):
        refuse(f"it holds {more[0]}, which is not in its {MANIFEST}", "Remove it.")
    return step


def _read(folder: Path, refuse: Callable[[str], NoReturn]) -> tuple[int | None, dict[str, Any]]:
    """Return step and files of the manifest, or call `refuse` with what is wrong with it."""
    if not folder.is_dir():
        refuse("there is no such folder")
    if not (folder / MANIFEST).exists():
        refuse(f"it has no {MANIFEST}, so it is not complete")
    text = (folder / MANIFEST).read_bytes()
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    names = set(content) if isinstance(content, dict) else set()
    if names == _EARLIER:
        refuse("it was written by an earlier release of tokenrl, whose checkpoints cannot be verified")
    if names != _KEYS or text != _text(content["step"], content["files"]) or (folder / MANIFEST).is_symlink():
        refuse(f"its {MANIFEST} was altered or cut short")
    return content["step"], content["files"]


def _text(step: int | None, files: dict[str, Any]) -> bytes:
    """Return the one text that a manifest of this content has: a changed space is a changed manifest."""
    content: dict[str, Any] = {"step": step, "files": files}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=2, sort_keys=True).encode() + b"\n"


def _names(folder: Path) -> Iterator[str]:
    """Yield, relative to the folder, every file but the manifest, every link, and every empty folder."""

    def stop(error: OSError) -> NoReturn:
        raise error

    for place, folders, files in os.walk(folder, onerror=stop):
        inside = Path(place).relative_to(folder)
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (
            (inside / name).as_posix() for name in (*files, *linked) if inside / name != Path(MANIFEST)
        )
        if not folders and not files and inside != Path():
            yield inside.as_posix()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
