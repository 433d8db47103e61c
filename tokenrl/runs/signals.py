"""Catches the signals that ask a run to stop, so that it can end its step and save before it exits.

What may end a run or a call before its time, and when it acts:

* SIGTERM, SIGINT or SIGHUP is noted by `GracefulStop` and acts between two steps. There the processes of a
  run exchange what came (`Session.steps`), so that all end with the same step.
* A second SIGINT acts at once, as KeyboardInterrupt.
* `reward_timeout` acts inside a step. A timer (SIGALRM) interrupts a call of an environment in this process
  (`rewards.isolation`). The process that calls reward functions is killed (`rewards.worker`); it goes on after
  the signals above, since the last step needs it.
* A process that has ended is noticed in the next exchange between processes (`runs.processes`): PyTorch raises
  an error there, of which `errors.explain` makes `Lost`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from functools import cache, partial
from types import FrameType
from typing import Any

SIGNALS = {143: "SIGTERM", 130: "SIGINT", 129: "SIGHUP"}
"""The reason that summary.json gives for an exit code."""
BY_ITSELF = ("finished", "callback", "learnt", "stuck", "no-improvement", "solved")
"""The exit reasons of runs whose training decided to end; the others are `check`, `failed` and signals."""


def ended_by_itself(summary: Mapping[str, Any]) -> bool:
    """Return whether a run ended as its training decided, from its summary.json; empty for a killed run."""
    return summary.get("exit_reason") in BY_ITSELF


@cache
def _spare_forks() -> None:
    """Let SIGTERM end the processes that this one forks, as a pool ends its workers, and waits for them.

    It is kept back during a fork, because one that came before it can end the child would be lost.
    """
    block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, [signal.SIGTERM])
    let = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, [signal.SIGTERM])

    def forked() -> None:
        if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), GracefulStop):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        let()

    os.register_at_fork(before=block, after_in_parent=let, after_in_child=forked)


class GracefulStop:
    """Context manager that catches SIGTERM, SIGINT and SIGHUP; the loop reads `requested` between steps.

    SIGHUP comes when the terminal is closed; where it is ignored already, as under nohup, it stays so.

    The first signal only sets `requested`. After that, SIGINT (a second Ctrl-C) raises KeyboardInterrupt at
    once, and the others change nothing. Outside the main thread, where Python delivers no signals, this
    class does nothing.

    Attributes:
        requested: number of the signal that came, or None.

    Example:
        with GracefulStop() as stop:
            while step < max_steps and not stop.requested:
                ...
        sys.exit(stop.exit_code)
    """

    def __init__(self, *, quiet: bool = False, patient: bool = False) -> None:
        """Prepare.

        Args:
            quiet: print nothing to stderr, as on all processes but the main one.
            patient: let no further signal raise KeyboardInterrupt.
        """
        self.requested: int | None = None
        self._quiet = quiet
        self._patient = patient
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """0 if no signal came, else 128 plus its number: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP."""
        return 128 + self.requested if self.requested else 0

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            if hasattr(os, "register_at_fork"):
                _spare_forks()
            for name in SIGNALS.values():  # Windows has no SIGHUP
                number = getattr(signal, name, None)
                if number is not None and (
                    name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
                ):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def pass_on(self) -> None:
        """Raise the signal that came, if one did, once more: for the handler that was there before."""
        if self.requested:
            signal.raise_signal(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # the step that is to be finished may need what it has forked
        if os.getpid() != self._owner:
            return
        if self.requested is None:
            self.requested = number
            hint = "; Ctrl-C again exits at once" if number == signal.SIGINT else ""
            line = f"{signal.Signals(number).name}: this step will be finished and saved{hint}"
            if not self._quiet:
                # sys.stderr may be in the middle of a write and would refuse a second one.
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{line}\n".encode())
        elif number == signal.SIGINT and not self._patient:
            self.requested = number
            raise KeyboardInterrupt
