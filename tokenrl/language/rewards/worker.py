"""Runs a reward function under a deadline, in a process of its own, because only a process can be killed.

A signal of this process would interrupt most functions, but a reward may use SIGALRM itself, as math-verify
does, and code of a library may run for ever without returning to Python. The process is a freshly spawned
interpreter, since a fork would inherit the locks and thread pools of a process that runs torch. It imports the
program only where the function is defined in it; otherwise the program would do its work again. Data is
pickled through a pipe, which only this program and its child use. When this program ends, the child reads the
end of the pipe and exits. If a function changes globals or its own attributes, the change stays in that
process.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from tokenrl.errors import (
    USER_CODE_FAILED,
    Ended,
    Refused,
    Stopped,
    TokenrlError,
    code_line,
    describe,
    refusing,
)
from tokenrl.language.rewards.calls import Late, Pending, attempt_each, listed
from tokenrl.language.rewards.loading import load_reward
from tokenrl.names import OWN_MODULES, import_source
from tokenrl.runs.signals import GracefulStop

START_SECONDS = 120.0  # for imports, which do not count towards the deadline of a function
PR_SET_PDEATHSIG = 1
GONE = (EOFError, BrokenPipeError, ConnectionResetError)


class RewardProcess:
    """A reward function in a process that can be killed; the first call starts it."""

    def __init__(
        self, name: str, source: Any, function: Callable[..., Any], timeout: float
    ) -> None:
        """Take the function; nothing is started yet.

        Args:
            name: what messages call it.
            source: anything that `load_reward` takes. A spec is loaded in the process; a callable is pickled,
                and a pickled function is only the name of its module and its own.
            function: the function itself, the parameters of which count.
            timeout: seconds for one call.

        Raises:
            Refused: the function cannot be pickled.
        """
        self.__wrapped__ = function
        self._timeout = timeout
        self._subject = f"Reward function {name}"
        fault = (
            f"{self._subject} cannot run under reward_timeout, as it cannot be sent to a process"
        )
        with refusing(fault, "Write it in a file, and name it as in rewards.py:function."):
            self._pickled = bytes(ForkingPickler.dumps(source))
        self._process: Any = None

    def __call__(
        self, *, log_extra: Any = None, log_metric: Any = None, **arguments: Any
    ) -> Pending:
        """Begin a call, with the arguments that a reward gets; its `answer` may raise what `_receive` does.

        Raises:
            Refused: the process cannot be started with this function.
        """
        if self._process is None:
            self._start()
        logs = {"log_extra": log_extra, "log_metric": log_metric}
        with contextlib.suppress(*GONE):  # `_receive` says how the process ended
            self._pipe.send(arguments)
        deadline = time.monotonic() + self._timeout

        def answer() -> Any:
            output, records = self._receive(max(0.0, deadline - time.monotonic()), Stopped)
            for log, *values in records:
                logs[log](*values)
            return output

        return Pending(answer)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # An import statement cannot find some modules of files, so the paths of all are sent along.
        files = [str(file) for file, _ in OWN_MODULES.values()]
        # Not a daemon, which may not have children of its own: a reward may well use a process pool.
        process = context.Process(target=_serve, args=(theirs, files, self._pickled))
        program = sys.modules["__main__"]
        if b"__main__" not in self._pickled:
            # so that it is not imported there
            sys.modules["__main__"] = types.ModuleType("__main__")
        fault = f"{self._subject} cannot have a process of its own"
        try:
            with refusing(fault, "Leave reward_timeout out."):
                process.start()
        finally:
            sys.modules["__main__"] = program
        self._process = process
        theirs.close()  # else the pipe stays open when the process ends
        self._end = weakref.finalize(self, _end, process, self._pipe)
        self._receive(max(START_SECONDS, self._timeout), Refused)

    def _receive(self, seconds: float, fault: type[TokenrlError]) -> Any:
        """Return the next result of the process.

        Raises:
            Ended: the function raised an error.
            Late: there is no result after these seconds.
            TokenrlError: the function raised it, or the process cannot work or ended, which is a `fault`.
        """
        try:
            if self._pipe.poll(seconds):
                result = self._pipe.recv()
                if isinstance(result, BaseException):
                    raise result
                return result
        except GONE:
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            end = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise fault(
                f"{self._subject} ended the process that it ran in ({end}). A program that defines a reward and "
                "calls tokenrl.train with reward_timeout needs `if __name__ == '__main__':`, as the process imports "
                "it."
            ) from None
        self.close()
        raise (Late if fault is Stopped else fault)(
            f"{self._subject} did not return within {self._timeout:g} s (reward_timeout={self._timeout:g}) and was "
            "killed: make it faster (nested repetition in a pattern can take for ever), raise reward_timeout, or "
            "give such completions no reward with on_reward_timeout abstain."
        )

    def close(self) -> None:
        """Kill the process and all that it started; the next call starts a new one."""
        self._end()
        self._process = None


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    # its group, where the system has groups: also what the function started
    with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)


def _serve(pipe: Connection, files: list[str], pickled: bytes) -> None:
    """Run in the process: load the function, then answer calls until the pipe closes."""
    with contextlib.suppress(AttributeError, OSError):  # as on Windows
        os.setsid()
        # Linux alone: killed with the training, whatever hangs here.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A signal to the whole job asks the training to finish its step, which needs rewards, so this process
    # goes on. It uses a handler because programs that a reward starts would inherit SIG_IGN.
    GracefulStop(quiet=True, patient=True).__enter__()
    for file in files:
        # A function of a file that cannot be imported says so below.
        with contextlib.suppress(*USER_CODE_FAILED):
            import_source(file, "reward")
    with contextlib.suppress(*GONE):  # the training has ended
        try:
            function = load_reward(ForkingPickler.loads(pickled))
        except USER_CODE_FAILED as error:
            problem = f"A reward cannot be loaded under reward_timeout ({describe(error)})"
            remedy = "write it in a file, and name it as in rewards.py:function"
            pipe.send(Refused(f"{problem}: {remedy}."))
            return
        pipe.send(None)
        while True:
            result: Any = _result(function, pipe.recv())
            try:
                answer = ForkingPickler.dumps(result)
            except Exception as error:
                problem = f"What a reward returned or gave to log_extra cannot be sent back ({describe(error)})."
                answer = ForkingPickler.dumps(Stopped(problem))
            pipe.send_bytes(answer)


def _result(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call the function; return its output and what it logged, or an error that pickle can write."""
    records: list[tuple[Any, ...]] = []

    def log_extra(column: str, values: Iterable[Any]) -> None:
        records.append(("log_extra", column, list(values)))

    def log_metric(name: str, value: float) -> None:
        records.append(("log_metric", name, float(value)))

    logs = {"log_extra": log_extra, "log_metric": log_metric}
    output, error, _ = attempt_each({"": function}, arguments, {"": logs})[""]
    if error is None:
        return listed(output), records
    if isinstance(error, TokenrlError):
        return error
    return Ended(f"{describe(error)}{code_line(error, first=True)}")
