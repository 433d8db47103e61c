"""Checks before a run that its directory has the space that it will need. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenrl.errors import Refused


def check_space(directory: Path, needed: int) -> None:
    """Refuse a run for which there is not enough space.

    Args:
        directory: where the run writes; it and its parents need not exist yet.
        needed: bytes of all that the run keeps at the same time.

    Raises:
        Refused: fewer bytes are free. Where the system does not tell how many are, nothing is refused.
    """
    directory = directory.absolute()
    there = next(folder for folder in (directory, *directory.parents) if folder.exists())
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        return
    if needed > free:
        raise Refused(
            f"The run needs about {in_words(needed)} in {directory} for its checkpoints and its model, and "
            f"{in_words(free)} are free there. Free space, lower keep_checkpoints, or give an output_dir on "
            "another disk."
        )


def in_words(size: float) -> str:
    """Return a number of bytes as text with two significant figures, or whole units, such as 1.5 GiB."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while size >= 1000 and power < len(units) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.2g} {units[power]}" if size < 10 and power else f"{size:.0f} {units[power]}"
