"""Keeps what a model has read, so that the next turn of an episode reads only what is new.

A turn begins with all tokens of the turns before it. Their keys and values, and the recurrent states where a
model has them, are kept by the tokens themselves, as the prefix cache of a server does. Nothing is kept of
other weights: each batch of episodes has a cache of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.rollout import Rollout

GIB = 2**30


class Prefix(NamedTuple):
    """The first tokens of a history, which were read.

    Attributes:
        length: how many they are.
        cache: a cache in which one row is theirs.
        row: the number of this row.
        end: the column behind the last of them.
    """

    length: int
    cache: Cache
    row: int
    end: int


class PrefixCache:
    """Rows of caches, by the tokens that were read into them.

    Attributes:
        limit: the most bytes that the caches take together; the oldest are dropped first.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._rows: dict[bytes, Prefix] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def longest(self, ids: Sequence[int]) -> Prefix | None:
        """Return the longest prefix of a history that was read; None if nothing of it was.

        At least one token is left to be read, since the logits of the next one come from reading it.
        """
        history = _key(ids[:-1])
        prefixes = [key for key in self._rows if history.startswith(key)]
        return self._rows[max(prefixes, key=len)] if prefixes else None

    def add(self, rows: Mapping[int, tuple[Sequence[int], int]], cache: Cache) -> None:
        """Keep a cache, if there is memory for it: of each row the tokens, and the column behind the last one."""
        for row, (ids, end) in rows.items():
            self._rows.pop(_key(ids), None)
            self._rows[_key(ids)] = Prefix(len(ids), cache, row, end)
        while self._nbytes() > self.limit:
            oldest = next(iter(self._rows.values())).cache
            prefixes = self._rows.items()
            self._rows = {key: prefix for key, prefix in prefixes if prefix.cache is not oldest}

    def drop(self, ids: Sequence[int], length: int) -> None:
        """Remove the cached prefix of `length` tokens; a longer one replaces it."""
        self._rows.pop(_key(ids[:length]), None)

    def _nbytes(self) -> int:
        """Return the bytes of all caches."""
        caches = {id(prefix.cache): prefix.cache for prefix in self._rows.values()}
        return sum(cache.nbytes for cache in caches.values())


class EndedRows:
    """Takes the caches of the rows of a batch when they end, and gives them to a `PrefixCache`.

    A row that reaches its limit of tokens has no end, and its episode goes no further: it is not kept.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], prefixes: PrefixCache) -> None:
        """Of N rows with their prompts."""
        self.prompts = prompts
        self.prefixes = prefixes
        self.parts: list[tuple[list[int], int, Cache]] = []
        self.ended = set[int]()

    def take(
        self, cache: Cache, numbers: torch.Tensor, unfinished: torch.Tensor, width: int, t: int
    ) -> None:
        """Copy the caches of the rows that have ended since the last look.

        Args:
            cache: the cache of the batch.
            numbers: the numbers of its rows among the N [n].
            unfinished: which of these go on, by their place in the batch.
            width: columns of the cache.
            t: how many tokens of each completion were read.
        """
        going_on = set(unfinished.tolist())
        rows = {}
        for row, number in enumerate(numbers.tolist()):
            if row not in going_on and number not in self.ended:
                rows[number] = row
        if not rows or not cache.has_rows:
            return
        self.ended |= set(rows)
        longest = max(len(self.prompts[number]) for number in rows)
        copied = cache.rows(list(rows.values()), width - longest - t, width)
        self.parts.append((list(rows), t, copied))

    def keep(self, rollout: Rollout) -> None:
        """Give the caches away, by the tokens that belong to the rows of a finished rollout."""
        counts = rollout.mask.sum(dim=1).tolist()
        for numbers, t, cache in self.parts:
            width = max(len(self.prompts[number]) for number in numbers) + t
            rows = {}
            for row, number in enumerate(numbers):
                read = min(t, counts[number])
                if read < t and cache.recurrent:
                    continue  # its state has gone beyond the end
                ids = rollout.completion_ids[number, :read].tolist()
                rows[row] = [*self.prompts[number], *ids], width - (t - read)
            self.prefixes.add(rows, cache)


def _key(ids: Sequence[int]) -> bytes:
    return array("q", ids).tobytes()
