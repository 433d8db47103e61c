"""Reward functions under a deadline: in a process of their own, because only a process can be killed.

A regular expression that backtracks for ever holds the interpreter, so that neither a thread nor a signal
handler of the same process gets a turn. The process is started by spawning a fresh interpreter. Forking would
also take lambdas and closures along, but with them the locks and thread pools of a process that runs torch,
which can hang the child for reasons that are not the reward's. What crosses the pipe is pickled, between this
program and its own child only.

What a function changes outside of its return value (globals, its own attributes) stays in that process.
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

START_SECONDS = 120.0  # for imports; a function's deadline does not count them


class RewardWorker:
    """Several reward functions in one killable process, started with the first call."""

    def __init__(self, sources: Mapping[str, Any], timeout: float) -> None:
        """Take the functions; nothing is started yet.

        Args:
            sources: by name, what `load_reward` takes: a spec is resolved in the process, a callable is
                pickled, which for a function means by the name of its module.
            timeout: seconds for one call of a function; for async functions, which run together, for all.

        Raises:
            Refused: a timeout that is not above 0, or a function that cannot be pickled.
        """
        if not (math.isfinite(timeout) and timeout > 0):
            raise Refused(f"reward_timeout={timeout}: give seconds above 0, or leave it out for no deadline.")
        self.timeout = timeout
        self._names = ", ".join(sources)
        self._pickled = {name: _pickled(name, source) for name, source in sources.items()}
        self._connection: Connection | None = None
        self._process: Any = None

    def __call__(self, rows: Mapping[str, list[Any]], state: Mapping[str, Any]) -> Called:
        """What `call_rewards` does, there, each function within the deadline.

        Raises:
            Stopped: as `call_rewards`; a function took too long, or ended the process.
            Refused: the process cannot be started with these functions.
        """
        if not self._pickled:
            return Called({}, {}, {})
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
        # Not a daemon: those may not have children of their own, and a reward may well use a process pool.
        self._process = context.Process(target=_serve, args=(theirs,), name="tokenrl-rewards")
        self._process.start()
        theirs.close()  # or the end of the process would not be seen as the end of the pipe
        end = weakref.finalize(self, _end, self._process, self._connection)
        end.atexit = False
        atexit.register(end)
        # Modules loaded from a file have a name that an import statement cannot find.
        loaded = [(name, module) for name, module in sys.modules.items() if name.startswith(FILE_MODULE)]
        files = [(name, str(module.__file__)) for name, module in loaded]
        with contextlib.suppress(BrokenPipeError):  # `_answer` says how it ended
            self._connection.send((files, self._pickled))
        self._answer(
            f"The process of the reward functions {self._names}", max(START_SECONDS, self.timeout), Refused
        )

    def _answer(self, stage: str, seconds: float, fault: type[TokenrlError] = Stopped) -> Any:
        """The next result; every stage that is announced starts the clock again."""
        assert self._connection is not None
        deadline = time.monotonic() + seconds
        while True:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise fault(
                    f"{stage} did not return within {seconds:g} s (reward_timeout={self.timeout:g}) and was "
                    "killed. Make it faster (a regular expression with nested repetition can take for ever), "
                    "give what it waits for a deadline of its own, or raise reward_timeout."
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
            f"{stage} ended the process that it ran in ({how}): no reward came back. A crash in compiled "
            "code, sys.exit, or too little memory does that. A program that calls tokenrl.train with "
            "reward_timeout needs `if __name__ == '__main__':` around the call: that process imports it."
        )

    def close(self) -> None:
        """Kill the process and what it started; it is started again if it is called again."""
        if self._process is not None:
            _end(self._process, self._connection)
        self._process = self._connection = None


def _pickled(name: str, source: Any) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(source))
    except Exception as error:
        raise Refused(
            f"Reward function {name} cannot run under reward_timeout: it has to be handed to a process that "
            f"can be killed, and pickling it raised {describe(error)}. Lambdas, functions inside functions "
            "and objects that hold locks or connections cannot be handed over. Write it at the top level of "
            "a file and name it, as rewards.py:function or module:object, so that the process makes it anew; "
            "or leave reward_timeout out."
        ) from error


def _end(process: Any, connection: Any) -> None:
    connection.close()
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group: also what the functions have started
        process.kill()
    process.join(10)


def _serve(connection: Connection) -> None:
    """What the process does: load the functions, then answer calls until the pipe closes."""
    with contextlib.suppress(AttributeError, OSError):
        os.setsid()
    # A signal to the whole job asks the training to finish its step, for which it needs rewards. A handler
    # and not SIG_IGN, which the programs that a reward starts would inherit.
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
            f"What the reward functions gave to log_extra ({', '.join(called.extra)}) cannot be sent back "
            f"({describe(error)}); give it numbers and texts."
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
        except (Exception, SystemExit) as error:
            raise Refused(
                f"Reward function {name} cannot be loaded in the process that reward_timeout gives it "
                f"({describe(error)}). Write it at the top level of a file and name it, as "
                "rewards.py:function, or leave reward_timeout out."
            ) from error
    return functions
