"""Calls code of environments: in the random state of its episode, async calls together.

Environments draw from the global streams of `random` and `numpy.random`. Each episode has its own state of
both, which depends on its seed alone. Otherwise the order of a batch would change its episodes, and a run
could not be continued exactly.
"""

from __future__ import annotations

import inspect
import random
import types
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np

from tokenrl.errors import TokenrlError
from tokenrl.language.rewards.calls import Attempt, await_all
from tokenrl.user_code import own_process, user_code


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


def call_all(calls: Sequence[tuple[RandomStreams, Callable[[], Any]]]) -> list[Attempt]:
    """Make N calls in order, each in its random state; await together what the async ones return.

    Args:
        calls: the random state of each call, and the call.

    Returns:
        What came of each call.
    """
    attempts = []
    with user_code():
        for streams, call in calls:
            try:
                with streams, own_process():
                    attempt = Attempt(call(), None, 0.0)
            except (KeyboardInterrupt, TokenrlError):
                raise
            except BaseException as error:
                attempt = Attempt(None, error, 0.0)
            attempts.append(attempt)
        waiting = [i for i, attempt in enumerate(attempts) if inspect.isawaitable(attempt.output)]
        driven = [_driven(attempts[i].output, calls[i][0]) for i in waiting]
        for i, attempt in zip(waiting, await_all(driven), strict=True):
            attempts[i] = attempt
    return attempts


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
        except BaseException as error:
            resume = partial(steps.throw, error)
