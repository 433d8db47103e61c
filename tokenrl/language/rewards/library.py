"""A library of common rewards, which can be named on the command line.

Each class makes a reward with TRL's signature, for text and for chat messages. On the command line it has its
name in `LIBRARY`, and its fields are the options: `--reward numeric_answer "length(target=20)"`. Text that a
model wrote is parsed, and never evaluated as code.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Number
from typing import Any, Literal

from tokenrl.errors import Refused, suggest, with_places
from tokenrl.names import source_of
from tokenrl.settings import Count, NonNegative, Settings


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion; of chat messages it is their contents, joined by line ends."""
    return [
        c if isinstance(c, str) else "\n".join(str(message["content"]) for message in c)
        for c in completions
    ]


@dataclass(frozen=True)
class RegexFormat(Settings):
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
        """Refuse a pattern that is no regular expression."""
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise Refused(
                f"pattern {self.pattern!r} is not a regular expression: {error}."
            ) from error

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Reward N completions."""
        pattern = re.compile(self.pattern)
        matches = pattern.search if self.search else pattern.fullmatch
        return [float(matches(text) is not None) for text in completion_texts(completions)]


@dataclass(frozen=True)
class Length(Settings):
    """Minus the relative distance from a length: `-|n - target| / target`, or `-max(0, n - max) / max`.

    Attributes:
        target: the length that is wanted.
        max: the greatest length without a penalty. Exactly one of `target` and `max` is given.
        unit: what is counted: tokens (EOS included), words or characters.
    """

    target: Count | None = None
    max: Count | None = None
    unit: Literal["tokens", "words", "characters"] = "tokens"
    __name__ = "length"

    def __post_init__(self) -> None:
        """Refuse anything but one of the two lengths."""
        super().__post_init__()
        if (self.target is None) == (self.max is None):
            raise Refused(
                f"length(target={self.target!r}, max={self.max!r}): give exactly one of the two."
            )

    def __call__(
        self, completions: Sequence[Any], completion_ids: Any = None, **_: Any
    ) -> list[float]:
        """Reward N completions."""
        if self.unit == "tokens" and completion_ids is None:
            raise ValueError(
                "unit='tokens' needs completion_ids, which was not passed; use 'words'"
            )
        texts: Any = completion_ids if self.unit == "tokens" else completion_texts(completions)
        if self.unit == "words":
            texts = [text.split() for text in texts]
        sizes = [len(text) for text in texts]
        if self.target is not None:
            return [-abs(size - self.target) / self.target for size in sizes]
        limit = self.max or 1
        return [-max(0, size - limit) / limit for size in sizes]


ROUNDING = Decimal("1e-6")
"""How far a number may be from a fraction that it equals."""
_PUNCTUATION = re.compile(r"[^\w\s]")
_BETWEEN = r"[,.'_\N{RIGHT SINGLE QUOTATION MARK}\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}]"
_DIGITS = rf"\.?[0-9](?:{_BETWEEN}?[0-9])*"
"""All digits that are written together, with what stands between them, whether or not they are a number."""
_UNSIGNED = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_UNSIGNED += rf"(?!{_BETWEEN}?[0-9])"  # no part of them
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[-+])?\$?(?:\\[dt]?frac\s*{{(?P<a>[-+]?[0-9.]+)}}\s*{{(?P<b>[-+]?[0-9.]+)}}"
    rf"|(?<![\w.])(?<![0-9]{_BETWEEN})(?:(?P<number>{_UNSIGNED})(?P<power>[eE][-+]?[0-9]+)?"
    rf"(?:\s?/\s?(?P<over>{_UNSIGNED})|(?!\s?/\s?[0-9]))|(?P<odd>{_DIGITS}(?:\s?/\s?{_DIGITS})?)))"
)


@dataclass(frozen=True)
class _Answer(Settings):
    """A reward that compares completions with the answers in a column of the data."""

    column: str = "answer"
    __name__ = ""

    def check_columns(self, available: Iterable[str]) -> None:
        """Refuse data without the column."""
        if self.column not in available:
            problem = f"The data has no column '{self.column}' of answers.{suggest(self.column, available)}"
            raise Refused(f"{problem} Name it: {self.__name__}(column='...').")

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse an answer that no completion can equal, as it is neither text nor a number."""
        for location, row in with_places(rows):
            answer = row.get(self.column)
            if isinstance(answer, bool) or not isinstance(answer, str | Number | None):
                kind = type(answer).__name__
                problem = f"{location}: the answer in the column '{self.column}' is {answer!r:.100} ({kind})"
                raise Refused(
                    f"{problem}. {self.__name__} takes text or a number: write it as the text."
                )

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Reward N completions."""
        pairs = zip(completion_texts(completions), columns[self.column], strict=True)
        return [  # None and NaN, which stands for it in tables of numbers, are no answers
            None if answer is None or answer != answer else self._compare(text, answer)
            for text, answer in pairs
        ]

    def _compare(self, text: str, answer: Any) -> float | None:
        raise NotImplementedError


@dataclass(frozen=True)
class ExactMatch(_Answer):
    """1 where the completion is the text or number in a column, else 0; abstains where the column is None.

    A whole number among fractions, such as 7.0, may be written without its point.

    Attributes:
        column: the column that holds the answer.
        strip: whether white space around both texts is dropped.
        ignore_case: whether upper and lower case count as equal.
        ignore_punctuation: whether all characters but letters, digits, underscores and white space are
            dropped.
        collapse_spaces: whether any run of white space counts as one space.
    """

    strip: bool = True
    ignore_case: bool = False
    ignore_punctuation: bool = False
    collapse_spaces: bool = False
    __name__ = "exact_match"
    binary = True

    def _compare(self, text: str, answer: Any) -> float:
        forms = {self._normal(str(answer))}
        if isinstance(answer, float) and answer.is_integer():
            forms.add(str(int(answer)))
        return float(self._normal(text) in forms)

    def _normal(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = _PUNCTUATION.sub("", text)
        if self.collapse_spaces:
            text = re.sub(r"\s+", " ", text)
        return text.strip() if self.strip else text


def final_number(text: str) -> Decimal | None:
    r"""The number that a text gives as its final answer, exactly as it is written; None if there is none.

    It is the first number in the last `\boxed{...}` (after its last `=`). Without a box it is the first
    number after the last `####`, as in GSM8K, else the last number of the text. Numbers may be written as
    `-1,234.5`, `1e-3`, `3/4`, `\frac{3}{4}` or `$5`. A point begins the fraction and a comma divides thousands:
    `3.14`, `1,234` is 1234, `1,234.56`. Digits with other commas or points, such as `3,14`, `12,50` or `1.234,56`,
    may mean several things and are no number; `1.234` is less than 2 wherever it was written.
    """
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    boxed = _last_boxed(text)
    if boxed is not None:
        plain = re.sub(r"\\(?:text|mathrm|textbf)\s*{[^{}]*}|\\[!,;: ]", "", boxed)
        return next(_numbers(plain.rpartition("=")[2]), None)
    if "####" in text:
        return next(_numbers(text.rpartition("####")[2]), None)
    return next(reversed(list(_numbers(text))), None)


def _last_boxed(text: str) -> str | None:
    r"""The contents of the last complete `\boxed{...}`, whose braces may nest; None if there is none."""
    for start in [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*{", text)][:-5:-1]:
        depth = 1
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start:end]
    return None


def _numbers(text: str) -> Iterator[Decimal | None]:
    """Yield the numbers of a text in their order, None for digits that are no number."""
    for match in _NUMBER.finditer(text):
        part = match.groupdict()
        if part["odd"]:
            yield None
            continue
        try:
            if part["a"] is not None:
                value = Decimal(part["a"]) / Decimal(part["b"])
            else:
                value = Decimal(part["number"].replace(",", "") + (part["power"] or ""))
                if part["over"]:
                    value /= Decimal(part["over"].replace(",", ""))
        except ArithmeticError:  # no number, too large a power, or a division by 0
            continue
        if math.isfinite(value):
            yield value.copy_negate() if (part["sign"] or "").startswith("-") else value


@dataclass(frozen=True)
class NumericAnswer(_Answer):
    r"""1 where the final number of the completion equals that of a column, else 0.

    `final_number` reads both; nothing is rounded, but quotients to 28 digits. A whole answer, such as 1234567
    or 7.0, has to be met exactly. Another answer y, which may have been rounded, is met by a number x if
    `|x - y| <= 1e-6 min(1, |y|)`. The reward abstains where the column holds no number, such as `3,14` or
    `1.234,56`, whose commas may mean points or divide a list: write a decimal point into the data. A number counts
    wherever it stands in the text; add `regex_format` to reward its place too.

    Attributes:
        column: the column that holds the answer: a number, or a text that ends with one, as in GSM8K.
        tolerance: the largest `|x - y| / |y|` that counts as equal, of whole answers too. None: as above.
    """

    tolerance: NonNegative | None = None
    __name__ = "numeric_answer"
    binary = True

    def _compare(self, text: str, answer: Any) -> float | None:
        number = final_number(text)
        right = final_number(str(answer))
        if right is None:
            return None
        if number is None:
            return 0.0
        error = abs(number - right)
        if self.tolerance is not None:
            return float(error <= Decimal(self.tolerance) * abs(right))
        if right == right.to_integral_value():
            return float(error == 0)
        return float(error <= ROUNDING * min(abs(right), Decimal(1)))


_REWARDS: tuple[Any, ...] = (ExactMatch, NumericAnswer, RegexFormat, Length)
LIBRARY: dict[str, Any] = {vars(kind)["__name__"]: kind for kind in _REWARDS}


def source_of_reward(spec: str) -> str:
    """Return the module or the file that a named reward is imported from; empty for the library and for a folder."""
    is_in_library = spec.partition("(")[0].strip() in LIBRARY
    return "" if is_in_library or os.path.isdir(spec) else source_of(spec)
