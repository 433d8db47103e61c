"""Takes the arguments of a public function, which are given all at once or as keywords. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from tokenrl.errors import Refused
from tokenrl.settings import arguments

T = TypeVar("T")


def called(kind: type[T], args: Any, options: Mapping[str, Any]) -> T:
    """Return the settings of a call.

    Args:
        kind: the dataclass of settings.
        args: all settings at once, or None.
        options: settings as keywords.

    Raises:
        Refused: `args` is something else, both are given, or a keyword cannot be used (see `arguments`).
    """
    if args is None:
        return arguments(kind, options)
    if not isinstance(args, kind):
        raise Refused(
            f"args is {args!r:.60} ({type(args).__name__}); it must be {kind.__name__}. Give settings as "
            "keywords, such as seed=1, and leave args out."
        )
    if options:
        raise Refused(
            f"args holds all settings, so the keywords {', '.join(options)} would be lost. Give one of the "
            "two, or change args with dataclasses.replace(args, ...)."
        )
    return args
