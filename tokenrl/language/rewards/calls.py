"""One call of reward functions: the arguments each takes, async ones run together, a check of what came back.

Results are checked, never repaired: a NaN that passes here is a policy lost later. A deadline for rewards
that hang takes a process of its own (reward_worker.py), in which this same code runs.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Refused, Stopped, TokenrlError, describe, suggest

Reward = Callable[..., Any]
Announce = Callable[[str], None]


class Called(NamedTuple):
    """What came of one call of several functions.

    Attributes:
        values: by function, float64 [N], nan where it abstained.
        extra: columns given to `log_extra`.
        logged: values given to `log_metric`, by name.
    """

    values: dict[str, np.ndarray]
    extra: dict[str, list[Any]]
    logged: dict[str, list[float]]


def call_rewards(
    named: Mapping[str, Reward],
    rows: Mapping[str, list[Any]],
    state: Mapping[str, Any],
    announce: Announce = lambda stage: None,
) -> Called:
    """Call every function on N completions, check what came back, and collect what was logged.

    Args:
        named: the functions by their distinct names.
        rows: arguments with one value a completion, "completions" among them.
        state: the fields of `trainer_state`.
        announce: told before every stage which function it waits for, so that a deadline can name it.

    Raises:
        Stopped: a function raised, or did not return N finite numbers or None; names function and row.
        Refused: a function asks for a column that is not there.
    """
    extra: dict[str, list[Any]] = {}
    logged: dict[str, list[float]] = {}
    shared = {
        "trainer_state": SimpleNamespace(**state),
        "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
        "log_metric": lambda name, value: logged.setdefault(name, []).append(float(value)),
    }
    outputs = zip(named, run_rewards(named, rows, shared, announce), strict=True)
    values = {name: checked_rewards(name, output, rows["completions"]) for name, output in outputs}
    return Called(values, extra, logged)


def run_rewards(
    named: Mapping[str, Reward],
    rows: Mapping[str, list[Any]],
    shared: Mapping[str, Any],
    announce: Announce = lambda stage: None,
) -> list[Any]:
    """Call every function; what turns out to be awaitable runs concurrently, after the sync functions.

    Args:
        named: the functions by their distinct names.
        rows: arguments with one value a completion, "completions" among them.
        shared: arguments that do not belong to a row.
        announce: told before every stage which function it waits for.

    Returns:
        What each function returned, unchecked.

    Raises:
        Stopped: a function raised; names the function and the first row on which it raises alone.
    """
    outputs = {}
    for name, function in named.items():
        announce(f"Reward function {name}")
        outputs[name] = _attempt(function, name, {**rows, **shared})
    waiting = {name: output for name, output in outputs.items() if inspect.isawaitable(output)}
    if waiting:
        announce(f"Of the async reward functions {', '.join(waiting)} at least one")
    outputs |= zip(waiting, _await_all(list(waiting.values())), strict=True)
    for name, output in outputs.items():
        if isinstance(output, TokenrlError):
            raise output
        if isinstance(output, Exception):
            announce(f"Reward function {name} raised {describe(output)}; called again on single rows, it")
            where = _culprit(named[name], name, rows, shared)
            raise Stopped(f"Reward function {name} raised {describe(output)} ({where}).") from output
    return list(outputs.values())


def _attempt(function: Reward, name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**{key: arguments[key] for key in accepted_arguments(function, name, arguments)})
    except Exception as error:
        return error


def accepted_arguments(function: Reward, name: str, available: Mapping[str, Any]) -> list[str]:
    """The names among `available` that the function takes: all of them if it has **kwargs.

    Raises:
        Refused: a parameter without default is not among them, or cannot be passed by keyword.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some builtins and extension types have no signature
        return list(available)
    for parameter in parameters:
        bad_kind = parameter.kind is parameter.POSITIONAL_ONLY
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if not optional and (bad_kind or parameter.name not in available):
            raise Refused(
                f"Reward function {name} has a parameter '{parameter.name}'"
                + (" that cannot be passed by keyword." if bad_kind else " and the data has no such column.")
                + suggest(parameter.name, available)
                + " Rename it, give it a default, or add the column."
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(available)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.name in available]


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop on its own thread for the life of the process.

    Clients and locks that an async reward keeps between calls are bound to a loop, so it must stay the same;
    and a thread of its own works whether or not the caller's thread runs a loop, as a notebook's does.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="tokenrl-rewards", daemon=True).start()
    return loop


def _await_all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results in order, with an exception in the place of a result."""
    if not awaitables:
        return []

    async def gathered() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    return asyncio.run_coroutine_threadsafe(gathered(), _event_loop()).result()


def _culprit(function: Reward, name: str, rows: Mapping[str, list[Any]], shared: Mapping[str, Any]) -> str:
    """The first row on which a failed call fails alone; the function saw all rows at once."""
    silent = {**shared, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    completions = rows["completions"]
    for i, completion in enumerate(completions):
        output = _attempt(function, name, {key: values[i : i + 1] for key, values in rows.items()} | silent)
        if inspect.isawaitable(output):
            output = _await_all([output])[0]
        if isinstance(output, Exception):
            return f"row {i} of {len(completions)}, completion {shorten(completion)}"
    first = shorten(completions[0]) if completions else "none"
    return f"rows 0 to {len(completions) - 1} together, though none alone; the first completion: {first}"


def checked_rewards(name: str, output: Any, completions: Sequence[Any]) -> np.ndarray:
    """One function's output as float64 [N], nan for None.

    Taken: lists, tuples, arrays and tensors (any device or dtype, also with a gradient) of N numbers or None.

    Raises:
        Stopped: anything else, a number that is not finite included; a single number is never broadcast.
    """
    count = len(completions)
    shape = getattr(output, "shape", None)
    if not isinstance(output, list | tuple) and (shape is None or len(shape) != 1):
        shown = f"of shape {tuple(shape)}" if shape else repr(output)[:80]
        hint = " Is a return missing?" if output is None else ""
        raise Stopped(
            f"Reward function {name} returned a {type(output).__name__} ({shown}) for {count} completions "
            f"(row 0: {shorten(completions[0]) if count else 'none'}); it must return a list of {count} "
            f"numbers.{hint}"
        )
    items = list(output) if isinstance(output, list | tuple) else output.tolist()
    if len(items) != count:
        row = min(len(items), count)
        beyond = f"row {row}, completion {shorten(completions[row])}, has none" if row < count else "too many"
        raise Stopped(
            f"Reward function {name} returned {len(items)} rewards for {count} completions ({beyond}); "
            "it must return one for each, None to abstain."
        )
    return np.array(
        [_number(item, name, i, completions[i]) for i, item in enumerate(items)], dtype=np.float64
    )


def _number(item: Any, name: str, row: int, completion: Any) -> float:
    if getattr(item, "ndim", None) == 0:  # numpy scalars and 0-d tensors
        item = item.item()
    if item is None:
        return math.nan
    if not isinstance(item, numbers.Real):
        found = f"{repr(item)[:80]} ({type(item).__name__})"
    elif math.isfinite(value := _float(item)):
        return value
    else:
        found = str(value)
    raise Stopped(
        f"Reward function {name} returned {found} for row {row}, completion {shorten(completion)}; "
        "a reward is a finite number, or None to abstain."
    )


def _float(item: Any) -> float:
    try:
        return float(item)
    except OverflowError:  # an integer beyond float64
        return math.inf


def shorten(completion: Any) -> str:
    """A completion as it can stand in an error message."""
    text = repr(completion)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


def unique_names(functions: Iterable[Reward]) -> list[str]:
    """A name for each function, as metrics and messages use it: its own, with a number where it is taken."""
    taken: list[str] = []
    for name in map(_name, functions):
        number, unique = 1, name
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.append(unique)
    return taken


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "reward" if name == "<lambda>" else name
