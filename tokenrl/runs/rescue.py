"""Keeps what was trained if the run directory is gone or its disk is full."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def rescue(save: Callable[[Path], Path | None], what: str, then: str) -> str:
    """Save something in the first place that takes it; return in words where it is.

    Args:
        save: saves it in an empty folder and returns its path; None if there is nothing to save.
        what: what is saved, with its verb.
        then: what can be done with it, as a sentence.
    """
    tried = []
    for place in _places():
        tried.append(str(place))
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="tokenrl-", dir=place))
            saved = save(folder)
        except Exception:  # on a full disk, tokenizers raises a bare Exception
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        if saved is None:
            folder.rmdir()
            return ""
        return f"{what} saved as {saved} instead. {then}"
    return f"Nor could it be saved in {', '.join(tried)}."


def _places() -> Iterator[Path]:
    """Yield the folder for temporary files, the user's own, and one in memory, as far as there are such."""
    with contextlib.suppress(OSError):  # none can be written
        yield Path(tempfile.gettempdir())
    with contextlib.suppress(RuntimeError):  # no home
        yield Path.home()
    memory = Path("/dev/shm")
    if memory.is_dir():
        yield memory
