"""Toy tasks: prompts, rewards by rule, demonstrations, and tiny models that learn them on a CPU in minutes.

`toy_tasks.load(name)` returns a `Task`. Importing the package is fast, because torch and transformers are
imported only when a task builds its model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from toy_tasks import (
    addition,
    calculator,
    countdown,
    guess_number,
    reverse_text,
    sentiment,
    sort_digits,
    target_length,
    vowels,
)
from toy_tasks.task import Task, WarmStart

_FACTORIES: dict[str, Callable[..., Task]] = {
    "sort_digits": sort_digits.make,
    "reverse_text": reverse_text.make,
    "addition": addition.make,
    "countdown": countdown.make,
    "vowels": vowels.make,
    "sentiment": sentiment.make,
    "target_length": target_length.make,
    "guess_number": guess_number.make,
    "calculator": calculator.make,
}
NAMES = tuple(_FACTORIES)

__all__ = ["NAMES", "Task", "WarmStart", "load"]


def load(name: str, **overrides: Any) -> Task:
    """Return the task called `name`; equal arguments give equal tasks in any process.

    Args:
        name: One of `NAMES`.
        **overrides: Arguments of the task's own `make`, such as `seed`, `eval_size` and `wrong_share`.

    Raises:
        ValueError: No task has this name, or the task has no such argument; the message lists what exists.
    """
    if name not in _FACTORIES:
        raise ValueError(
            f"There is no toy task called {name!r}; choose one of: {', '.join(NAMES)}."
        )
    factory = _FACTORIES[name]
    allowed = tuple(inspect.signature(factory).parameters)
    unknown = sorted(set(overrides) - set(allowed))
    if unknown:
        raise ValueError(
            f"The task {name!r} has no argument {', '.join(unknown)}; choose from: {', '.join(allowed)}."
        )
    return factory(**overrides)
