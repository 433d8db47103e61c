"""Orders the rows of the data: prompts for each rollout, demonstrations or pairs for each update."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tokenrl.errors import USER_CODE_FAILED, Refused, Stopped, raised
from tokenrl.language.tasks.sources import Row
from tokenrl.settings import check_number, check_seed

FEW = 16
"""With fewer distinct training prompts a policy can learn the answers by heart."""


def few_prompts(rows: Sequence[Row]) -> list[str]:
    """Return a warning if fewer than 16 distinct prompts are left to train on, else an empty list.

    Args:
        rows: training rows with a `prompt` each.
    """
    distinct = len({json.dumps(row["prompt"], sort_keys=True, default=str) for row in rows})
    if distinct >= FEW:
        return []
    return [
        f"only {distinct} distinct prompt{'s' * (distinct != 1)} in {len(rows):,} training rows: the policy "
        "can learn the answers by heart, which says nothing about other prompts. Give more data, or options "
        "of the task that make more."
    ]


class PromptStream:
    """Gives out prompts to steps without end: each epoch has a new random order and holds every row once.

    The order of epoch e depends on (seed, e) alone, so the number of prompts given out so far is the whole
    state. A step may take the end of one epoch and the start of the next.
    """

    def __init__(self, rows: Sequence[Row], prompts_per_step: int, seed: int) -> None:
        """Start before the first epoch.

        Raises:
            Refused: there are no rows, a step has no prompts, or the seed is negative.
        """
        if len(rows) == 0:
            raise Refused("There are no prompts to train on: the data is empty. Give at least one row.")
        check_number("prompts_per_step", prompts_per_step, int, at_least=1)
        check_seed(seed)
        self._rows = rows
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._position = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())

    @property
    def epoch(self) -> float:
        """Passes over the data so far (2.5 means half-way through the third)."""
        return self._position / len(self._rows)

    def next(self) -> list[tuple[int, Row]]:
        """Prompts of the next step, each with its position: the number of prompts given out before it."""
        return self.take(self._prompts_per_step)

    def take(self, count: int) -> list[tuple[int, Row]]:
        """The next `count` prompts, each with its position.

        Raises:
            Stopped: the rows are an object of the user's own, which raised an error.
        """
        positions = range(self._position, self._position + count)
        self._position = positions.stop
        try:
            return [(position, self._rows[self._index(position)]) for position in positions]
        except USER_CODE_FAILED as error:
            raise Stopped(f"The training prompts could not be read: {raised(error)}.") from error

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self._rows))
        if self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, generator.permutation(len(self._rows)).tolist())
        return self._order[1][place]

    def state_dict(self) -> dict[str, int]:
        """The state that is needed to continue exactly, as plain integers."""
        return {"position": self._position, "seed": self._seed, "num_rows": len(self._rows)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the position of a saved state.

        Raises:
            Refused: the state belongs to another seed or another number of rows, and so to another order.
        """
        _check_same_order(state, self.state_dict())
        self._position = int(state["position"])


class Batches:
    """Gives out row numbers in batches without end: no row comes twice before all have come once.

    A batch may take the end of one epoch and the start of the next. The order of all epochs follows from the
    seed, so the number of rows given out so far is the whole state.
    """

    def __init__(self, rows: int, size: int, seed: int) -> None:
        """Start before the first epoch of `rows` rows, in batches of `size`."""
        self._rows, self._size, self._seed = rows, size, seed
        self._generator = torch.Generator().manual_seed(seed)
        self._given = 0
        self._left: list[int] = []

    def next(self) -> list[int]:
        """Return the numbers of the next batch's rows."""
        while len(self._left) < self._size:
            self._left += torch.randperm(self._rows, generator=self._generator).tolist()
        batch, self._left = self._left[: self._size], self._left[self._size :]
        self._given += self._size
        return batch

    def state_dict(self) -> dict[str, int]:
        """The state that is needed to continue exactly, as plain integers."""
        return {"given": self._given, "seed": self._seed, "num_rows": self._rows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the rows that a saved state has given out; their epochs are shuffled again.

        Raises:
            Refused: the state belongs to another seed or another number of rows, and so to another order.
        """
        _check_same_order(state, self.state_dict())
        self._given, order = int(state["given"]), torch.empty(0)
        self._generator.manual_seed(self._seed)
        epochs = -(-self._given // self._rows)
        for _ in range(epochs):
            order = torch.randperm(self._rows, generator=self._generator)
        left = epochs * self._rows - self._given
        self._left = order[self._rows - left :].tolist()


def _check_same_order(saved: Mapping[str, int], own: Mapping[str, int]) -> None:
    for key in ("seed", "num_rows"):
        if saved[key] != own[key]:
            raise Refused(
                f"The saved order of the rows has {key} {saved[key]} and this run has {own[key]}, so the run "
                "would continue with other rows. Resume with the same data and seed, or start anew."
            )
