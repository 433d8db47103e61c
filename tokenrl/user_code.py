"""Tells a failure of code that a user wrote from a Ctrl-C. Imports no torch.

Rewards, environments, tasks, baselines and trackers are code that tokenrl calls but did not write. Whatever
such code raises is its own failure, SystemExit and KeyboardInterrupt included: otherwise a `sys.exit(0)` in a
reward would end a run without a word and with code 0. Only the Ctrl-C of a person passes through.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from tokenrl.errors import describe

_MARK = "Ctrl-C was pressed"


def interrupt() -> KeyboardInterrupt:
    """Return the KeyboardInterrupt that handlers of SIGINT raise, so that `is_interrupt` knows it.

    It is no subclass, because Python gives a program that ends with one the exit code of an ordinary error.
    """
    return KeyboardInterrupt(_MARK)


@contextlib.contextmanager
def marked_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise `interrupt()` in this block, so that `is_interrupt` can tell it from a `raise`.

    Only Python's own handler of SIGINT is replaced, and only in the main thread, where signals arrive. Ask
    `is_interrupt` inside the block: outside it, nobody can tell.
    """
    if not _pythons_own_handler():
        yield
        return
    signal.signal(signal.SIGINT, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handle(*_: object) -> None:
    raise interrupt()


def is_interrupt(error: BaseException) -> bool:
    """Return whether a person's Ctrl-C raised the error, and not the code that ran.

    While Python's own handler of SIGINT is in place, any KeyboardInterrupt in the main thread counts as one.
    """
    return isinstance(error, KeyboardInterrupt) and (error.args == (_MARK,) or _pythons_own_handler())


def _pythons_own_handler() -> bool:
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def raised(error: BaseException) -> str:
    """Say in words what was raised and where, as 'it raised ValueError: no map (my_envs.py, line 7)'."""
    if isinstance(error, ImportError):  # the line is one of Python's own, and the message names the module
        return f"it raised {describe(error)}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"it raised {describe(error)} ({Path(last.filename).name}, line {last.lineno})"
