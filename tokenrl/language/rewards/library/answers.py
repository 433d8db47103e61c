"""Rewards that compare a completion with the answer in a column of the data, as text or as a number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenrl.errors import Refused, suggest
from tokenrl.language.rewards.library.texts import completion_texts, is_number

_PUNCTUATION = re.compile(r"[^\w\s]")
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[-+])?\$?(?:\\[dt]?frac\s*{{(?P<a>[-+]?[0-9.]+)}}\s*{{(?P<b>[-+]?[0-9.]+)}}"
    rf"|(?<![\w.])(?P<number>{_UNSIGNED})(?P<power>[eE][-+]?[0-9]+)?(?:\s?/\s?(?P<over>{_UNSIGNED}))?)"
)


def _require_column(name: str, column: str, available: Iterable[str]) -> None:
    if column not in available:
        raise Refused(
            f"Reward {name} compares with the column '{column}', which the data does not have."
            f"{suggest(column, available)} Name the column that holds the answers: {name}(column='...')."
        )


@dataclass(frozen=True)
class ExactMatch:
    """1 where the completion is the text in a column of the data, else 0; abstains where the column is None.

    Attributes:
        column: the column that holds the answer.
        strip: whether white space around both texts is dropped.
        ignore_case: whether upper and lower case count as equal.
        ignore_punctuation: whether all characters but letters, digits, underscores and white space are
            dropped.
        collapse_spaces: whether any run of white space counts as one space.
    """

    column: str = "answer"
    strip: bool = True
    ignore_case: bool = False
    ignore_punctuation: bool = False
    collapse_spaces: bool = False
    __name__ = "exact_match"
    binary = True

    def check_columns(self, available: Iterable[str]) -> None:
        """Refuse data without the column."""
        _require_column(self.__name__, self.column, available)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Reward N completions."""
        pairs = zip(completion_texts(completions), columns[self.column], strict=True)
        return [
            None if answer is None else float(self._normal(text) == self._normal(str(answer)))
            for text, answer in pairs
        ]

    def _normal(self, text: str) -> str:
        text = text.casefold() if self.ignore_case else text
        text = _PUNCTUATION.sub("", text) if self.ignore_punctuation else text
        text = re.sub(r"\s+", " ", text) if self.collapse_spaces else text
        return text.strip() if self.strip else text


def final_number(text: str) -> float | None:
    r"""The number that a text gives as its final answer; None if there is none.

    It is the first number in the last `\boxed{...}` (after its last `=`). Without a box it is the first
    number after the last `####`, as in GSM8K, else the last number of the text. Numbers may be written as
    `-1,234.5`, `1e-3`, `3/4`, `\frac{3}{4}` or `$5`.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    if (boxed := _last_boxed(text)) is not None:
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


def _numbers(text: str) -> Iterator[float]:
    for found in _NUMBER.finditer(text):
        part = found.groupdict()
        try:
            if part["a"] is not None:
                value = float(part["a"]) / float(part["b"])
            else:
                value = float(part["number"].replace(",", "") + (part["power"] or ""))
                value /= float(part["over"].replace(",", "")) if part["over"] else 1.0
        except (ValueError, ZeroDivisionError):
            continue
        if math.isfinite(value):
            yield -value if (part["sign"] or "").startswith("-") else value


@dataclass(frozen=True)
class NumericAnswer:
    r"""1 where the final number of the completion equals that of a column, else 0.

    `final_number` reads both. A number x equals the answer y if `|x - y| <= tolerance max(1, |y|)`, in
    float64. The reward abstains where the column holds no number. A number counts
    wherever it stands in the text; add `regex_format` to reward its place too.

    Attributes:
        column: the column that holds the answer: a number, or a text that ends with one, as in GSM8K.
        tolerance: the largest difference that counts as equal, relative to the size of answers above 1.
    """

    column: str = "answer"
    tolerance: float = 1e-6
    __name__ = "numeric_answer"
    binary = True

    def __post_init__(self) -> None:
        if not (is_number(self.tolerance) and self.tolerance >= 0):
            raise Refused(f"numeric_answer(tolerance={self.tolerance!r}): give a number of at least 0.")

    def check_columns(self, available: Iterable[str]) -> None:
        """Refuse data without the column."""
        _require_column(self.__name__, self.column, available)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Reward N completions."""
        pairs = zip(completion_texts(completions), columns[self.column], strict=True)
        return [self._compare(text, final_number(str(answer))) for text, answer in pairs]

    def _compare(self, text: str, answer: float | None) -> float | None:
        if answer is None:
            return None
        found = final_number(text)
        return float(found is not None and abs(found - answer) <= self.tolerance * max(1.0, abs(answer)))
