"""Checks the values of settings, and makes settings from keywords. Imports no torch.

The type of a field says which values are allowed, and `fitted` reads them there::

    temperature: Positive = 1.0
    num_steps: Annotated[int, Bounds(at_least=2)] | None = None

A rule about two fields together is a plain `if` in the code that uses both.
"""

from __future__ import annotations

import contextlib
import os
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, lru_cache
from itertools import chain
from math import inf
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from tokenrl.errors import Refused, nearest, written
from tokenrl.foreign import check_names, meaning
from tokenrl.names import NamedFunction, NamesCode

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, given as metadata of its type. Without any bound a number must still be finite."""

    at_least: float = -inf
    above: float = -inf
    at_most: float = inf
    below: float = inf

    def limits(self) -> dict[str, float]:
        """Return the bounds that there are, by the words before them in a message."""
        limits = zip(("of at least", "above", "at most", "below"), vars(self).values(), strict=True)
        return {words: limit for words, limit in limits if abs(limit) < inf}

    def hold(self, value: float) -> bool:
        """Return whether a finite number lies within the bounds."""
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        return " and ".join(f"{words} {limit:,.12g}" for words, limit in self.limits().items())


LARGEST = 1e30
"""Largest absolute value of a setting: beyond it numbers of 32 bits overflow, as weights and rewards are."""
MAX_COUNT = 10**9
"""Largest whole number of a setting that counts something."""
LARGEST_REWARD = 1e12
"""Largest size of a reward. Advantages are float32 numbers, which end at 3.4e38, and some are divided by a
standard deviation: a return of 10^4 such rewards is 1e16, and the sum of 10^6 squares of it is still 1e38."""

Number = Annotated[float, Bounds(at_least=-LARGEST, at_most=LARGEST)]
Positive = Annotated[float, Bounds(above=0, at_most=LARGEST)]
NonNegative = Annotated[float, Bounds(at_least=0, at_most=LARGEST)]
Count = Annotated[int, Bounds(at_least=1, at_most=MAX_COUNT)]
Several = Annotated[int, Bounds(at_least=2, at_most=MAX_COUNT)]
Natural = Annotated[int, Bounds(at_least=0, at_most=MAX_COUNT)]
Seed = Annotated[int, Bounds(at_least=0, at_most=2**32 - 1)]
"""A seed has 32 bits, as NumPy's: then a number of 64 bits can hold it beside the number of a step."""

OPEN: Any = None
"""Default of a setting that a user may leave open: a run fills it in before its first step. As an argument it
may be None; the settings of a run hold a value of the field's type."""
OR_FUNCTION = NamesCode()
"""Metadata of a field of names that also takes a function: its own name, or from Python the function."""
OR_OBJECT = "or an object"
"""Metadata of a field of text that also takes an object, such as a model, from Python."""
MEASURED = "decides what is measured"
"""Metadata of a field that is the same in all runs that are compared, as those of classes with `measured` are."""


class Settings:
    """Base of the dataclasses of settings. An object with a value that is not allowed cannot be made.

    `group` is the title of the fields that this class itself declares in the help; without one they come first.
    """

    group: typing.ClassVar[str] = ""
    measured: typing.ClassVar[bool] = False

    def __init_subclass__(cls, group: str = "", leaves_open: bool = False, measured: bool = False):
        """Name the group of the fields; `leaves_open` declares again those of the base, `as_in_run`."""
        cls.group = group
        cls.measured = measured
        if leaves_open:
            base: Any = cls.__bases__[0]
            cls.__annotations__ = field_types(base)
            for inherited in fields(base):
                if inherited.name not in vars(cls):
                    setattr(cls, inherited.name, as_in_run(inherited.default))

    def __post_init__(self) -> None:
        """Convert values where nothing is lost, and refuse those that are not allowed, as `fitted` says."""
        kind: Any = type(self)
        for name, hint in field_types(kind).items():
            value = getattr(self, name)
            check = checked_once if type(value) in NUMBERS else checked
            object.__setattr__(self, name, check(name, value, hint))


def part_of(args: Settings, kind: type[T]) -> T:
    """Return the settings that another class has too, as its object; those that are open have its defaults."""
    names = field_types(kind)  # type: ignore[arg-type]
    return kind(**{name: x for name in names if (x := getattr(args, name, None)) is not None})


def as_in_run(usual: Any) -> Any:
    """Return a field whose default is the value of the run that saved the model, without a run the usual one."""
    return field(default=OPEN, metadata={"usual": usual})


def plain(value: Any) -> Any:
    """Return a number or an array of numpy or torch as plain numbers, also inside a tuple; else the value."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    is_array = hasattr(value, "tolist") and hasattr(value, "ndim")
    return value.tolist() if is_array else value


class Unfit(Exception):
    """Raised where a type does not allow a value."""


def checked(name: str, value: Any, hint: Any, objects: bool = True) -> Any:
    """Return the value of a setting as its type holds it; see `fitted`.

    Raises:
        Refused: The type does not allow it; the message says what is allowed, and which name was meant.
    """
    try:
        return fitted(value, hint, objects)
    except Unfit:
        raise _refusal(name, plain(value), allowed(hint), names_in(hint)) from None


NUMBERS = (bool, int, float, NoneType)
checked_once = lru_cache(4096, typed=True)(checked)
"""The same of a number: settings are made anew in each step. Of a text not, as it may name what a file holds now."""


def _refusal(name: str, value: object, words: str, names: Iterable[str] = ()) -> Refused:
    suggestion = f" {meaning(name, (), value)}".rstrip() or nearest(str(value)[:99], names)
    start = f".{suggestion} It" if suggestion else "; it"
    return Refused(f"{name} was given as {shown(value)}{start} must be {words}.")


def shown(value: object, length: int = 200) -> str:
    """Return a value as messages quote it: its repr in one line, cut after `length` characters."""
    text = " ".join(map(str.strip, written(value).splitlines()))
    return text if len(text) <= length else f"{text[:length]}..."


def check_choice(name: str, value: object, names: Iterable[str]) -> None:
    """Refuse a value of the setting `name` that is none of some names.

    Raises:
        Refused: The name does not exist; the message lists those that do and, for a misspelling, the nearest.
    """
    names = list(names)
    if value not in names:
        raise _refusal(name, value, f"one of {', '.join(names)}", names)


def same_name(value: Any, names: Collection[Any]) -> Any:
    """Return the name that equals a text but for capitals, hyphens and underscores, else the value itself."""
    if not isinstance(value, str) or value in names:
        return value
    by_letters = {_letters(str(name)): name for name in names}
    return by_letters.get(_letters(value), value)


def _letters(name: str) -> str:
    return re.sub("[-_]", "", name.lower())


def check_number(name: str, value: object, kind: type[float] = float, **bounds: float) -> None:
    """Refuse a value that is not a finite number within bounds; if `kind` is int, it must also be whole.

    Raises:
        Refused: The value is no such number, or outside the bounds.
    """
    hint: Any = Annotated[kind, Bounds(**bounds)]  # type: ignore[valid-type]
    if not _fits(value, hint):
        raise _refusal(name, value, allowed(hint))


def check_seed(seed: object) -> None:
    """Refuse a seed that is not a whole number of 32 bits, as settings do."""
    check_number("seed", seed, int, at_least=0, at_most=2**32 - 1)


@cache
def field_types(kind: type[Any]) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with its metadata; it allows None if that is default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    types = {each.name: hints[each.name] for each in fields(kind)}
    left_open = [each.name for each in fields(kind) if each.default is OPEN]
    return types | {name: types[name] | None for name in left_open}


def fitted(value: Any, hint: Any, objects: bool = True) -> Any:
    """Return a value as a setting of some type holds it; what it means must be plain.

    Where only a tuple is expected, a single value becomes a tuple of one, and text such as "1,0.3" becomes its
    numbers; where an `Estimator` is expected, the name of a preset (also with changes, as `Estimator.preset`
    takes it) or a mapping of fields and perhaps a `preset` becomes one. Where text is expected, a path becomes
    text, and where a number is expected, text such as "1e-5" becomes the number. A name is taken with other
    capitals, hyphens or underscores too. Where a function may stand, text such as `module:function` becomes it.

    Args:
        value: The value.
        hint: The type, with its metadata.
        objects: Whether an object may stand where `OR_OBJECT` is; settings from a file hold its name, or null.

    Raises:
        Unfit: The type does not allow the value.
        Refused: A mapping or a name makes no dataclass.
    """
    metadata = getattr(hint, "__metadata__", ())
    kind = _bare(hint)
    origin = get_origin(kind)
    parts = get_args(kind)
    if OR_OBJECT in metadata and not objects:
        return fitted(value, kind | None)
    if OR_OBJECT in metadata and origin is not tuple and not isinstance(value, os.PathLike):
        return value
    value = plain(value)
    if OR_FUNCTION in metadata and callable(value):
        return value
    if OR_FUNCTION in metadata and isinstance(value, str) and ":" in value:
        return NamedFunction(value)
    if origin in (Union, UnionType):
        for part in sorted(parts, key=lambda part: get_origin(_bare(part)) is tuple):
            with contextlib.suppress(Unfit):
                return fitted(value, part, objects)
    elif origin is tuple:
        item = Annotated[parts[0], OR_OBJECT] if OR_OBJECT in metadata else parts[0]
        entries = _entries(value, item)
        if parts[-1] is Ellipsis or len(entries) == len(parts):
            return tuple(fitted(entry, item, objects) for entry in entries)
    else:
        value = _converted(value, kind)
        if _fits(value, hint):
            for check in filter(callable, metadata):  # such as of a file that shall be written
                check(value)
            return value
    raise Unfit


def _converted(value: Any, kind: Any) -> Any:
    """Make a value what a type without parts expects, if that is plain; else return it."""
    if get_origin(kind) is Literal:
        return same_name(value, get_args(kind))
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is bool and value in ("True", "False"):
        return value == "True"
    if kind in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return kind(value)
    return _record(value, kind) if is_dataclass(kind) else value


def _entries(value: Any, item: Any) -> list[Any]:
    """Return the values of a tuple; where numbers are expected, text may hold some with commas."""
    if value is None:
        return []
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not (mentions(item, int) or mentions(item, float)):
        return values
    parts = (entry.split(",") if isinstance(entry, str) else [entry] for entry in values)
    return [*chain.from_iterable(parts)]


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a type without parts allows a value."""
    kind = _bare(hint)
    if get_origin(kind) is Literal:  # True is no 1, and an array equals nothing
        names = get_args(kind)
        is_name = isinstance(value, tuple(map(type, names))) and not isinstance(value, bool)
        return is_name and value in names
    if kind in (int, float):
        number: Any = Integral if kind is int else Real
        if not isinstance(value, number) or isinstance(value, bool) or not abs(value) < inf:
            return False  # isfinite cannot take 10**400
        bounds = getattr(hint, "__metadata__", ())
        return all(each.hold(value) for each in bounds if isinstance(each, Bounds))
    if kind is str:
        return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)
    return not (kind in (bool, NoneType) or is_dataclass(kind)) or isinstance(value, kind)


def allowed(hint: Any) -> str:
    """Say which values a type allows, as follows "it must be" in a message; empty if it allows any."""
    metadata = getattr(hint, "__metadata__", ())
    kind = _bare(hint)
    parts = get_args(kind)
    words = {bool: "True or False", NoneType: "None", str: "text in UTF-8"}.get(kind, "")
    if kind in (int, float):
        adjective = "whole" if kind is int else "finite"
        bounds = [str(each) for each in metadata if isinstance(each, Bounds)]
        words = " ".join([f"a {adjective} number", *bounds]).strip()
    elif get_origin(kind) is Literal:
        words = f"one of {', '.join(map(str, parts))}"
    elif get_origin(kind) in (Union, UnionType):
        words = ", or ".join(map(allowed, parts))
    elif get_origin(kind) is tuple:
        length = "" if parts[-1] is Ellipsis else f"{len(parts)} "
        words = f"{length}values, each {allowed(parts[0])}"
    elif isinstance(kind, type) and is_dataclass(kind):
        words = f"a mapping of the fields of {kind.__name__}"
        if hasattr(kind, "preset"):
            words = f"the name of a preset, or {words}"
    if OR_FUNCTION in metadata:
        words += ", or a function: module:function or path/to/file.py:function"
    return words


def names_in(hint: Any) -> list[str]:
    """Return the names that a type allows, in any of its parts."""
    names = (get_args(part) for part in parts_of(hint) if get_origin(part) is Literal)
    return [*map(str, chain.from_iterable(names))]


def mentions(hint: Any, mark: object) -> bool:
    """Return whether a type has a mark, such as `OR_OBJECT` or the Ellipsis of tuples, in any of its parts."""
    return any(part is mark for part in parts_of(hint))


def parts_of(hint: Any) -> Iterator[Any]:
    """Yield a type and all of its parts, its metadata among them."""
    yield hint
    for part in get_args(hint):
        yield from parts_of(part)


def _bare(hint: Any) -> Any:
    """Return a type without its metadata."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def lay(*layers: tuple[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Lay settings over each other, the last layer on top; None in a layer leaves a setting to those below.

    Args:
        *layers: each layer as a pair: where its values come from, in words, and the values by setting.

    Returns:
        The value of each setting, None where no layer has one; and where each value comes from.
    """
    values = dict[str, Any]()
    origins = dict[str, str]()
    for origin, layer in layers:
        chosen = {name: value for name, value in layer.items() if value is not None}
        values = dict.fromkeys(layer) | values | chosen
        origins |= dict.fromkeys(chosen, origin)
    return values, origins


def arguments(kind: type[T], options: Mapping[str, Any], *, objects: bool = True) -> T:
    """Make a dataclass of settings from keywords, which come from a Python call or from a configuration file.

    Values are converted where that is plain; see `fitted`.

    Args:
        kind: The dataclass.
        options: The keywords.
        objects: Whether a field with `OR_OBJECT` may hold an object; settings from a file hold its name.

    Raises:
        Refused: A keyword is not the name of a field, or a value is not allowed.
    """
    hints = field_types(kind)  # type: ignore[arg-type]  # mypy does not know that a class can be hashed
    check_names(options, hints)
    if not (objects and issubclass(kind, Settings)):  # which checks them itself
        options = {name: checked(name, x, hints[name], objects) for name, x in options.items()}
    return kind(**options)


def _record(value: Any, kind: Any) -> Any:
    """Make a dataclass of a mapping of its fields, or of the name of a preset; else return the value."""
    if isinstance(value, str) and hasattr(kind, "preset"):
        return kind.preset(value)
    if not isinstance(value, Mapping):
        return value
    if hasattr(kind, "preset") and "preset" in value:
        changes = {str(name): change for name, change in value.items() if name != "preset"}
        return kind.preset(value["preset"], **changes)
    return arguments(kind, value)
