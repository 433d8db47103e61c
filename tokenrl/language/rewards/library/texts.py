"""Rewards that read only the completion: its pattern, length, repetition, JSON or sentiment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenrl.errors import Refused

GOOD = """
amazing beautiful best brilliant charming clever delightful enjoy enjoyed enjoyable excellent fantastic fine
fun funny glad good gorgeous great happy helpful impressive inspiring interesting kind love loved lovely
moving nice perfect pleasant pleased pleasure recommend remarkable satisfying splendid success superb
terrific thank thanks touching useful warm well wonderful worth
"""
BAD = """
annoying awful bad boring broken clumsy confusing cruel cruelly disappointed disappointing disappointment
disgusting disliked dreadful dull fail failed failure fault hate hated hateful horrible hurt mediocre mess
miserable nasty pathetic poor poorly pointless problem regret sad shallow silly slow stupid tedious terrible
ugly unhappy unpleasant upset useless waste weak worse worst wrong
"""
NEGATIONS = "not no never hardly isn't wasn't don't didn't doesn't can't cannot won't"
Unit = Literal["tokens", "words", "characters"]


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion; of chat messages it is their contents, joined by line ends."""
    return [
        one if isinstance(one, str) else "\n".join(str(message["content"]) for message in one)
        for one in completions
    ]


def is_number(value: Any) -> bool:
    """Whether an option is a finite number; True and False are not numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class RegexFormat:
    r"""1 where the completion matches a regular expression, else 0.

    Nested repetition such as `(a+)+$` can take for ever on a text that a model wrote; `reward_timeout` then
    stops the run with a message.

    Attributes:
        pattern: a regular expression of Python's `re`. Flags go inside, such as `(?s)`, with which the dot
            matches line ends too.
        search: whether a match anywhere in the text counts; by default the whole text has to match.
    """

    pattern: str
    search: bool = False
    __name__ = "regex_format"
    binary = True

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise Refused(
                f"regex_format(pattern={self.pattern!r}): this is not a regular expression: {error}."
            ) from error

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Reward N completions."""
        pattern = re.compile(self.pattern)
        matches = pattern.search if self.search else pattern.fullmatch
        return [float(matches(text) is not None) for text in completion_texts(completions)]


def _units(
    unit: Unit, completions: Sequence[Any], ids: Sequence[Sequence[int]] | None
) -> list[Sequence[Any]]:
    """Each completion as a sequence of tokens, words (in lower case) or characters."""
    if unit == "tokens":
        if ids is None:
            raise ValueError("unit='tokens' needs completion_ids, which was not passed; use 'words'")
        return list(ids)
    return [text.casefold().split() if unit == "words" else text for text in completion_texts(completions)]


def _check_unit(name: str, unit: Any) -> None:
    if unit not in ("tokens", "words", "characters"):
        raise Refused(f"{name}(unit={unit!r}): give tokens, words or characters.")


@dataclass(frozen=True)
class Length:
    """Minus the relative distance from a length: `-|n - target| / target`, or `-max(0, n - max) / max`.

    Attributes:
        target: the length that is wanted.
        max: the greatest length without a penalty. Exactly one of `target` and `max` is given.
        unit: what is counted: tokens (EOS included), words or characters.
    """

    target: int | None = None
    max: int | None = None
    unit: Unit = "tokens"
    __name__ = "length"

    def __post_init__(self) -> None:
        given = [limit for limit in (self.target, self.max) if limit is not None]
        if len(given) != 1 or not is_number(given[0]) or given[0] <= 0:
            raise Refused(
                f"length(target={self.target!r}, max={self.max!r}): give exactly one of the two, a number "
                "above 0, as in length(target=20)."
            )
        _check_unit(self.__name__, self.unit)

    def __call__(self, completions: Sequence[Any], completion_ids: Any = None, **_: Any) -> list[float]:
        """Reward N completions."""
        sizes = [len(row) for row in _units(self.unit, completions, completion_ids)]
        if self.target is not None:
            return [-abs(size - self.target) / self.target for size in sizes]
        limit = self.max or 1
        return [-float(size > limit) * (size - limit) / limit for size in sizes]


@dataclass(frozen=True)
class Repetition:
    """Minus the share of n-grams that repeat an earlier one: `(distinct n-grams) / (all n-grams) - 1`.

    The reward lies between -1 and 0. It is 0 for a completion that is too short for two n-grams.

    Attributes:
        n: the number of units per n-gram.
        unit: what an n-gram is made of: tokens, words (upper and lower case count as equal) or characters.
    """

    n: int = 3
    unit: Unit = "words"
    __name__ = "repetition"
    range = (-1.0, 0.0)

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise Refused(f"repetition(n={self.n!r}): give a whole number of at least 1.")
        _check_unit(self.__name__, self.unit)

    def __call__(self, completions: Sequence[Any], completion_ids: Any = None, **_: Any) -> list[float]:
        """Reward N completions."""
        rewards = []
        for row in _units(self.unit, completions, completion_ids):
            grams = [tuple(row[i : i + self.n]) for i in range(len(row) - self.n + 1)]
            rewards.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
        return rewards


@dataclass(frozen=True)
class ValidJson:
    """1 where the whole completion is JSON (RFC 8259: no NaN, and no text around it), else 0.

    Attributes:
        required: keys that the JSON value must have; it must then be an object.
    """

    required: Sequence[str] = ()
    __name__ = "valid_json"
    binary = True

    def __post_init__(self) -> None:
        if isinstance(self.required, str) or not all(isinstance(key, str) for key in self.required):
            raise Refused(
                f"valid_json(required={self.required!r}): give a list of keys, such as ['name', 'age']."
            )

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Reward N completions."""
        return [float(self._accepts(text)) for text in completion_texts(completions)]

    def _accepts(self, text: str) -> bool:
        try:
            value = json.loads(text, parse_constant=_no_constant, parse_int=str)  # int() refuses long numbers
        except (ValueError, RecursionError):
            return False
        return not self.required or (isinstance(value, dict) and set(self.required) <= set(value))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class Sentiment:
    """Balance of p favourable and q unfavourable words, `(p - q) / max(1, p + q)`, from -1 to 1.

    A word right after a negation counts for the other side. This reward is for demonstrations: it is easily
    exploited by a policy that repeats one favourable word, unless a KL penalty or `repetition` holds it back.

    Attributes:
        positive: favourable words in lower case; empty means a built-in list of about 60 words.
        negative: unfavourable words in lower case; empty means a built-in list of about 60 words.
    """

    positive: Sequence[str] = ()
    negative: Sequence[str] = ()
    __name__ = "sentiment"
    range = (-1.0, 1.0)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Reward N completions."""
        good = frozenset(self.positive or GOOD.split())
        bad = frozenset(self.negative or BAD.split())
        negations = frozenset(NEGATIONS.split())
        rewards = []
        for text in completion_texts(completions):
            words = re.findall(
                r"[^\W\d_]+(?:'[^\W\d_]+)?", text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
            )
            signs = [(word in good) - (word in bad) for word in words]
            turned = [
                -sign if before in negations else sign
                for sign, before in zip(signs, ["", *words], strict=False)
            ]
            rewards.append(sum(turned) / max(1, sum(map(abs, turned))))
        return rewards
