"""Handles output that cannot be written, because of a full disk, a reader that ended or a lost terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from tokenrl.errors import Stopped
from tokenrl.runs.quiet import without_warnings

UNREAD = 141
"""Exit code of a command whose output nobody reads any more: 128 plus SIGPIPE, as of other programs."""


class Output:
    """A text stream that remembers why it could not be written, and from then on drops all texts.

    Characters that the stream's encoding lacks are written as their numbers.

    Attributes:
        lost: the error of the first text that could not be written; None as long as there is none.
    """

    def __init__(self, stream: TextIO, fail: Callable[[OSError], None]) -> None:
        """Wrap a stream; `fail` is called once, with the first error."""
        self.lost: OSError | None = None
        self._stream, self._fail = stream, fail

    def write(self, text: str) -> int:
        """Write a text, unless the stream is lost."""
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, unless the stream is lost."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, act: Callable[..., object], *text: str) -> None:
        if self.lost is not None:
            return
        try:
            act(*text)
        except OSError as error:
            self.lost = error
            _drain(self._stream)
            self._fail(error)


def _drain(stream: TextIO) -> None:
    """Connect a stream with /dev/null: what it still buffers would fail again when Python ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def printing(*, needed: bool) -> Iterator[None]:
    """Decide what happens inside the block when stdout cannot be written. A lost stderr is always ignored.

    Args:
        needed: whether the output is what the command is for. If it is, an error ends the block at once. If
            it is not, as in a training, the block goes on, and one line on stderr says that it does.

    Raises:
        Stopped: the output is needed and could not be written.
        SystemExit: the output is needed, and the program that read it has ended, as with `| head`.
    """

    def fail(error: OSError) -> None:
        if needed:
            raise error
        print(f"tokenrl: nothing more can be printed ({error}); the run goes on without.", file=sys.stderr)

    streams = sys.stdout, sys.stderr
    out, err = Output(streams[0], fail), Output(streams[1], lambda error: None)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            out.flush()
        err.flush()
        sys.stdout, sys.stderr = streams
        if needed and isinstance(out.lost, BrokenPipeError):
            raise SystemExit(UNREAD)
        if needed and out.lost is not None:
            raise Stopped(
                f"The output could not be written ({out.lost}). Send it to a place with space, and run again."
            ) from out.lost


@contextlib.contextmanager
def undisturbed(quiet: bool) -> Iterator[None]:
    """Let a run go on inside the block when nothing can be printed; if `quiet`, hide Python's warnings."""
    with without_warnings(quiet), printing(needed=False):
        yield


def open_closed_streams() -> None:
    """Open /dev/null in place of each standard stream that was closed, as by `>&-`.

    Otherwise the next file that is opened gets the number of the stream, and what libraries print there ends
    up in that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
