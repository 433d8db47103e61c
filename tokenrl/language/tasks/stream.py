"""Orders the rows of the data: prompts for each rollout, demonstrations or pairs for each update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tokenrl.errors import USER_CODE_FAILED, Refused, Stopped, raised
from tokenrl.language.tasks.held_out import prompt_key
from tokenrl.language.tasks.sources import Row
from tokenrl.settings import check_number, check_seed

FEW = 13
"""With fewer distinct training prompts (16, of which a fifth is held out) a policy learns them by heart."""


def few_prompts(rows: Sequence[Row]) -> list[str]:
    """Return a warning if fewer than 13 distinct prompts are left to train on, else an empty list.

    Args:
        rows: training rows with a `prompt` each.
    """
    distinct = len({prompt_key(row["prompt"]) for row in rows})
    if distinct >= FEW:
        return []
    return [
        f"only {distinct} distinct prompt{'s' * (distinct != 1)} in {len(rows):,} training rows: the policy "
        "can learn the answers by heart, which says nothing about other prompts. Give more data."
    ]


class _Order:
    """Row numbers without end: each epoch has a new random order and holds every row once.

    The orders follow from the seed, so the number of rows given out so far is the whole state.
    """

    def __init__(self, num_rows: int, size: int, seed: int) -> None:
        check_seed(seed)
        self._num_rows, self._size, self._seed, self._position = num_rows, size, seed, 0
        self._epoch, self._order = -1, list[int]()

    def _take(self, count: int) -> list[tuple[int, int]]:
        """The next `count` row numbers, each with its position: how many were given out before it."""
        taken = []
        for position in range(self._position, self._position + count):
            epoch, place = divmod(position, self._num_rows)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._shuffled(epoch)
            taken.append((position, self._order[place]))
        self._position += count
        return taken

    def _shuffled(self, epoch: int) -> list[int]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """The state that is needed to continue exactly, as plain integers."""
        return {"position": self._position, "seed": self._seed, "num_rows": self._num_rows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the position of a saved state.

        Raises:
            Refused: the state belongs to another seed or another number of rows, and so to another order.
        """
        for key, ours in (("seed", self._seed), ("num_rows", self._num_rows)):
            if state[key] != ours:
                said = f"The saved order of the rows has {key} {state[key]} and this run has {ours}"
                raise Refused(f"{said}: resume with the same data and seed, or start anew.")
        self._position = int(state["position"])


class PromptStream(_Order):
    """Gives out prompts to steps; a step may take the end of one epoch and the start of the next."""

    def __init__(self, rows: Sequence[Row], prompts_per_step: int, seed: int) -> None:
        """Start before the first epoch.

        Raises:
            Refused: there are no rows, a step has no prompts, or the seed is negative.
        """
        if len(rows) == 0:
            raise Refused("There are no prompts to train on: the data is empty. Give at least one row.")
        check_number("prompts_per_step", prompts_per_step, int, at_least=1)
        super().__init__(len(rows), prompts_per_step, seed)
        self._rows = rows

    @property
    def epoch(self) -> float:
        """Passes over the data so far (2.5 means half-way through the third)."""
        return self._position / self._num_rows

    def next(self) -> list[tuple[int, Row]]:
        """Prompts of the next step, each with its position: the number of prompts given out before it."""
        return self.take(self._size)

    def take(self, count: int) -> list[tuple[int, Row]]:
        """The next `count` prompts, each with its position.

        Raises:
            Stopped: the rows are an object of the user's own, which raised an error.
        """
        try:
            return [(position, self._rows[number]) for position, number in self._take(count)]
        except USER_CODE_FAILED as error:
            raise Stopped(f"The training prompts could not be read: {raised(error)}.") from error

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(self._num_rows).tolist()
        return order


class Batches(_Order):
    """Gives out the numbers of `num_rows` rows in batches of `size`, for supervised training."""

    _drawn = 0  # epochs whose order the generator has drawn

    def next(self) -> list[int]:
        """Return the numbers of the next batch's rows."""
        return [number for _, number in self._take(self._size)]

    def _shuffled(self, epoch: int) -> list[int]:
        if self._drawn > epoch or not self._drawn:
            self._generator, self._drawn = torch.Generator().manual_seed(self._seed), 0
        while self._drawn <= epoch:
            order = torch.randperm(self._num_rows, generator=self._generator)
            self._drawn += 1
        return order.tolist()
