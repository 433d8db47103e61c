"""Orders the rows of the data: prompts for each rollout, demonstrations or pairs for each update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, islice

import numpy as np
import torch

from tokenrl.errors import Refused
from tokenrl.language.tasks.rows import Row, Rows
from tokenrl.runs.output import quantity

Shuffle = Callable[[int, int], Iterator[list[int]]]  # of a number of rows and a seed

MIN_PROMPTS = 13
"""With fewer distinct training prompts (16, of which a fifth is held out) a policy learns them by heart."""


def few_prompts(rows: Rows) -> list[str]:
    """Return a warning if fewer than 13 distinct prompts, but several, are left to train on; else nothing.

    Args:
        rows: training rows with a `prompt` each.
    """
    distinct = len(np.unique(rows.hashes))
    if distinct == 1 or distinct >= MIN_PROMPTS:
        return []
    return [
        f"only {quantity(distinct, 'distinct prompt')} in {len(rows):,} training rows: the policy can learn "
        "the answers by heart, which says nothing about other prompts. Give more data."
    ]


class RowOrder:
    """Draws row numbers without end: each epoch has a new random order and holds every row once.

    The orders follow from the seed, so the number of rows drawn so far is the whole state.
    """

    def __init__(self, num_rows: int, seed: int, shuffle: Shuffle) -> None:
        """Start before the first epoch.

        Args:
            num_rows: number of rows of an epoch.
            seed: seed of the orders.
            shuffle: makes the orders of all epochs, one after the other.

        """
        self._num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._start(0)

    def _start(self, position: int) -> None:
        orders = self._shuffle(self._num_rows, self._seed)
        self._following = islice(chain.from_iterable(orders), position, None)
        self._peeked: list[int] = []
        self.position = position

    def _peek(self, count: int) -> list[int]:
        """Return the numbers of the next `count` rows, and draw none."""
        self._peeked += islice(self._following, max(0, count - len(self._peeked)))
        return self._peeked[:count]

    def draw(self, count: int) -> list[int]:
        """Return the numbers of the next `count` rows."""
        numbers = self._peek(count)
        del self._peeked[:count]
        self.position += count
        return numbers

    def state_dict(self) -> dict[str, int]:
        """Return what is needed to continue exactly, as plain integers."""
        return {"position": self.position, "seed": self._seed, "num_rows": self._num_rows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the position of a saved state.

        Raises:
            Refused: the state belongs to another seed or another number of rows, and so to another order.
        """
        for name, value in self.state_dict().items():
            if name != "position" and state[name] != value:
                raise Refused(
                    f"The saved order of the rows has {name} {state[name]} and this run has {value}: resume "
                    "with the same data and seed, or start a new run."
                )
        self._start(state["position"])


class PromptStream(RowOrder):
    """Draws the prompts of training; a step may have the end of one epoch and the start of the next."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        """Start before the first epoch."""
        super().__init__(len(rows), seed, prompt_orders)
        self._rows = rows

    @property
    def epoch(self) -> float:
        """Passes over the data so far (2.5 means half-way through the third)."""
        return self.position / len(self._rows)

    def peek(self, count: int) -> list[tuple[int, Row]]:
        """Return the next `count` prompts, each with the number of prompts before it, and draw none."""
        rows = map(self._rows.__getitem__, self._peek(count))
        return list(enumerate(rows, self.position))

    def draw_prompts(self, count: int) -> list[tuple[int, Row]]:
        """Draw the next `count` prompts; return each with the number of prompts drawn before it."""
        prompts = self.peek(count)
        self.draw(count)
        return prompts


def prompt_orders(num_rows: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of prompts in each epoch."""
    for epoch in count():
        generator = np.random.default_rng([seed, epoch])
        yield generator.permutation(num_rows).tolist()


def batch_orders(num_rows: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of demonstrations or pairs in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(num_rows, generator=generator).tolist()
