"""Calls code of environments in the random state of its episode, with a deadline; awaits async calls together.

Environments draw from the global streams of `random` and `numpy.random`. Each episode has its own state of
both, which depends on its seed alone. Otherwise the order of a batch would change its episodes, and a run
could not be continued exactly. The deadline is a signal, which interrupts Python code, waits in it and regular
expressions. It cannot end `os.system` and other code that does not return to Python, a loop around `except
BaseException`, a finalizer (`__del__`), whose errors Python drops, or an environment that uses SIGALRM itself.
An async method that blocks its thread instead of awaiting holds all others, which then miss their deadlines.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import random
import signal
import threading
import time
import types
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import TokenrlError, refusing
from tokenrl.user_code import own_process, user_code


class Attempt(NamedTuple):
    """What one call of a function of the user returned or raised.

    Attributes:
        output: what it returned, unchecked; None if it raised.
        error: what it raised (`sys.exit` raises SystemExit); None if it returned.
        seconds: the time that the call took.
    """

    output: Any
    error: BaseException | None
    seconds: float


class Overdue(BaseException):
    """A call missed its deadline, of some seconds. User code that catches Exception does not catch it."""


class RandomStreams:
    """An episode's own state of the global streams of `random` and `numpy.random`; active in a `with`."""

    def __init__(self, seed: int) -> None:
        python = random.Random(seed).getstate()
        numpy = np.random.RandomState(seed).get_state()
        self._states = python, numpy

    def _swap_states(self, *_: object) -> None:
        before = random.getstate(), np.random.get_state()
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        self._states = before

    __enter__ = __exit__ = _swap_states


def call_all(
    calls: Sequence[tuple[RandomStreams, Callable[[], Any]]], timeout: float | None = None
) -> list[Attempt]:
    """Make N calls in order, each in its random state; await together what the async ones return.

    Args:
        calls: the random state of each call, and the call.
        timeout: seconds that one call may take, and the async ones together; None: no limit.

    Returns:
        What came of each call; the error of one that missed the deadline is `Overdue`.

    Raises:
        Refused: a deadline is impossible here.
    """
    attempts = []
    with user_code():
        for streams, call in calls:
            try:
                with streams, own_process():
                    attempt = Attempt(within(timeout, call) if timeout else call(), None, 0.0)
            except (KeyboardInterrupt, TokenrlError):  # also of a deadline that is impossible
                raise
            except BaseException as error:
                attempt = Attempt(None, error, 0.0)
            attempts.append(attempt)
        waiting = [i for i, attempt in enumerate(attempts) if inspect.isawaitable(attempt.output)]
        driven = [_driven(attempts[i].output, calls[i][0]) for i in waiting]
        for i, attempt in zip(waiting, await_all(driven, timeout), strict=True):
            if isinstance(attempt.error, TokenrlError):
                raise attempt.error
            attempts[i] = attempt
    return attempts


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call something, and interrupt Python code and waits in it after some seconds, by a signal.

    It comes again after as many seconds, for code that catches every exception, or a finalizer that drops it.
    Once the call has returned, no signal raises anything, also one that came at that very moment. A timer of
    the program itself stands still during the call.

    Raises:
        Overdue: the deadline was missed.
        Refused: signals are impossible, as outside the main thread.
    """
    calling = False

    def interrupt(*_: object) -> None:
        if calling:
            raise Overdue(seconds)

    mend = "Leave reward_timeout out, or run on Linux or macOS in the main thread."
    with refusing("No signal can bound the calls of environments here", mend):
        timer = signal.setitimer(signal.ITIMER_REAL, 0.0)
        before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            calling = True
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
            return call()
        finally:
            calling = False
    finally:  # also if the signal arrived in the line above, as it may before Python 3.11
        calling = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)  # None: not of Python
        signal.setitimer(signal.ITIMER_REAL, *timer)


@types.coroutine
def _driven(awaitable: Awaitable[Any], streams: RandomStreams) -> Generator[Any, Any, Any]:
    """Await something with the streams swapped in while its code runs, but not while it waits."""
    steps: Any = awaitable.__await__()
    resume = partial(next, steps)
    while True:
        try:
            with streams:
                pending = resume()
        except StopIteration as end:
            return end.value
        try:
            resume = partial(steps.send, (yield pending))
        except BaseException as error:  # such as the cancellation at the deadline
            resume = partial(steps.throw, error)


def await_all(awaitables: Sequence[Awaitable[Any]], timeout: float | None = None) -> list[Attempt]:
    """Await all of them at the same time; return what came of each, in order.

    Args:
        awaitables: the N awaitables.
        timeout: seconds after which those that are not done are cancelled, with the error `Overdue`.
    """

    async def attempt(awaitable: Awaitable[Any]) -> Attempt:
        began = time.perf_counter()
        try:
            with own_process():
                output = await awaitable
        except BaseException as error:  # never of Ctrl-C, which Python raises in the main thread
            return Attempt(None, error, time.perf_counter() - began)
        return Attempt(output, None, time.perf_counter() - began)

    loop = _event_loop()
    tasks = [asyncio.run_coroutine_threadsafe(attempt(x), loop) for x in awaitables]
    concurrent.futures.wait(tasks, timeout)
    overdue = Attempt(None, Overdue(timeout), 0.0)
    # A task that is done cannot be cancelled.
    return [overdue if task.cancel() else task.result() for task in tasks]


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return one event loop, in a thread of its own, for the life of the process.

    Clients and locks that an async reward keeps between calls are bound to their loop, so all calls must use
    the same one. A thread of its own works even if the caller's thread already runs a loop, as in a notebook.
    """
    loop = asyncio.new_event_loop()

    def run() -> None:
        while not loop.is_closed():  # SystemExit in a task that a reward started ends `run_forever`
            with contextlib.suppress(BaseException):
                loop.run_forever()

    threading.Thread(target=run, name="tokenrl-rewards", daemon=True).start()
    return loop
