"""Runs reward functions under a deadline, in a process of their own, because only a process can be killed.

A regular expression that backtracks for ever holds the interpreter, so neither a thread nor a signal handler
of the same process gets a turn. The process is a freshly spawned interpreter, since a fork would inherit the
locks and thread pools of a process that runs torch. Data is pickled through a pipe, which only this program
and its own child use; when this program ends, the child reads the end of the pipe and exits.
If a function changes globals or its own attributes, the change stays in that process.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
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

from tokenrl.errors import USER_CODE_FAILED, Refused, Stopped, TokenrlError, describe
from tokenrl.language.rewards.calls import Called, call_rewards
from tokenrl.language.rewards.loading import load_reward
from tokenrl.names import FILE_MODULE, import_file

START_SECONDS = 120.0  # for imports, which do not count towards the deadline of a function
PR_SET_PDEATHSIG = 1
GONE = (EOFError, BrokenPipeError, ConnectionResetError)


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
        self._pickled = {name: _pickled(name, source) for name, source in sources.items()}
        self._pipe: Connection | None = None
        self._process: Any = None

    def __call__(self, rows: Mapping[str, list[Any]], state: Mapping[str, Any]) -> Called:
        """Do what `call_rewards` does, in the process and with a deadline for each function.

        Raises:
            Stopped: as in `call_rewards`, or a function took too long or ended the process.
            Refused: the process cannot be started with these functions.
        """
        if not self._pickled:
            return Called({}, {}, {}, {})
        if self._pipe is None:
            self._start()
        try:
            self._pipe.send_bytes(ForkingPickler.dumps((dict(rows), dict(state))))  # type: ignore[union-attr]
        except GONE:
            raise self._died("The reward functions", Stopped) from None
        except Exception as error:
            raise Stopped(
                f"The arguments of the reward functions ({', '.join(rows)}) cannot be sent to their process "
                f"({describe(error)}). Keep plain values in the data's columns, or leave reward_timeout out."
            ) from error
        return self._answer("The reward functions", self.timeout, Stopped)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon, which may not have children of its own: a reward may well use a process pool.
        self._process = context.Process(target=_serve, args=(theirs,), name="tokenrl-rewards")
        self._process.start()
        theirs.close()  # else the pipe stays open when the process ends
        self._end = weakref.finalize(self, _end, self._process, self._pipe)
        # An import statement cannot find modules that were loaded from a file, so their paths are sent along.
        loaded = [module for name, module in sys.modules.items() if name.startswith(FILE_MODULE)]
        with contextlib.suppress(*GONE):  # `_answer` reports how the process ended
            self._pipe.send(([str(module.__file__) for module in loaded], self._pickled))
        stage = f"The process of the reward functions {', '.join(self._pickled)}"
        self._answer(stage, max(START_SECONDS, self.timeout), Refused)

    def _answer(self, stage: str, seconds: float, fault: type[TokenrlError]) -> Any:
        """Wait for the next result; each stage that the process announces restarts the deadline."""
        assert self._pipe is not None
        deadline = time.monotonic() + seconds
        while True:
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise fault(
                    f"{stage} did not return within {seconds:g} s (reward_timeout={self.timeout:g}) and was "
                    "killed. Make it faster (a regular expression with nested repetition can take for ever), "
                    "set a shorter timeout on whatever it waits for, or raise reward_timeout."
                )
            try:
                kind, content = self._pipe.recv()
            except GONE:
                raise self._died(stage, fault) from None
            if kind == "stage":
                stage, deadline = content, time.monotonic() + seconds
            elif kind == "result":
                return content
            else:
                error, cause = content
                raise error from (RuntimeError(cause) if cause else None)

    def _died(self, stage: str, fault: type[TokenrlError]) -> TokenrlError:
        self._process.join(5)
        code = self._process.exitcode
        self.close()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return fault(
            f"{stage} ended the process that it ran in ({how}), so no reward came back. A crash in compiled "
            "code or too little memory can be the cause. A program that calls tokenrl.train with "
            "reward_timeout needs `if __name__ == '__main__':` around the call, because the process imports "
            "that program."
        )

    def close(self) -> None:
        """Kill the process and all that it started; the next call starts a new one."""
        if self._process is not None:
            self._end()
        self._process = self._pipe = None


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


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)  # its group: also what the functions started
    process.kill()
    process.join(10)


def _serve(pipe: Connection) -> None:
    """Run in the process: load the functions, then answer calls until the pipe closes."""
    with contextlib.suppress(AttributeError, OSError):  # as on Windows
        os.setsid()
    # A signal to the whole job asks the training to finish its step, which needs rewards, so this process
    # goes on. It uses a handler because programs that a reward starts would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    with contextlib.suppress(AttributeError, OSError):  # Linux: killed with the training, whatever hangs here
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        functions = _load(*pipe.recv())
        pipe.send(("result", None))
        while True:
            rows, state = pipe.recv()
            try:
                called = call_rewards(functions, rows, state, lambda stage: pipe.send(("stage", stage)))
                _reply(pipe, called)
            except TokenrlError as error:
                cause = error.__cause__
                text = "".join(traceback.format_exception(cause)) if cause is not None else ""
                pipe.send(("error", (type(error)(str(error)), text)))
    except Refused as error:
        pipe.send(("error", (error, "")))
    except GONE:
        return  # the training has ended


def _reply(pipe: Connection, called: Called) -> None:
    try:
        pipe.send(("result", called))
    except GONE:
        raise
    except Exception as error:
        raise Stopped(
            f"The values that reward functions gave to log_extra ({', '.join(called.extra)}) cannot be sent "
            f"back ({describe(error)}); give it numbers and texts."
        ) from error


def _load(files: list[str], pickled: Mapping[str, bytes]) -> dict[str, Any]:
    functions = {}
    for file in files:
        with contextlib.suppress(*USER_CODE_FAILED):  # a function of that file says so below
            import_file(Path(file))
    for name, data in pickled.items():
        try:
            functions[name] = load_reward(ForkingPickler.loads(data))
        except Refused:
            raise
        except USER_CODE_FAILED as error:
            raise Refused(
                f"Reward function {name} cannot be loaded in the process that reward_timeout needs "
                f"({describe(error)}). Write it at the top level of a file and name it, as in "
                "rewards.py:function, or leave reward_timeout out."
            ) from error
    return functions
