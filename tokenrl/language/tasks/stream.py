"""Orders the rows of the data: prompts for each rollout, demonstrations or pairs for each update."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from tokenrl.errors import Refused
from tokenrl.language.tasks.rows import Row, Rows, distinct
from tokenrl.runs.output import quantity

Shuffle = Callable[[int, int], Iterator[list[int]]]  # of a number of rows and a seed

MIN_PROMPTS = 13
"""With fewer distinct training prompts (16, of which a fifth is held out) a policy learns them by heart."""


def few_prompts(rows: Rows) -> list[str]:
    """Return a warning if fewer than 13 distinct prompts, but several, are left to train on; else nothing.

    Args:
        rows: training rows with a `prompt` each.
    """
    count = len(distinct(rows.hashes))
    if count == 1 or count >= MIN_PROMPTS:
        return []
    return [
        f"only {quantity(count, 'distinct prompt')} in {len(rows):,} training rows: the policy can learn "
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
        self.position = 0
        self._num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._restart()

    def _restart(self) -> None:
        self._orders = enumerate(self._shuffle(self._num_rows, self._seed))
        self._epoch = -1
        self._order: list[int] = []

    def draw(self, count: int) -> list[int]:
        """Return the numbers of the next `count` rows."""
        numbers = []
        for _ in range(count):
            epoch, row = divmod(self.position, self._num_rows)
            while self._epoch < epoch:
                self._epoch, self._order = next(self._orders)
            numbers.append(self._order[row])
            self.position += 1
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
        self.position = int(state["position"])
        self._restart()


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

    def draw_prompts(self, count: int) -> list[tuple[int, Row]]:
        """Return the next `count` prompts, each with the number of prompts drawn before it."""
        first = self.position
        return [(first + i, self._rows[number]) for i, number in enumerate(self.draw(count))]

    def peek(self, count: int) -> list[tuple[int, Row]]:
        """Return what `draw_prompts` would, and draw nothing."""
        state = self.state_dict()
        prompts = self.draw_prompts(count)
        self.load_state_dict(state)
        return prompts


def prompt_orders(num_rows: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of prompts in each epoch."""
    for epoch in itertools.count():
        generator = np.random.default_rng([seed, epoch])
        yield generator.permutation(num_rows).tolist()


def batch_orders(num_rows: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of demonstrations or pairs in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(num_rows, generator=generator).tolist()
