"""Keeps a trained state that cannot be written into its run directory, because the disk is full or gone."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenrl.errors import Stopped


def rescue(save: Callable[[Path], Path | None], wanted: Path) -> str:
    """Save a checkpoint in the first place that takes it; return in words where it is.

    Args:
        save: saves it in an empty folder and returns its path; None if there is nothing to save.
        wanted: the folder that cannot be written.
    """
    tried = []
    for place in _places():
        tried.append(str(place))
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="tokenrl-", dir=place))
            saved = save(folder)
        except (OSError, Stopped):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        if saved is None:
            folder.rmdir()
            return ""
        return (
            f"The state of the run was saved as {saved} instead. Move that folder into {wanted} to continue "
            "from it, or start another run from its weights with --model."
        )
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
