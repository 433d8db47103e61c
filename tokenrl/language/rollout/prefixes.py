"""Keeps what a model has read, so that the next turn of an episode reads only what is new.

A turn begins with all tokens of the turns before it. Their keys and values, and the recurrent states where a
model has them, are kept by the tokens themselves, as the prefix cache of a server does. Nothing is kept of
other weights: each batch of episodes has a cache of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.rollout import Rollout

GIB = 2**30


class PrefixCache:
    """Caches of single rows, by the tokens that were read into them.

    Attributes:
        limit: the most bytes that they take together; the oldest are dropped first.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._rows: dict[bytes, Cache] = {}
        self._size = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def longest(self, ids: Sequence[int]) -> tuple[int, Cache | None]:
        """Return the longest prefix of a history that was read: its number of tokens, and its cache.

        At least one token is left to be read, since the logits of the next one come from reading it.
        """
        history = _key(ids[:-1])
        prefixes = [key for key in self._rows if history.startswith(key)]
        if not prefixes:
            return 0, None
        prefix = max(prefixes, key=len)
        return len(prefix) // array("q").itemsize, self._rows[prefix]

    def add(self, ids: Sequence[int], row: Cache) -> None:
        """Keep the cache of a row whose first tokens are `ids`, if there is memory for it."""
        self._remove(_key(ids))
        self._rows[_key(ids)] = row
        self._size += row.nbytes
        while self._size > self.limit:
            self._remove(next(iter(self._rows)))

    def drop(self, ids: Sequence[int], length: int) -> None:
        """Forget the prefix of so many tokens of a history, which becomes longer."""
        self._remove(_key(ids[:length]))

    def _remove(self, key: bytes) -> None:
        if key in self._rows:
            self._size -= self._rows.pop(key).nbytes


class EndedRows:
    """Takes the caches of the rows of a batch when they end, and gives them to a `PrefixCache`.

    A row that reaches its limit of tokens has no end, and its episode goes no further: it is not kept.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], prefixes: PrefixCache) -> None:
        """Of N rows with their prompts."""
        self.prompts = prompts
        self.prefixes = prefixes
        self.rows: dict[int, tuple[int, Cache]] = {}

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
        if not cache.has_rows:
            return
        going_on = set(unfinished.tolist())
        for place, number in enumerate(numbers.tolist()):
            if place in going_on or number in self.rows:
                continue
            start = width - len(self.prompts[number]) - t
            self.rows[number] = t, cache.row(place, start, width)

    def keep(self, rollout: Rollout) -> None:
        """Give the caches away, by the tokens that belong to the rows of a finished rollout."""
        counts = rollout.mask.sum(dim=1).tolist()
        for number, (t, cache) in self.rows.items():
            read = min(t, counts[number])
            if read < t and cache.recurrent:
                continue  # its state has gone beyond the end
            ids = rollout.completion_ids[number, :read].tolist()
            self.prefixes.add([*self.prompts[number], *ids], cache)


def _key(ids: Sequence[int]) -> bytes:
    return array("q", ids).tobytes()
