"""Shows the fields of settings as the keywords of the public functions, and reads those of a call."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Optional, TypeVar

from tokenrl.errors import Refused
from tokenrl.settings import OR_OBJECT, arguments, field_types

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def takes(kind: type[Any]) -> Callable[[F], F]:
    """Make a decorator that shows the fields of settings as the keywords of a function with `**options`.

    They are in its signature and its help, with types and defaults, those without a group first.
    """

    def decorate(function: F) -> F:
        signature, plain = inspect.signature(function), typing.get_type_hints(kind)
        *first, rest = signature.parameters.values()
        keywords = []
        for name, parameter in inspect.signature(kind).parameters.items():
            hint = Any if OR_OBJECT in str(field_types(kind)[name]) else plain[name]  # type: ignore[arg-type]
            hint = hint if parameter.default is not None else Optional[hint]  # noqa: UP045, Any is no class
            keywords.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))
        keywords.sort(key=lambda keyword: _group(kind, keyword.name))
        about = inspect.cleandoc(function.__doc__ or "")
        listed = "\n".join(f"    {keyword}" for keyword in keywords)
        vars(function).update(__signature__=signature.replace(parameters=[*first, *keywords, rest]))
        function.__doc__ = (
            f"{about}\n\nKeywords (the --help of the command explains each):\n{listed}"
        )
        return function

    return decorate


def _group(kind: type[Any], name: str) -> str:
    """Return the group of the class that declares a field."""
    owners = (owner for owner in kind.__mro__ if name in inspect.get_annotations(owner))
    return str(getattr(next(owners), "group", ""))


def arguments_of_call(kind: type[T], args: Any, options: Mapping[str, Any]) -> T:
    """Return the arguments of a call of a public function: `args`, all at once, or made from keywords.

    Raises:
        Refused: `args` is something else, both are given, or a keyword cannot be used (see `arguments`).
    """
    if args is None:
        return arguments(kind, options)
    if not isinstance(args, kind):
        message = f"args is {args!r:.60} ({type(args).__name__}); it must be {kind.__name__}."
        raise Refused(
            f"{message} Give settings as keywords, such as task='vowels', and leave args out."
        )
    if options:
        message = f"args holds all settings, so the keywords {', '.join(options)} would be lost."
        raise Refused(
            f"{message} Give one of the two, or change args with dataclasses.replace(args, ...)."
        )
    return args
