"""Loads the reward that a user names, and reads the values that it declares: binary, or a range."""

from __future__ import annotations

import ast
import math
import os
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, suggest
from tokenrl.language.rewards.calls import Reward
from tokenrl.language.rewards.library import LIBRARY, source_of_reward
from tokenrl.names import import_attribute, original
from tokenrl.settings import arguments

Range = tuple[float, float]
"""The least and the largest value that a reward may have."""


def load_reward(spec: Any) -> Reward:
    """Find or load the reward that a user names.

    Args:
        spec: a callable, which is returned as it is; a reward of the library, such as `exact_match` or
            `length(target=20)`, with plain values as options; `module:function` (the current directory is
            importable); `path/to/file.py:function`; or a folder with a sequence-classification model of one
            label and its tokenizer.

    Returns:
        A function `f(prompts, completions, **columns) -> list[float | None]`, where None abstains.

    Raises:
        Refused: `spec` is none of these, importing or loading it failed, or the result cannot be called.
    """
    if callable(spec):
        return spec
    if not isinstance(spec, str | Path):
        problem = (
            f"reward {spec!r:.100} is a {type(spec).__name__}, as a function may have returned"
        )
        raise Refused(
            f"{problem}; give the function itself, reward=function without a call, or its name."
        )
    if os.path.isdir(spec):
        # Its module imports torch, which the process of other rewards can do without.
        from tokenrl.language.rewards.model import RewardModel

        return RewardModel(spec)
    text = str(spec)
    name = text.partition("(")[0].strip()
    if name in LIBRARY:
        examples = "length(target=20), exact_match(column='target')"
        _, options = parse_spec(text.strip(), "reward", examples)
        try:
            return arguments(LIBRARY[name], options)
        except (Refused, TypeError) as error:
            raise Refused(
                f"reward '{text}': {error} {LIBRARY[name].__doc__.splitlines()[0]}"
            ) from error
    if not source_of_reward(text) and not text.endswith(".py"):
        problem = "the library has no such reward, and there is no such folder here"
        raise Refused(
            f"reward '{text}': {problem}.{suggest(name, LIBRARY)} Give module:function, path/to/file.py:function, "
            "the folder of a classifier or length(target=20), and spaces between several."
        )
    function = import_attribute(text, "reward")
    if not callable(function):
        raise Refused(f"reward '{text}' is a {type(function).__name__}, which cannot be called.")
    return function


def parse_spec(text: str, kind: str, examples: str) -> tuple[str, dict[str, Any]]:
    """Read `name` or `name(option=value, ...)`; values are literals, and no code is evaluated.

    Args:
        text: what the user gave.
        kind: what the text names, for the error message.
        examples: specs as they should be, for the error message.

    Raises:
        Refused: the text is no such spec.
    """
    try:
        call = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        options = {}
        for option in call.keywords:
            assert option.arg  # or it is **options
            options[option.arg] = ast.literal_eval(option.value)
        return ast.unparse(call.func), options
    except (AssertionError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        problem = f"{kind} '{text}' cannot be read"
        raise Refused(
            f"{problem}. Write options as name=value with plain values: {examples}."
        ) from error


def is_binary(function: Any) -> bool:
    """Return whether a reward is declared binary by an attribute `binary = True`: 1 is right, 0 is wrong.

    A function is declared by `function.binary = True`. The values that happen to occur declare nothing.
    """
    return getattr(original(function), "binary", False) is True


def declared_range(function: Any, name: str) -> Range | None:
    """Return the range that a reward declares by an attribute `range = (low, high)`; binary ones have (0, 1).

    Args:
        function: the reward.
        name: its name, for the error message.

    Returns:
        The least and the largest value; None if nothing is declared.

    Raises:
        Refused: the attribute is not a pair of finite numbers, the smaller one first.
    """
    declared = getattr(original(function), "range", (0.0, 1.0) if is_binary(function) else None)
    if declared is None:
        return None
    try:
        low, high = map(float, declared)
        if -math.inf < low < high < math.inf:
            return low, high
    except (TypeError, ValueError):
        pass
    problem = f"Reward function {name} has an attribute range = {declared!r:.100}"
    raise Refused(
        f"{problem}: give two finite numbers, the smaller one first, such as (0, 1), or none."
    )
