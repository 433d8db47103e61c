"""Runs reward functions under a deadline, in a process of their own, because only a process can be killed.

A signal of this process would interrupt most functions, but a reward may use SIGALRM itself, as math-verify
does, and code of a library may run for ever without returning to Python. The process is a freshly spawned
interpreter, since a fork would inherit the locks and thread pools of a process that runs torch. It imports the
program only where a function is defined in it; otherwise the program would do its work again. Data is
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
import types
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

from tokenrl.errors import USER_CODE_FAILED, Refused, Stopped, TokenrlError, describe, refusing
from tokenrl.language.rewards.calls import CallResults, TrainerState, call_rewards
from tokenrl.language.rewards.loading import load_reward
from tokenrl.names import OWN_MODULES, import_source
from tokenrl.runs.signals import GracefulStop

START_SECONDS = 120.0  # for imports, which do not count towards the deadline of a function
PR_SET_PDEATHSIG = 1
NEEDED = ("fork", "killpg", "setsid")
"""Functions of the module os that Windows lacks."""
GONE = (EOFError, BrokenPipeError, ConnectionResetError)


class Late(Stopped):
    """A call of reward functions missed its deadline."""


class RewardWorker:
    """Several reward functions in one process that can be killed; the first call starts it.

    Attributes:
        timeout: seconds for one call of a function.
        abstains: whether completions whose call missed the deadline get no reward, instead of an error.
        late: number of such completions so far.
        abstains_on_error: whether completions for which a function raises an error get no reward from it.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        timeout: float,
        abstains: bool = False,
        abstains_on_error: bool = False,
    ) -> None:
        """Take the functions; nothing is started yet.

        Args:
            sources: by name, anything that `load_reward` takes. A spec is loaded in the process; a callable
                is pickled, and a pickled function is only the name of its module and its own.
            timeout: seconds for one call of a function. Async functions run together, and the timeout is for
                all of them.
            abstains: give completions whose call missed the deadline no reward.
            abstains_on_error: see `call_rewards`.

        Raises:
            Refused: a function cannot be pickled, the system is Windows, or this process is a daemon.
        """
        if not all(hasattr(os, name) for name in NEEDED):
            raise Refused(
                f"This system ({sys.platform}) cannot end a reward function with all that it has started, as "
                "reward_timeout does: leave reward_timeout out, or run on Linux or macOS."
            )
        if multiprocessing.current_process().daemon:
            raise Refused(
                "This process is a daemon of multiprocessing, which may have no process of its own, as reward_timeout "
                "needs: leave reward_timeout out, or start this process with daemon=False."
            )
        self.timeout = timeout
        self.abstains = abstains
        self.late = 0
        self.abstains_on_error = abstains_on_error
        self._pickled = {name: _pickled(name, source) for name, source in sources.items()}
        self._process: Any = None

    def __call__(
        self, rows: Mapping[str, list[Any]], state: TrainerState, locations: Sequence[str] = ()
    ) -> CallResults:
        """Do what `call_rewards` does, in the process and with a deadline for each function.

        If `abstains`, a call that misses it is made again for each completion alone.

        Raises:
            Stopped: as in `call_rewards`, or a function took too long or ended the process.
            Refused: the process cannot be started with these functions.
        """
        try:
            return self._called(rows, state, locations)
        except Late:
            if not self.abstains:
                raise
        count = len(rows["prompts"])
        if count == 1:
            self.late += 1
            spent = dict.fromkeys(self._pickled, self.timeout)
            nothing = {name: np.full(1, np.nan) for name in self._pickled}
            return CallResults(nothing, {}, {}, spent, {})
        parts = []
        for i in range(count):
            row = {name: column[i : i + 1] for name, column in rows.items()}
            parts.append(self(row, state, locations[i : i + 1]))
        names = dict.fromkeys(name for part in parts for name in part.extra)
        logged: dict[str, list[float]] = {}
        for part in parts:
            for name, values in part.logged.items():
                logged.setdefault(name, []).extend(values)
        return CallResults(
            {name: np.concatenate([part.values[name] for part in parts]) for name in self._pickled},
            {name: [part.extra.get(name, [None])[0] for part in parts] for name in names},
            logged,
            {name: sum(part.seconds[name] for part in parts) for name in self._pickled},
            parts[0].faults,
        )

    def _called(
        self, rows: Mapping[str, list[Any]], state: TrainerState, locations: Sequence[str]
    ) -> CallResults:
        if self._process is None:
            self._start()
        fault = f"The arguments of the reward functions ({', '.join(rows)}) cannot be sent to their process"
        remedy = "Keep plain values in the columns, or leave reward_timeout out."
        # `_answer` says how the process ended
        with refusing(fault, remedy, Stopped), contextlib.suppress(*GONE):
            self._pipe.send((dict(rows), state, locations))
        answer: CallResults = self._answer("The reward functions", self.timeout, Stopped)
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # An import statement cannot find some modules of files, so the paths of all are sent along.
        files = [str(file) for file, _ in OWN_MODULES.values()]
        # Not a daemon, which may not have children of its own: a reward may well use a process pool.
        arguments = (theirs, files, self._pickled, self.abstains_on_error)
        self._process = context.Process(target=_serve, args=arguments)
        program = sys.modules["__main__"]
        if not any(b"__main__" in data for data in self._pickled.values()):
            sys.modules["__main__"] = types.ModuleType(
                "__main__"
            )  # so that it is not imported there
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = program
        theirs.close()  # else the pipe stays open when the process ends
        self._end = weakref.finalize(self, _end, self._process, self._pipe)
        stage = f"The process of the reward functions {', '.join(self._pickled)}"
        self._answer(stage, max(START_SECONDS, self.timeout), Refused)

    def _answer(self, stage: str, seconds: float, fault: type[TokenrlError]) -> Any:
        """Wait for the next result; each stage that the process announces restarts the deadline."""
        try:
            while self._pipe.poll(seconds):
                answer = self._pipe.recv()
                if isinstance(answer, TokenrlError):
                    raise answer
                if not isinstance(answer, str):
                    return answer
                stage = answer
        except GONE:
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            end = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise fault(
                f"{stage} ended the process that it ran in ({end}). A program that defines a reward and calls "
                "tokenrl.train with reward_timeout needs `if __name__ == '__main__':`, as the process imports it."
            ) from None
        self.close()
        raise (Late if fault is Stopped else fault)(
            f"{stage} did not return within {seconds:g} s (reward_timeout={self.timeout:g}) and was killed: "
            "make it faster (nested repetition in a pattern can take for ever), raise reward_timeout, or give such "
            "completions no reward with on_reward_timeout abstain."
        )

    def close(self) -> None:
        """Kill the process and all that it started; the next call starts a new one."""
        if self._process is not None:
            self._end()
        self._process = None


def _pickled(name: str, source: Any) -> bytes:
    fault = (
        f"Reward function {name} cannot run under reward_timeout, as it cannot be sent to a process"
    )
    with refusing(fault, "Write it in a file, and name it as in rewards.py:function."):
        return bytes(ForkingPickler.dumps(source))


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)  # its group: also what the functions started
    process.kill()
    process.join(10)


def _serve(
    pipe: Connection, files: list[str], pickled: Mapping[str, bytes], abstains: bool
) -> None:
    """Run in the process: load the functions, then answer calls until the pipe closes."""
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
            functions = {
                name: load_reward(ForkingPickler.loads(data)) for name, data in pickled.items()
            }
        except USER_CODE_FAILED as error:
            problem = (
                f"The reward functions cannot be loaded under reward_timeout ({describe(error)})"
            )
            pipe.send(
                Refused(
                    f"{problem}: write them in a file, and name them as in rewards.py:function."
                )
            )
            return
        pipe.send(None)
        while True:
            rows, state, locations = pipe.recv()
            try:
                answer = ForkingPickler.dumps(
                    call_rewards(functions, rows, state, locations, pipe.send, abstains=abstains)
                )
            except TokenrlError as error:  # is to be raised in the training
                answer = ForkingPickler.dumps(ExceptionWithTraceback(error, error.__traceback__))
            except Exception as error:
                problem = f"What was given to log_extra cannot be sent back ({describe(error)})."
                answer = ForkingPickler.dumps(Stopped(problem))
            pipe.send_bytes(answer)
