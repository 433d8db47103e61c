"""Keeps warm-started models between runs, each made once by whoever needs it first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenrl.errors import Refused, describe


def cache_directory() -> Path:
    """Return the directory of warm-started models: $TOKENRL_CACHE, else tokenrl/ in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TOKENRL_CACHE") or Path(home) / "tokenrl")


@contextlib.contextmanager
def cache_entry(name: str) -> Iterator[Path]:
    """Lock an entry of the cache, and give its directory; it exists if somebody has made it before.

    Raises:
        Refused: the cache cannot be written.
    """
    from filelock import FileLock

    directory = cache_directory() / name
    lock = FileLock(str(directory) + ".lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise Refused(
            f"Warm-started models are kept in {directory.parent}, which cannot be written "
            f"({describe(error)}). Name another directory with the environment variable TOKENRL_CACHE."
        ) from error
    try:
        yield directory
    finally:
        lock.release()


def say_damaged(directory: Path, error: Exception, warn: Callable[[str], None]) -> None:
    """Warn that an entry of the cache cannot be loaded and is made again."""
    warn(f"the cached model {directory} is damaged, and is made again. {describe(error)}")
