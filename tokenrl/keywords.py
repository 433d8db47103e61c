"""Shows the fields of settings as the keywords of the public functions, and reads those of a call."""

from __future__ import annotations

import inspect
import multiprocessing
import typing
from collections.abc import Callable, Mapping
from typing import Any, Optional, TypeVar

from tokenrl.errors import Refused
from tokenrl.settings import OR_OBJECT, arguments, field_types, mentions

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def takes(kind: type[Any]) -> Callable[[F], F]:
    """Make a decorator that shows the fields of settings as the keywords of a function with `**options`.

    They are in its signature, which `help` shows, with types and defaults.
    """

    def decorate(function: F) -> F:
        hints = typing.get_type_hints(kind)
        types = field_types(kind)  # type: ignore[arg-type]
        keywords = []
        for name, parameter in inspect.signature(kind).parameters.items():
            hint = Any if mentions(types[name], OR_OBJECT) else hints[name]
            if parameter.default is None:
                hint = Optional[hint]  # noqa: UP045, Any is no class
            keywords.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))
        signature = inspect.signature(function)
        *first, rest = signature.parameters.values()
        vars(function).update(__signature__=signature.replace(parameters=[*first, *keywords, rest]))
        return function

    return decorate


def arguments_of_call(kind: type[T], args: Any, options: Mapping[str, Any]) -> T:
    """Return the arguments of a call of a public function: `args`, all at once, or made from keywords.

    Raises:
        Refused: `args` is something else, both are given, or a keyword cannot be used (see `arguments`); or a
            program calls that another process runs again, to import its functions.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise Refused(
            "This program was started again in another process, as reward_timeout and multiprocessing do, and "
            "would do all its work again. Put its calls below `if __name__ == '__main__':`."
        )
    if args is None:
        return arguments(kind, options)
    if not isinstance(args, kind):
        raise Refused(
            f"args is {args!r:.60} ({type(args).__name__}); it must be {kind.__name__}. Give settings as "
            "keywords, such as task='vowels', and leave args out."
        )
    if options:
        raise Refused(
            f"args holds all settings, so the keywords {', '.join(options)} would be lost. Give one of the "
            "two, or change args with dataclasses.replace(args, ...)."
        )
    return args
