"""Awaits async reward functions together, in an event loop that no failure of theirs can end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple


class Attempt(NamedTuple):
    """The result of one call of a reward function.

    Attributes:
        output: what it returned, unchecked; None if it raised.
        error: what it raised, of any kind (`sys.exit` raises SystemExit); None if it returned.
        seconds: the time that it took.
    """

    output: Any
    error: BaseException | None
    seconds: float


def await_all(awaitables: Sequence[Awaitable[Any]]) -> list[Attempt]:
    """Await all of them at the same time; return what came of each, in order."""
    if not awaitables:
        return []

    async def gathered() -> list[Attempt]:
        return await asyncio.gather(*map(_attempt, awaitables))

    return asyncio.run_coroutine_threadsafe(gathered(), _event_loop()).result()


async def _attempt(awaitable: Awaitable[Any]) -> Attempt:
    began = time.perf_counter()
    try:
        output, error = await awaitable, None
    except BaseException as raised:  # no Ctrl-C is among them: Python raises it in the main thread only
        output, error = None, raised
    return Attempt(output, error, time.perf_counter() - began)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One event loop, in a thread of its own, for the life of the process.

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
