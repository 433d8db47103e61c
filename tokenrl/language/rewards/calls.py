"""Calls reward functions: passes to each the arguments that it takes, times it, and checks its output.

Results are checked and never repaired, because a NaN that passes here would ruin the policy later. A function
under a deadline runs in a process of its own (worker.py); all of these processes work at the same time.
"""

from __future__ import annotations

import contextlib
import inspect
import numbers
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Stopped, TokenrlError, code_line, describe, written
from tokenrl.language.rewards.isolation import Attempt, await_all
from tokenrl.names import accepted, original
from tokenrl.runs.metric_table import all_metrics, fits
from tokenrl.settings import LARGEST_REWARD, shown
from tokenrl.user_code import copied, guarded, own_process, user_code

Reward = Callable[..., Any]

COLUMNS = """prompt teacher_prompt completion reward advantage truncated ending messages failure rewards/{name}
tokens/{name}"""
METRICS = dict.fromkeys(
    re.sub("/.*", "/{name}", metric.name)
    for metric in all_metrics()
    if metric.part != "preferences"  # of reward models alone
)
RESERVED = {"log_metric": [*METRICS, "eval_{name}"], "log_extra": COLUMNS.split()}
"""The names that a run writes itself: those of its metrics for `log_metric`, of its columns for `log_extra`. What
begins as one of them does, up to a slash, is the run's too."""
accepted_arguments = partial(accepted, unsuggested={"trainer_state", *RESERVED})
"""`names.accepted` for a function that is called with columns of rows."""


@dataclass
class TrainerState:
    """How far a run is, for reward functions, under the names of transformers.

    Attributes:
        global_step: number of finished training steps.
        max_steps: number of training steps of the whole run; 1 outside of a run.
        epoch: passes over the training prompts so far (2.5 means half-way through the third).
    """

    global_step: int = 0
    max_steps: int = 1
    epoch: float = 0.0


class Pending(NamedTuple):
    """What a function that runs in another process returns at once; `answer` waits for its output."""

    answer: Callable[[], Any]


class Late(Stopped):
    """A reward function missed its deadline."""


class Failed(Stopped):
    """A reward function raised an error."""


class CallResults(NamedTuple):
    """Results of one call of several functions on N completions.

    Attributes:
        values: rewards by name of the function, float64 [N], nan where it abstained.
        late: bool [N], True where a function missed its deadline.
        extra: the columns that functions gave to `log_extra`, by name.
        logged: the values that functions gave to `log_metric`, by name.
        seconds: the time that each function took, by its name; async functions share theirs.
        faults: in words, the first error of each function that gave a completion no reward because of it.
    """

    values: dict[str, np.ndarray]
    late: np.ndarray
    extra: dict[str, list[Any]]
    logged: dict[str, list[float]]
    seconds: dict[str, float]
    faults: dict[str, str]


def call_rewards(
    named: Mapping[str, Reward],
    rows: Mapping[str, list[Any]],
    state: TrainerState,
    locations: Sequence[str] = (),
    objects: Mapping[str, list[Any]] | None = None,
    *,
    excused: tuple[type[Stopped], ...] = (),
) -> CallResults:
    """Call every function on N completions, async ones together; check the results, collect what was logged.

    Each function gets copies, so what it changes in place changes nothing for anybody else.

    Args:
        named: the functions by their distinct names.
        rows: arguments with one value per completion, "completions" among them.
        state: how far the run is.
        locations: where the prompt of each completion stands in the data, for messages; empty if unknown.
        objects: further arguments with one value per completion, which are passed as they are.
        excused: `Failed` or `Late` or both. A function to which it happens is called again for each completion
            alone, and gives none to those to which it happens again. What it then logs is dropped. Its state is
            that of before the call again.

    Raises:
        Stopped: a function raised anything (SystemExit too) or missed its deadline, and this is not excused; or
            it did not return a number within `LARGEST_REWARD` or None for each row. The message names it, and
            what it raised or the row.
        Refused: a function has a parameter for a column that does not exist.
    """
    extra: dict[str, dict[str, list[Any]]] = {name: {} for name in named}
    logged: dict[str, list[float]] = {}

    def log_extra(function: str, column: str, values: Iterable[Any]) -> None:
        _check_name(function, "log_extra", column)
        extra[function].setdefault(column, []).extend(values)

    def log_metric(function: str, name: str, value: float) -> None:
        _check_name(function, "log_metric", name)
        logged.setdefault(name, []).append(float(value))

    described = partial(row_in_words, rows["prompts"], rows["completions"], locations)
    objects = objects or {}
    shared = {}
    for name in named:
        logs = {"log_extra": partial(log_extra, name), "log_metric": partial(log_metric, name)}
        shared[name] = {**logs, **objects}
    before = states_of(named) if excused else {}
    attempts = attempt_each(named, {**rows, "trainer_state": state}, shared)

    def again(name: str, row: slice) -> CallResults:
        own, others = ({key: x[row] for key, x in each.items()} for each in (rows, objects))
        return call_rewards(
            {name: named[name]}, own, state, locations[row], others, excused=excused
        )

    count = len(rows["prompts"])
    late = np.zeros(count, dtype=bool)
    values = {}
    faults: dict[str, str] = {}
    for name, (output, error, _) in attempts.items():
        if error is None:
            values[name] = checked_rewards(name, output, described)
            continue
        fault = _failure(name, error, described)
        if not isinstance(fault, excused):
            raise fault
        restore_states(named, {key: x for key, x in before.items() if key == name})
        parts = [again(name, slice(i, i + 1)) for i in range(count)] if count > 1 else []
        texts = [part.faults[name] for part in parts if part.faults]
        faults[name] = next(iter(texts), str(fault))
        values[name] = np.concatenate([part.values[name] for part in parts] or [np.full(1, np.nan)])
        late |= [part.late[0] for part in parts] or [isinstance(fault, Late)]
        extra[name] = {}
    columns: dict[str, list[Any]] = {}
    for own in extra.values():
        for column, items in own.items():
            # the values of two functions are too many for the rows, and so refused
            columns.setdefault(column, []).extend(items)
    seconds = {name: attempt.seconds for name, attempt in attempts.items()}
    return CallResults(values, late, columns, logged, seconds, faults)


def keeper(function: Any) -> Any:
    """Return the object whose state a checkpoint holds for a reward: the reward, or that of which it is a method.

    It has `state_dict` and `load_state_dict`. A module of torch is none, since no step changes its weights.

    Returns:
        The object, or None.
    """
    inner = original(function)
    owner = getattr(inner, "__self__", inner)
    saves = all(hasattr(owner, name) for name in ("state_dict", "load_state_dict"))
    return owner if saves and not hasattr(owner, "named_parameters") else None


def states_of(named: Mapping[str, Reward]) -> dict[str, Any]:
    """Return copies of the states of those functions that have one, by their names.

    Raises:
        Stopped: a `state_dict` raised an error, or its state cannot be copied.
    """
    states = {}
    for name, function in named.items():
        owner = keeper(function)
        if owner is not None:
            with guarded(f"The state_dict of the reward function {name} failed"):
                states[name] = copied(owner.state_dict())
    return states


def restore_states(named: Mapping[str, Reward], states: Mapping[str, Any]) -> None:
    """Let functions continue from what `states_of` returned.

    Raises:
        Stopped: a `load_state_dict` raised an error.
    """
    for name, state in states.items():
        with guarded(f"The load_state_dict of the reward function {name} failed"):
            keeper(named[name]).load_state_dict(copied(state))


def attempt_each(
    named: Mapping[str, Reward],
    arguments: Mapping[str, Any],
    shared: Mapping[str, Mapping[str, Any]],
) -> dict[str, Attempt]:
    """Call each function once with copies of `arguments` and its `shared` ones; return what each gave."""
    attempts: dict[str, Attempt] = {}
    with user_code():
        for name, function in named.items():
            subject = f"Reward function {name}"
            attempts[name] = call_once(function, subject, arguments, shared[name])
        waiting = {name: x.output for name, x in attempts.items() if inspect.isawaitable(x.output)}
        if waiting:
            attempts |= zip(waiting, await_all(list(waiting.values())), strict=True)
    for name, attempt in attempts.items():
        if isinstance(attempt.output, Pending):
            attempts[name] = call_once(attempt.output.answer, name, {}, {})
    return attempts


def _check_name(function: str, call: str, name: Any) -> None:
    """Check the name under which a reward function logs something.

    Raises:
        Stopped: it is no text of one line, or the run writes something itself under this name.
    """
    names = RESERVED[call]
    is_text = isinstance(name, str) and name != "" and name.isprintable()
    if is_text and not any(fits(name.removesuffix("_stderr"), own) for own in names):
        return
    raise Stopped(
        f"Reward function {function} gave {call} the name {shown(name)}: give a text of one line, such as "
        f"'my_score', that is none of the run's own names, which are {', '.join(names)}, where braces stand for any."
    )


def row_in_words(
    prompts: Sequence[Any], completions: Sequence[Any], locations: Sequence[str], row: int
) -> str:
    """Return the words by which messages name a row of a call; `locations` is empty if unknown."""
    words = f"the completion {shown(completions[row])} of the prompt {shown(prompts[row])}"
    return f"{words} ({locations[row]})" if locations else words


def _failure(name: str, error: BaseException, described: partial[str]) -> TokenrlError:
    """Say what a reward function raised and at which of its lines; of a call with one completion also for which."""
    if isinstance(error, TokenrlError):
        return error
    completions = described.args[1]
    row = f" for {described(0)}" if len(completions) == 1 else ""
    problem = f"Reward function {name} raised {describe(error)}{code_line(error, first=True)}{row}."
    is_chat = not all(isinstance(completion, str) for completion in completions)
    if is_chat and isinstance(error, AttributeError | TypeError):
        problem += ' A completion of a chat is a list of one message; its text is completion[0]["content"].'
    failure = Failed(problem)
    failure.__cause__ = error
    return failure


def call_once(
    function: Reward,
    subject: str,
    arguments: Mapping[str, Any],
    objects: Mapping[str, Any],
) -> Attempt:
    """Call a user's function with copies of the arguments that it takes.

    Args:
        function: the function.
        subject: what messages call it.
        arguments: what it may take, of which it gets copies.
        objects: further arguments, which are passed as they are.
    """
    began = time.perf_counter()
    try:
        names = accepted_arguments(function, subject, {**arguments, **objects})
        own = {name: copied(arguments[name]) for name in names if name in arguments}
        own |= {name: objects[name] for name in names if name in objects}
        with own_process():
            output = function(**own)
    except KeyboardInterrupt:  # the user's own
        raise
    except BaseException as error:
        return Attempt(None, error, time.perf_counter() - began)
    return Attempt(output, None, time.perf_counter() - began)


def checked_rewards(name: str, output: Any, described: partial[str]) -> np.ndarray:
    """Check the output of one function and return it as float64 [N], with nan for None.

    The output may be a list, tuple, array or tensor (of any device or dtype, also with a gradient) of N
    numbers or None.

    Raises:
        Stopped: the output is anything else, or a number in it is not finite or beyond `LARGEST_REWARD`. A
            single number is never broadcast to all rows.
    """
    count = len(described.args[0])
    items = listed(output)
    if not isinstance(items, list | tuple):
        description = f"a {type(output).__name__} ({written(output):.80}) for {count} completions"
        hint = " Is a return missing?" if output is None else ""
        raise Stopped(
            f"Reward function {name} returned {description}; it must return a list of {count} numbers.{hint}"
        )
    if len(items) != count:
        raise Stopped(
            f"Reward function {name} returned {len(items)} rewards for {count} completions; it must return one for "
            "each, or None."
        )
    rewards = np.full(count, np.nan)
    for row, item in enumerate(items):
        if item is None:
            continue
        try:
            rewards[row] = reward_number(item)
        except Exception as error:  # a meta tensor has no value, and methods of an object may fail
            description = f"{written(item):.80} ({type(item).__name__}) for {described(row)}"
            allowed = f"a number from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}, or None to abstain"
            problem = f"returned {description}; a reward is {allowed}"
            raise Stopped(f"Reward function {name} {problem}.") from error
    return rewards


def listed(output: Any) -> Any:
    """Return an array or a tensor as a list, and anything else as it is."""
    with contextlib.suppress(Exception):  # a meta or sparse tensor has no list
        return output.tolist()
    return output


def reward_number(item: Any) -> float:
    """Return a number, also a scalar of numpy or torch, as a float; raise if it is no number for a reward."""
    value = item.item() if getattr(item, "ndim", None) == 0 else item
    # An integer beyond float64 compares, but cannot be converted.
    if isinstance(value, numbers.Real) and -LARGEST_REWARD <= value <= LARGEST_REWARD:  # type: ignore[operator]
        return float(value)
    raise ValueError(f"{shown(item)} is no number within {LARGEST_REWARD:g}")
