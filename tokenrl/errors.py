"""Defines the errors that a user can cause, and the hints and places in their messages. Imports no torch.

It also tells files from pipes and devices, for which a reader would wait without end.

`Refused` is raised before training has begun, `Stopped` during it, and `Interrupted` where a signal ends what
comes before. Rewards and callbacks raise `Finished`, which ends a run without an error. The message of each is
one paragraph: the user's value, what is allowed, and what to do. The command line prints only the message and
exits with `exit_code`.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import ENAMETOOLONG
from pathlib import Path
from typing import Any


class Ended(RuntimeError):
    """What user code raised in place of StopIteration, or of an error that is no Exception (see `user_code`)."""


ENDS = (SystemExit, GeneratorExit, Ended)
"""Errors that would end a program, a generator or a block around the code without a word."""
USER_CODE_FAILED = (Exception, SystemExit, GeneratorExit)
"""What code that a user wrote (rewards, environments, tasks, baselines) may raise as its own failure.

SystemExit is among them: otherwise a `sys.exit(0)` in a reward would end a run without a word and with
code 0. KeyboardInterrupt is not: it is the user who presses Ctrl-C.
"""


PACKAGE = Path(__file__).parent
STREAMS = ("/dev", "/dev/fd", "/dev/pts", "/proc/self/fd")
"""Folders in which a system shows each process its own pipes and terminals, such as /dev/stdin."""


class TokenrlError(Exception):
    """An error that the user can correct; its message is written for the user."""

    exit_code = 1


class Refused(TokenrlError, ValueError):
    """Raised before the first step, so that nothing has been trained and nothing is lost (exit code 2)."""

    exit_code = 2


class Silent(Refused):
    """Raised in the other processes of a run that the main one refuses; the command line is silent."""


class Stopped(TokenrlError, RuntimeError):
    """Raised during a run; the last complete checkpoint stays as it was (exit code 1)."""

    exit_code = 1


class Lost(Stopped):
    """Raised where another process of this run has ended."""


class Finished(TokenrlError):
    """Raised by code of the user's that ends a training run, such as a reward whose budget is spent.

    So may a reward, an environment, an engine, a baseline, prompt_weights, teacher_context and a callback. Raised
    before the policy has moved, it breaks off the step, which is left out; raised later, it lets the step be
    completed. The run saves the state there and ends as usual in all its processes, with exit code 0;
    `resume="auto"` continues it. Only `train` ends so; elsewhere it is an error (exit code 2).

    Example:
        >>> raise Finished("10,000 molecules scored")
    """

    exit_code = 2


@contextmanager
def ending(words: list[str]) -> Iterator[None]:
    """Let `Finished` end only this context, so that what comes after it is done; its words join a list."""
    try:
        yield
    except Finished as end:
        words.append(str(end))


class Interrupted(TokenrlError):
    """Raised where a signal ended what comes before the first step; its exit code is 128 plus the number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Placed(dict[str, Any]):
    """A row of data with its location in the user's data, such as `line 8` of a file, for error messages."""

    def __init__(self, row: Mapping[str, Any], location: str) -> None:
        super().__init__(row)
        self.location = location


def with_places(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) for each row; the location is that in the user's data, else the row's number."""
    for number, row in enumerate(rows):
        yield row.location if isinstance(row, Placed) else f"row {number}", row


def locations_of(rows: Iterable[Any]) -> list[str]:
    """Return the locations of rows in the user's data; empty if they are unknown."""
    return [row.location for row in rows if isinstance(row, Placed)]


ALIKE = (
    {
        "answer",
        "answers",
        "solution",
        "target",
        "label",
        "ground_truth",
        "reference",
        "output",
        "completion",
    },
    {"prompt", "question", "problem", "query", "instruction", "input", "text"},
)
"""Names that columns of data have for the same."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ' Did you mean X?' for an error message, or an empty text if none of the names is near.

    A name of the same meaning goes first, and of those that are written alike one of the same letters.
    """
    names = list(names)
    near = []
    for synonyms in ALIKE:
        if name in synonyms:
            near += [candidate for candidate in names if candidate in synonyms]
    similar = difflib.get_close_matches(name, names, n=9)
    near += sorted(similar, key=lambda candidate: sorted(candidate) != sorted(name))
    return f" Did you mean '{near[0]}'?" if near else ""


def suggest(name: str, names: Iterable[str]) -> str:
    """Return ' Did you mean X? Available: a, b, c.' for an error message.

    A long list of names is left out if one of them is near.
    """
    names = sorted(names)
    near = nearest(name, names)
    if near and len(names) > 30:
        return near
    return near + f" Available: {', '.join(names) or 'none'}."


def written(thing: object, write: Callable[[Any], str] = repr) -> str:
    """Return an object as `repr` or `str` writes it; only its type if that fails, as by its own method."""
    try:
        return write(thing)
    except USER_CODE_FAILED:
        return f"a {type(thing).__name__} that cannot be written"


def describe(error: BaseException) -> str:
    """Return 'Type: message' of an error and of the first error that caused it, on one line.

    An error without a message is only its type. Causes that form a ring are followed once.
    """
    root = error
    followed = {id(error)}
    while (cause := root.__cause__) is not None and id(cause) not in followed:
        root = cause
        followed.add(id(root))
    return " caused by ".join(dict.fromkeys(map(_line, (error, root))))


def _line(error: BaseException) -> str:
    text = " ".join(written(error, str).split())[:400]
    if isinstance(error, Ended):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def raised(error: BaseException) -> str:
    """Say in words what a user's code raised and where: 'it raised ValueError: no map (envs.py, line 7)'."""
    # the line is one of Python's own, and the message names the module
    if isinstance(error, ImportError):
        return f"it raised {describe(error)}"
    return f"it raised {describe(error)}{code_line(error)}"


def code_line(error: BaseException, first: bool = False) -> str:
    """Return where an error was raised, as in ' (envs.py, line 7)'; or the first line outside of tokenrl."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if first:
        frames = [frame for frame in frames if PACKAGE not in Path(frame.filename).parents][:1]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def explain(error: BaseException) -> TokenrlError | None:
    """Return in plain words what would end the program, used up memory, a lost process or a long name; else None."""
    if isinstance(error, TokenrlError):  # it is in plain words already
        return None
    if isinstance(error, ENDS):
        return Stopped(f"Code that was called would have ended this program: {raised(error)}.")
    if getattr(error, "errno", 0) == ENAMETOOLONG:
        return Refused(f"This is longer than a file's name can be: {error}.")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    words = str(error)
    if kinds & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in words:
        return Stopped(
            f"There is not enough memory ({describe(error)}). Give less at once: of a language model fewer "
            "--tokens-per-pass, --micro-batch-size, --sampling-batch-size or, in lab measure, "
            "--rows-at-once, which change no result, or shorter completions; of an agent fewer --num-envs."
        )
    if "RuntimeError" in kinds and ("DistError" in kinds or "/gloo/" in words):
        return Lost(
            "Another process of this run has ended or does not answer; what it printed says why. Start all "
            f"of them again to continue the run. PyTorch said: {describe(error)}"
        )
    return None


@contextmanager
def refusing(fault: str, remedy: str, kind: type[TokenrlError] = Refused) -> Iterator[None]:
    """Raise an error of the block as `Refused`, with its fault and its remedy; an error in plain words stays.

    Args:
        fault: what failed.
        remedy: what to do, in whole sentences.
        kind: what is raised.
    """
    try:
        yield
    except TokenrlError:
        raise
    except Exception as error:  # libraries, files and user code raise errors of all kinds
        raise kind(f"{fault} ({describe(error)}). {remedy}") from error


def is_stream(path: Path) -> bool:
    """Return whether a path is a pipe, a terminal or a redirected file that this process was started with."""
    return str(path.parent) in STREAMS


def is_special(path: Path) -> bool:
    """Return whether a path is a pipe or a device, whose content may never end, and no such stream."""
    return path.exists() and not (path.is_file() or path.is_dir() or is_stream(path))


def read_file(path: Path) -> bytes:
    """Return the content of a regular file, or of a stream of this process such as /dev/stdin.

    Raises:
        OSError: it cannot be read, or it is another pipe or a device.
    """
    if is_special(path):
        raise OSError("it is a pipe or a device, and only regular files are read")
    return path.read_bytes()
