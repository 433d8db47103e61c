"""What a setting may be: checks that name the value, what is allowed and how to mend it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from numbers import Real

from tokenrl.errors import Refused


def check_choice(what: str, given: object, allowed: Iterable[str]) -> None:
    """Refuse a name that is not among `allowed`.

    Args:
        what: What is being chosen, as the user wrote it (a field, "preset").
        given: The name that was given.
        allowed: The names that exist.

    Raises:
        Refused: With the names that exist and, for a misspelling, the nearest of them.
    """
    allowed = tuple(allowed)
    if given in allowed:
        return
    from difflib import get_close_matches

    near = get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Refused(f"{what} {given!r} is unknown. Allowed are: {', '.join(allowed)}.{hint}")


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
