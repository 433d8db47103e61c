"""Keeps rows of data as columns, and makes the dictionary of a row when it is read.

A dictionary for each row takes several times the memory of its values, and what is asked of all rows, such as the
hashes of their prompts, is asked of a column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from tokenrl.errors import Placed, Refused, with_places
from tokenrl.files import canonical

Row = Mapping[str, Any]


@dataclass(eq=False, repr=False)
class Rows(Sequence[Any]):
    """Rows that have the same columns.

    Attributes:
        columns: the values of the rows [N] in each column, by its name.
        locations: where the rows stand in the user's data [N], for messages.
        fillings: what a template put into each prompt, as a text [N]; empty for prompts without a template.
    """

    columns: dict[str, list[Any]]
    locations: Sequence[str]
    fillings: Sequence[str] = ()

    @classmethod
    def of(cls, rows: Iterable[Any], source: str = "task") -> Rows:
        """Return rows with their locations; in a column that a row lacks it gets None.

        Raises:
            Refused: a row is no mapping; the message begins with the source.
        """
        if isinstance(rows, Rows):
            return rows
        columns: dict[str, list[Any]] = {}
        locations: list[str] = []
        for location, row in with_places(rows):
            if not isinstance(row, Mapping):
                raise Refused(
                    f"{source}, {location} is {row!r:.100} ({type(row).__name__}); a row is a dict. Of texts "
                    'write task=[{"prompt": text} for text in texts].'
                )
            if not row.keys() <= columns.keys():
                for name in row:
                    columns.setdefault(name, [None] * len(locations))
            for name, column in columns.items():
                column.append(row.get(name))
            locations.append(location)
        return cls(columns, locations)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.locations)

    def __eq__(self, other: object) -> bool:
        """Return whether both have equal rows."""
        return list(self) == other

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or the rows of a slice."""
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return next(iter(self.take([index])))

    def __iter__(self) -> Iterator[Placed]:
        """Yield the rows, each a new dictionary."""
        for location, *values in zip(self.locations, *self.columns.values(), strict=True):
            yield Placed(dict(zip(self.columns, values, strict=True)), location)

    def take(self, numbers: Iterable[int]) -> Rows:
        """Return the rows of these numbers."""
        numbers = list(numbers)
        columns = {name: [column[i] for i in numbers] for name, column in self.columns.items()}
        fillings = [self.fillings[i] for i in numbers] if self.fillings else ()
        return Rows(columns, [self.locations[i] for i in numbers], fillings)

    def column(self, name: str) -> list[Any]:
        """Return the values in a column, None if there is no such column."""
        return self.columns.get(name) or [None] * len(self)

    def with_columns(self, names: Iterable[str]) -> Rows:
        """Return the rows with these columns."""
        return replace(self, columns={name: self.column(name) for name in names})

    @cached_property
    def hashes(self) -> np.ndarray:
        """The hashes of the prompts [N], which equal prompts share. They divide rows, and so stay as they are."""
        return hashes(map(prompt_key, self.columns["prompt"]))

    @cached_property
    def keys(self) -> np.ndarray:
        """The hashes of the prompts and of the questions [K, N], of which one is enough to know a row again.

        The question is the prompt without the turns of the system and without blanks at its ends, and what a
        template put into it. Where most prompts differ in what that leaves out, as where the system's turn asks,
        the prompt alone counts.
        """
        questions = [*map(question_of, self.columns["prompt"])], self.fillings
        keys = [self.hashes, *map(hashes, filter(None, questions))]
        distinct = [len(np.unique(of_rows)) for of_rows in keys]
        return np.stack(keys)[[2 * count > distinct[0] for count in distinct]]


def prompt_key(prompt: Any) -> str:
    """Return a prompt as a text that equal prompts share; a single message of the user counts as its text."""
    is_single = not isinstance(prompt, str) and len(prompt) == 1
    if is_single and prompt[0] == {"role": "user", "content": prompt[0].get("content")}:
        prompt = prompt[0]["content"]
    return f"text {prompt}" if isinstance(prompt, str) else canonical(prompt)


def question_of(prompt: Any) -> str:
    """Return what a prompt asks as a text: without blanks at its ends and without the turns of the system."""
    if isinstance(prompt, str):
        return prompt_key(prompt.strip())
    return prompt_key(
        [
            {**turn, "content": turn["content"].strip()}
            for turn in prompt
            if turn["role"] != "system"
        ]
    )


def hashes(keys: Iterable[str]) -> np.ndarray:
    """Return the hash of each of N texts, an integer of 64 bits [N]."""
    digests = (sha256(key.encode("utf-8", "surrogatepass")).digest()[:8] for key in keys)
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def digits(keys: np.ndarray) -> list[str]:
    """Return hashes as texts of 16 hexadecimal digits, as the file of a run holds them."""
    return list(map("{:016x}".format, keys.tolist()))
