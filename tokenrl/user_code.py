"""Tells a failure of code that a user wrote from a signal to end. Imports no torch.

Rewards, environments, tasks, baselines and trackers are code that tokenrl calls but did not write. Whatever
such code raises is its own failure, SystemExit and KeyboardInterrupt included: otherwise a `sys.exit(0)` in a
reward would end a run without a word and with code 0. Only a signal to end, such as Ctrl-C, passes through.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from tokenrl.errors import describe

ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that ask a program to end. Others, such as the SIGALRM of a timeout, belong to the code itself."""


@contextlib.contextmanager
def marked_interrupts() -> Iterator[None]:
    """Let `is_interrupt` tell a Ctrl-C from a `raise KeyboardInterrupt` in this block.

    Python's own handler of SIGINT leaves no trace in an error; here one that does takes its place, in the
    main thread, where signals arrive. Ask `is_interrupt` inside the block: outside it, nobody can tell.
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
    raise KeyboardInterrupt


def is_interrupt(error: BaseException) -> bool:
    """Return whether a person or the system ended the program by a signal, and not the code that ran.

    The error was then raised by the handler of such a signal: ours, or that of a program that calls tokenrl.
    While Python's own handler of SIGINT is in place, any KeyboardInterrupt in the main thread counts as one.
    """
    if isinstance(error, KeyboardInterrupt) and _pythons_own_handler():
        return True
    handlers = [getattr(signal.getsignal(number), "__code__", None) for number in ENDS]
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


def _pythons_own_handler() -> bool:
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def raised(error: BaseException) -> str:
    """Say in words what was raised and where, as 'it raised ValueError: no map (my_envs.py, line 7)'."""
    if isinstance(error, ImportError):  # the line is one of Python's own, and the message names the module
        return f"it raised {describe(error)}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"it raised {describe(error)} ({Path(last.filename).name}, line {last.lineno})"
