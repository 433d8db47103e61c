"""Checks the values of settings, and makes settings from keywords. Imports no torch.

The type of a field says which values are allowed, and `check` reads them there::

    temperature: Positive = 1.0
    num_steps: Annotated[int, Bounds(at_least=2)] | None = None

A rule about two fields together is a plain `if` in the code that uses both.
"""

from __future__ import annotations

import contextlib
import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import chain
from math import inf
from numbers import Integral, Real
from operator import ge, gt, le, lt
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from tokenrl.errors import Refused, nearest, written
from tokenrl.foreign import check_names
from tokenrl.names import NamedFunction

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, given as metadata of its type. Without any bound a number must still be finite."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def limits(self) -> list[tuple[str, Callable[[float, float], bool], float]]:
        """Return (words, comparison, limit) for each bound; the comparison must hold."""
        limits: list[Any] = [
            ("of at least", ge, self.at_least),
            ("above", gt, self.above),
            ("at most", le, self.at_most),
            ("below", lt, self.below),
        ]
        return [limit for limit in limits if limit[2] is not None]

    def hold(self, value: float) -> bool:
        """Return whether a finite number lies within the bounds."""
        return all(compare(value, limit) for _, compare, limit in self.limits())

    def __str__(self) -> str:
        return " and ".join(f"{words} {limit:,.12g}" for words, _, limit in self.limits())


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
OR_FUNCTION = "or a function"
"""Metadata of a field of names that also takes a function: its own name, or from Python the function."""
OR_OBJECT = "or an object"
"""Metadata of a field of text that also takes an object, such as a model, from Python."""


class Settings:
    """Base of the dataclasses of settings. An object with a value that is not allowed cannot be made.

    `group` is the title under which the help of the command line shows the fields that this class itself
    declares. The fields of classes without a group are shown first, without a title.
    """

    group: typing.ClassVar[str] = ""

    def __init_subclass__(cls, group: str = "") -> None:
        cls.group = group

    def __post_init__(self) -> None:
        """Refuse values that are not allowed; a text such as `module:function` becomes that function."""
        kind: Any = type(self)
        for name in rules_of(kind):
            value = plain(getattr(self, name))
            if type(value) is str and ":" in value:
                hint = field_types(kind)[name]
                if OR_FUNCTION in getattr(hint, "__metadata__", ()):
                    value = NamedFunction(value)
            object.__setattr__(self, name, value)
        check(self)


def plain(value: Any) -> Any:
    """Return a number or an array of numpy or torch as plain numbers, also inside a tuple; else the value."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    is_array = hasattr(value, "tolist") and hasattr(value, "ndim")
    return value.tolist() if is_array else value


class Rule(NamedTuple):
    """Which values one setting may have.

    Attributes:
        fits: Returns whether a value is allowed.
        words: The allowed values in words, which follow "it must be" in the error message.
        names: The names that are allowed. For a misspelled name the message suggests the nearest of them.
    """

    fits: Callable[[Any], bool]
    words: str
    names: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> None:
        """Refuse a value that is not allowed; say which name was probably meant, and what is allowed."""
        if not self.fits(value):
            suggestion = nearest(str(value)[:99], self.names)
            start = f".{suggestion} It" if suggestion else "; it"
            raise Refused(f"{name} was given as {shown(value)}{start} must be {self.words}.")


def check(settings: Any, *, objects: bool = True) -> None:
    """Refuse a dataclass in which a field has a value that its type does not allow.

    Args:
        settings: The dataclass.
        objects: Whether a field with `OR_OBJECT` may hold an object; settings from a file hold its name.

    Raises:
        Refused: A field has a value that is not allowed; the message names the first such field.
    """
    for name, rule in rules_of(type(settings), objects).items():  # type: ignore[arg-type]
        rule.check(name, getattr(settings, name))


def shown(value: object, length: int = 200) -> str:
    """Return a value as messages quote it: its repr in one line, cut after `length` characters."""
    text = " ".join(map(str.strip, written(value).splitlines()))
    return text if len(text) <= length else f"{text[:length]}..."


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a name that is not allowed.

    Args:
        name: The name of the setting, as the user wrote it (a field, "preset").
        value: The user's value.
        allowed: The names that exist.

    Raises:
        Refused: The name does not exist; the message lists those that do and, for a misspelling, the nearest.
    """
    _choice_rule(tuple(allowed)).check(name, value)


def same_name(value: Any, names: Collection[Any]) -> Any:
    """Return the name that equals a text but for capitals, hyphens and underscores, else the value itself."""
    if not isinstance(value, str) or value in names:
        return value
    by_letters = {_letters(name): name for name in names if isinstance(name, str)}
    return by_letters.get(_letters(value), value)


def _letters(name: str) -> str:
    return re.sub("[-_]", "", name.lower())


def check_number(name: str, value: object, kind: type[float] = float, **bounds: float) -> None:
    """Refuse a value that is not a finite number within bounds; if `kind` is int, it must also be whole.

    Raises:
        Refused: The value is no such number, or outside the bounds.
    """
    _number_rule(kind, Bounds(**bounds)).check(name, value)


def check_seed(seed: object) -> None:
    """Refuse a seed that is not a whole number of 32 bits, as settings do."""
    check_number("seed", seed, int, at_least=0, at_most=2**32 - 1)


@cache
def field_types(kind: type[Any]) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with its metadata; it allows None if that is default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    types = {field.name: hints[field.name] for field in fields(kind)}
    left_open = [field.name for field in fields(kind) if field.default is OPEN]
    return types | {name: types[name] | None for name in left_open}


@cache
def rules_of(kind: type[Any], objects: bool = True) -> dict[str, Rule]:
    """Return the rules of the fields that have one; cached, because estimators are made by the thousand."""
    rules = {name: _rule(hint, objects) for name, hint in field_types(kind).items()}  # type: ignore[arg-type]
    return {name: rule for name, rule in rules.items() if rule is not None}


def _rule(hint: Any, objects: bool) -> Rule | None:
    """Return the rule of a type, or None if every value is allowed."""
    metadata = getattr(hint, "__metadata__", ())
    hint = _bare(hint)
    origin = get_origin(hint)
    parts = get_args(hint)
    if OR_OBJECT in metadata:  # an object without a name is null in a file
        return None if objects else _rule(hint | None, objects)
    if OR_FUNCTION in metadata:
        named = _choice_rule(parts)
        words = f"{named.words}, or a function: module:function or path/to/file.py:function"
        return named._replace(fits=lambda value: callable(value) or named.fits(value), words=words)
    if hint in (int, float):
        bounds = [entry for entry in metadata if isinstance(entry, Bounds)]
        return _number_rule(hint, *bounds)
    if hint is bool:
        return Rule(lambda value: isinstance(value, bool), "True or False")
    if hint is NoneType:
        return Rule(lambda value: value is None, "None")
    if hint is str:
        return Rule(_is_text, "text in UTF-8")
    if isinstance(hint, type) and is_dataclass(hint):
        words = f"a mapping of the fields of {hint.__name__}"
        if hasattr(hint, "preset"):
            words = f"the name of a preset, or {words}"
        return Rule(lambda value: isinstance(value, hint), words)
    if origin is Literal:
        return _choice_rule(parts)
    if origin in (Union, UnionType):
        return _union_rule([_rule(part, objects) for part in parts])
    return _tuple_rule(parts, objects) if origin is tuple else None


def mentions(hint: Any, mark: object) -> bool:
    """Return whether a type has a mark, such as `OR_OBJECT` or the Ellipsis of tuples, in any of its parts."""
    return hint is mark or any(mentions(part, mark) for part in get_args(hint))


def _bare(hint: Any) -> Any:
    """Return a type without its metadata."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _is_text(value: Any) -> bool:
    """Return whether a value is text, or a path, that can be encoded in UTF-8."""
    return isinstance(value, (str, os.PathLike)) and not re.search(r"[\ud800-\udfff]", str(value))


def _number_rule(kind: type[Any], bounds: Bounds = Bounds()) -> Rule:
    number, adjective = (Integral, "whole") if kind is int else (Real, "finite")

    def fits(value: Any) -> bool:
        is_number = isinstance(value, number) and not isinstance(value, bool)
        return is_number and abs(value) < inf and bounds.hold(value)  # isfinite cannot take 10**400

    return Rule(fits, f"a {adjective} number {bounds}".strip())


def _choice_rule(names: tuple[Any, ...]) -> Rule:
    words = tuple(map(str, names))
    kinds = tuple(map(type, names))

    def fits(value: Any) -> bool:  # True is no 1, and an array equals nothing
        return isinstance(value, kinds) and not isinstance(value, bool) and value in names

    return Rule(fits, f"one of {', '.join(words)}", words)


def _union_rule(rules: list[Rule | None]) -> Rule | None:
    """Return the rule of a union of types: a value must fit one of several rules."""
    parts = [rule for rule in rules if rule is not None]
    if len(parts) < len(rules):
        return None
    return Rule(
        lambda value: any(rule.fits(value) for rule in parts),
        ", or ".join(rule.words for rule in parts),
        sum((rule.names for rule in parts), ()),
    )


def _tuple_rule(parts: tuple[Any, ...], objects: bool) -> Rule | None:
    """Return the rule of a tuple: any number of values of one type, or exactly as many as the type lists."""
    rule = _rule(parts[0], objects)
    length = None if parts[-1] is Ellipsis else len(parts)
    if rule is None:
        return None

    def fits(value: Any) -> bool:
        is_tuple = isinstance(value, (tuple, list)) and length in (None, len(value))
        return is_tuple and all(map(rule.fits, value))

    words = "values" if length is None else f"{length} values"
    return Rule(fits, f"{words}, each {rule.words}")


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


def arguments(kind: type[T], options: Mapping[str, Any]) -> T:
    """Make a dataclass of settings from keywords, which come from a Python call or from a configuration file.

    Some values are converted: where only a tuple is expected, a single value becomes a tuple of one, and text
    such as "1,0.3" becomes its numbers; where an `Estimator` is expected, the name of a preset (also with
    changes, as `Estimator.preset` takes it) or a mapping of fields and perhaps a `preset` becomes one; where
    text is expected, a path becomes text; a name is taken with other capitals, hyphens or underscores too.

    Raises:
        Refused: A keyword is not the name of a field, or a value is not allowed.
    """
    hints = field_types(kind)  # type: ignore[arg-type]  # mypy does not know that a class can be hashed
    check_names(options, hints)
    return kind(**{name: _converted(value, hints[name]) for name, value in options.items()})


def _converted(value: Any, hint: Any) -> Any:
    if OR_OBJECT not in getattr(hint, "__metadata__", ()):
        value = plain(value)
    hint = _bare(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return _record(value, hint)
    parts = [hint]
    if get_origin(hint) in (Union, UnionType):
        parts = [_bare(part) for part in get_args(hint)]
    if str in parts and isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None and NoneType in parts:
        return None
    names: list[Any] = []
    for part in parts:
        if get_origin(part) is Literal:
            names += get_args(part)
        if get_origin(part) is tuple and not (str in parts and isinstance(value, str)):
            return _converted_tuple(value, get_args(part)[0])
    return same_name(value, names)


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


def _converted_tuple(value: Any, item: Any) -> tuple[Any, ...]:
    """Make a tuple of a value or of several; where numbers are expected, text may hold some with commas."""
    if value is None:
        return ()
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if {int, float} & {_bare(part) for part in (item, *get_args(item))}:
        values = list(chain.from_iterable(map(_numbers_in, values)))
    return tuple(_converted(entry, item) for entry in values)


def _numbers_in(entry: Any) -> list[Any]:
    """Return the numbers of a text such as "1,0.3"; anything else is returned alone, as it is."""
    if not isinstance(entry, str) or "," not in entry:
        return [entry]
    with contextlib.suppress(ValueError):
        return [int(word) if word.strip().isdigit() else float(word) for word in entry.split(",")]
    return [entry]
