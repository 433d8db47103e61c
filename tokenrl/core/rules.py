"""The two ways in which tokenrl says no, and the rules that refuse or flag a setting. Imports no torch.

Every error that a user can cause is one of the two below, and its message is one paragraph: what was given,
what is allowed, how to mend it. The command line prints the message alone and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from numbers import Real
from typing import TypeVar

T = TypeVar("T")


class TokenrlError(Exception):
    """An error the user can mend; its message is written for them."""

    exit_code = 1


class Refused(TokenrlError, ValueError):
    """Raised before the first step: nothing has been trained, nothing is lost (exit code 2)."""

    exit_code = 2


class Stopped(TokenrlError, RuntimeError):
    """Raised during a run: the last complete checkpoint stays as it was (exit code 1)."""

    exit_code = 1


def check_choice(what: str, given: object, built: Iterable[str], later: Iterable[str] = ()) -> None:
    """Refuse a name that is not among `built`; one in `later` is known, but its code is not written yet.

    Args:
        what: What is being chosen, as the user wrote it (a field, "preset").
        given: The name that was given.
        built: The names that work.
        later: The names that are reserved for what is not built yet.

    Raises:
        Refused: With the names that work and, for a misspelling, the nearest of them.
    """
    built, later = tuple(built), tuple(later)
    if given in built:
        return
    allowed = ", ".join(built)
    if given in later:
        raise Refused(f"{what} {given!r} is not built yet. Built are: {allowed}.")
    from difflib import get_close_matches

    near = get_close_matches(str(given), built, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Refused(f"{what} {given!r} is unknown. Allowed are: {allowed}.{hint}")


def check_number(
    what: str,
    given: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse what is not a finite number within the bounds.

    Raises:
        Refused: With the value, and the bounds in words.
    """
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    words = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
    allowed = "a finite number" + (f" {words}" if words else "")
    if isinstance(given, bool) or not isinstance(given, Real) or not isfinite(given):
        raise Refused(f"{what} was given as {given!r}; it must be {allowed}.")
    value = float(given)
    inside = (
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not inside:
        raise Refused(f"{what} was given as {given!r}; it must be {allowed}.")


def check_groups(choice: str, rows: int, group_size: int | None) -> int:
    """Return the group size; refuse rows that do not fall into groups of two or more.

    Args:
        choice: The baseline or scale that compares the rows of a group.
        rows: Rows in the step.
        group_size: Consecutive rows a prompt, if there are groups.

    Raises:
        Refused: Without groups, with groups of one, or when `rows` is no multiple of `group_size`.
    """
    if group_size is None or group_size < 2:
        raise Refused(
            f"{choice!r} compares several completions of one prompt, but group_size is {group_size}. Sample "
            "two or more a prompt (num_generations), or choose the baseline 'batch_mean', 'running_mean', "
            "'constant' or 'none', with the scale 'batch_std' or 'none'."
        )
    if rows % group_size:
        raise Refused(
            f"{rows} rows do not fall into groups of {group_size} consecutive rows a prompt. "
            "Give a number of rows that is a multiple of group_size."
        )
    return group_size


def check_step(choice: str, rows: int) -> int:
    """Return the number of rows; refuse a step of one row, when `choice` compares the rows of a step.

    Raises:
        Refused: With fewer than two rows.
    """
    if rows < 2:
        raise Refused(
            f"{choice!r} compares the rows of a step, but the step has {rows}. Collect two or more a step, "
            "or choose the baseline 'running_mean', 'constant' or 'none', with the scale 'none'."
        )
    return rows


def given(name: str, value: T | None, purpose: str) -> T:
    """Return an input that the estimator needs; refuse its absence.

    Raises:
        Refused: When `value` is None.
    """
    if value is None:
        raise Refused(
            f"{name} was not given, and {purpose} needs it. Pass {name}, or choose an estimator without that."
        )
    return value
