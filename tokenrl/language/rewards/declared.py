"""Reads what rewards declare of their values: that they are 0 or 1, or that they lie in a range."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

from tokenrl.errors import Refused

Range = tuple[float, float]
"""The least and the largest value that a reward may have."""


def original(function: Any) -> Any:
    """Return the function that a partial application was made of, or the function itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


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
    found = getattr(original(function), "range", None)
    if found is None:
        return (0.0, 1.0) if is_binary(function) else None
    pair = list(found) if isinstance(found, tuple | list) else []
    if len(pair) == 2 and all(map(_finite, pair)) and pair[0] < pair[1]:
        return float(pair[0]), float(pair[1])
    raise Refused(
        f"Reward function {name} has an attribute range = {found!r:.100}, which declares its least and its "
        "largest value. Give two finite numbers, the smaller one first, such as (0, 1), or leave it out."
    )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def range_of_sum(parts: Iterable[Range | None], weights: Iterable[float]) -> Range | None:
    """Return the range of a weighted sum of rewards; None if a part has none. A weight below 0 swaps ends."""
    known = list(parts)
    ends = [[weight * end for end in part] for part, weight in zip(known, weights, strict=True) if part]
    return (sum(map(min, ends)), sum(map(max, ends))) if len(ends) == len(known) else None


def range_of_product(parts: Iterable[Range | None]) -> Range | None:
    """Return the range of a product of rewards; None if a factor has none."""
    low, high = 1.0, 1.0
    for part in parts:
        if part is None:
            return None
        corners = [end * other for end in (low, high) for other in part]
        low, high = min(corners), max(corners)
    return low, high
