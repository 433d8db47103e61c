"""A stop signal finishes the step, and lets the run save, instead of killing it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class GracefulStop:
    """Catches SIGTERM and SIGINT while it is entered; the loop looks at `requested` between steps.

    The first signal only sets `requested`. Once that is set a SIGINT (Ctrl-C again) raises KeyboardInterrupt
    at once, for who cannot wait; another SIGTERM changes nothing. Outside the main thread, where Python
    delivers no signals, it does nothing.

    Attributes:
        requested: the signal's number, or None.

    Example:
        with GracefulStop() as stop:
            while step < max_steps and not stop.requested:
                ...
        sys.exit(stop.exit_code)
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Prepare; `quiet` says nothing on stderr (for all processes but the first)."""
        self.requested: int | None = None
        self._quiet = quiet
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """0 if no signal came, else 128 + its number: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.requested if self.requested else 0

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            hint = "; Ctrl-C again exits at once" if number == signal.SIGINT else ""
            self._say(f"{signal.Signals(number).name}: this step will be finished and saved{hint}")
        elif number == signal.SIGINT:
            self.requested = number
            raise KeyboardInterrupt

    def _say(self, line: str) -> None:
        if not self._quiet:
            with contextlib.suppress(
                OSError
            ):  # sys.stderr may be in the middle of a write, and refuses a second
                os.write(2, f"\n{line}\n".encode())
