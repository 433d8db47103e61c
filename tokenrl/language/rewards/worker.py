"""Runs reward functions under a deadline, in a process of their own, because only a process can be killed.

A regular expression that backtracks for ever holds the interpreter, so neither a thread nor a signal handler
of the same process gets a turn. The process is a freshly spawned interpreter. A fork would also inherit
lambdas and closures, but it would inherit the locks and thread pools of a process that runs torch too, and
these can hang the child without any fault of the reward. Data is pickled through a pipe, which only this
program and its own child use.

If a function changes globals or its own attributes, the change stays in that process.

If this program is killed, which no exit handler sees, the process must not be left over, however its function
hangs. So this program holds one end of a pipe, the lifeline, and never writes to it. When this program ends,
the system closes the pipe and then sends SIGIO to the process and to all that it started, which ends them
without asking an interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing.util  # its own exit handler, which waits for children, must be registered before ours
import os
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, Stopped, TokenrlError, describe
from tokenrl.language.rewards.calls import Called, call_rewards
from tokenrl.names import FILE_MODULE, import_file
from tokenrl.runs.output import printing

START_SECONDS = 120.0  # for imports, which do not count towards the deadline of a function


class RewardWorker:
    """Several reward functions in one process that can be killed; the first call starts it."""

    def __init__(self, sources: Mapping[str, Any], timeout: float) -> None:
        """Take the functions; nothing is started yet.

        Args:
            sources: by name, anything that `load_reward` takes. A spec is loaded in the process; a callable
                is pickled, and a pickled function is only the name of its module and its own.
            timeout: seconds for one call of a function. Async functions run together, and the timeout is for
                all of them.

        Raises:
            Refused: the timeout is not above 0, or a function cannot be pickled.
        """
        if not (math.isfinite(timeout) and timeout > 0):
            raise Refused(f"reward_timeout={timeout}: give seconds above 0, or leave it out for no deadline.")
        self.timeout = timeout
        self._names = ", ".join(sources)
        self._pickled = {name: _pickled(name, source) for name, source in sources.items()}
        self._connection: Connection | None = None
        self._process: Any = None

    def __call__(self, rows: Mapping[str, list[Any]], state: Mapping[str, Any]) -> Called:
        """Do what `call_rewards` does, in the process and with a deadline for each function.

        Raises:
            Stopped: as in `call_rewards`, or a function took too long or ended the process.
            Refused: the process cannot be started with these functions.
        """
        if not self._pickled:
            return Called({}, {}, {}, {})
        if self._connection is None:
            self._start()
        try:
            self._connection.send_bytes(ForkingPickler.dumps((dict(rows), dict(state))))  # type: ignore[union-attr]
        except (BrokenPipeError, ConnectionResetError):
            raise self._died("The reward functions") from None
        except Exception as error:
            raise Stopped(
                f"The arguments of the reward functions ({', '.join(rows)}) cannot be sent to their process "
                f"({describe(error)}). Keep plain values in the data's columns, or leave reward_timeout out."
            ) from error
        return self._answer("The reward functions", self.timeout)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        watched, lifeline = context.Pipe(duplex=False)
        # Not a daemon, which may not have children of its own: a reward may well use a process pool.
        self._process = context.Process(target=_serve, args=(theirs, watched), name="tokenrl-rewards")
        self._process.start()
        theirs.close()  # else the pipe stays open when the process ends
        watched.close()
        self._end = weakref.finalize(self, _end, self._process, self._connection, lifeline)
        self._end.atexit = False
        atexit.register(self._end)
        # An import statement cannot find modules that were loaded from a file, so their paths are sent along.
        loaded = [(name, module) for name, module in sys.modules.items() if name.startswith(FILE_MODULE)]
        files = [(name, str(module.__file__)) for name, module in loaded]
        with contextlib.suppress(BrokenPipeError):  # `_answer` reports how the process ended
            self._connection.send((files, self._pickled))
        self._answer(
            f"The process of the reward functions {self._names}", max(START_SECONDS, self.timeout), Refused
        )

    def _answer(self, stage: str, seconds: float, fault: type[TokenrlError] = Stopped) -> Any:
        """Wait for the next result; each stage that the process announces restarts the deadline."""
        assert self._connection is not None
        deadline = time.monotonic() + seconds
        while True:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise fault(
                    f"{stage} did not return within {seconds:g} s (reward_timeout={self.timeout:g}) and was "
                    "killed. Make it faster (a regular expression with nested repetition can take for ever), "
                    "set a shorter timeout on whatever it waits for, or raise reward_timeout."
                )
            try:
                kind, content = self._connection.recv()
            except (EOFError, ConnectionResetError):
                raise self._died(stage, fault) from None
            if kind == "stage":
                stage, deadline = content, time.monotonic() + seconds
            elif kind == "result":
                return content
            else:
                error, cause = content
                raise error from (RuntimeError(cause) if cause else None)

    def _died(self, stage: str, fault: type[TokenrlError] = Stopped) -> TokenrlError:
        process = self._process
        process.join(5)
        code = process.exitcode
        self.close()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return fault(
            f"{stage} ended the process that it ran in ({how}), so no reward came back. A crash in compiled "
            "code, sys.exit, or too little memory can be the cause. A program that calls tokenrl.train with "
            "reward_timeout needs `if __name__ == '__main__':` around the call, because the process imports "
            "that program."
        )

    def close(self) -> None:
        """Kill the process and all that it started; the next call starts a new one."""
        if self._process is not None:
            self._end()
        self._process = self._connection = None


def _pickled(name: str, source: Any) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(source))
    except Exception as error:
        raise Refused(
            f"Reward function {name} cannot run under reward_timeout: it has to be sent to a process that "
            f"can be killed, and pickling it raised {describe(error)}. Lambdas, functions inside functions "
            "and objects that hold locks or connections cannot be sent. Write it at the top level of a file "
            "and name it, as in rewards.py:function or module:object, so that the process can load it; or "
            "leave reward_timeout out."
        ) from error


def _end(process: Any, connection: Connection, lifeline: Connection) -> None:
    connection.close()
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)  # its group: also what the functions started
        process.kill()
    process.join(10)
    lifeline.close()


def _end_with_the_trainer(watched: Connection) -> None:
    """Let this process, and all that it will start, be ended as soon as the other end of a pipe is closed."""
    import fcntl  # not on Windows

    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends the process
    fcntl.fcntl(watched, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)
    if watched.poll():  # it was closed before
        os._exit(1)


@printing(needed=False)
def _serve(connection: Connection, watched: Connection) -> None:
    """Run in the process: load the functions, then answer calls until the pipe closes."""
    with contextlib.suppress(AttributeError, OSError, ImportError):  # as on Windows
        os.setsid()
        _end_with_the_trainer(watched)
    # A signal to the whole job asks the training to finish its step, which needs rewards, so this process
    # goes on. It uses a handler because programs that a reward starts would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        functions = _load(*connection.recv())
        connection.send(("result", None))
        while True:
            rows, state = connection.recv()
            try:
                called = call_rewards(functions, rows, state, lambda stage: connection.send(("stage", stage)))
                _reply(connection, called)
            except TokenrlError as error:
                cause = error.__cause__
                text = "".join(traceback.format_exception(cause)) if cause is not None else ""
                connection.send(("error", (type(error)(str(error)), text)))
    except Refused as error:
        connection.send(("error", (error, "")))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the training has ended


def _reply(connection: Connection, called: Called) -> None:
    try:
        connection.send(("result", called))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        raise Stopped(
            f"The values that reward functions gave to log_extra ({', '.join(called.extra)}) cannot be sent "
            f"back ({describe(error)}); give it numbers and texts."
        ) from error


def _load(files: list[tuple[str, str]], pickled: Mapping[str, bytes]) -> dict[str, Any]:
    from tokenrl.language.rewards.composition import load_reward

    functions = {}
    for name, data in pickled.items():
        try:
            for module, file in files:
                if module not in sys.modules:
                    import_file(Path(file))
            functions[name] = load_reward(ForkingPickler.loads(data))
        except Refused:
            raise
        except BaseException as error:
            raise Refused(
                f"Reward function {name} cannot be loaded in the process that reward_timeout needs "
                f"({describe(error)}). Write it at the top level of a file and name it, as in "
                "rewards.py:function, or leave reward_timeout out."
            ) from error
    return functions
