"""Keeps the output clean: libraries stay quiet, and output that cannot be written ends in no traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

from tokenrl.errors import Stopped

UNREAD = 141
"""Exit code of a command whose output nobody reads any more: 128 plus SIGPIPE, as of other programs."""
_LIBRARIES = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
_LIBRARIES |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def hush_libraries() -> None:
    """Turn off what would hide the lines of a run; a user can turn it on again by the same variables.

    The libraries read these environment variables when they are imported, so call this first.
    """
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def without_warnings(quiet: bool) -> Iterator[None]:
    """Hide Python's warnings inside the block if `quiet`, such as a library's about its next version."""
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets` inside the block.

    From Python, `datasets` may have been imported before `hush_libraries` could be called.
    """
    import datasets

    were_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()


def prepare_streams() -> None:
    """Open /dev/null in place of each standard stream that was closed, as by `>&-`.

    Characters that the encoding of a stream lacks are written as their numbers; bytes that it lacks are read
    as halves of surrogate pairs, which no prompt may hold.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(
                errors="surrogateescape" if name == "stdin" else "backslashreplace"
            )


@contextlib.contextmanager
def checked_output() -> Iterator[None]:
    """Write all that the block has printed.

    Raises:
        Stopped: it could not be written, as on a full disk.
        BrokenPipeError: the program that read it has ended, as with `| head`.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        if isinstance(error, BrokenPipeError) or error.filename is not None:
            raise
        mend = "Send it to a place with space, and run again."
        raise Stopped(f"The output could not be written ({error}). {mend}") from error


def drop_output() -> None:
    """Connect stdout with /dev/null: what it still buffers would fail again when Python ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
