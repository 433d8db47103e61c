"""Computes the expected returns of the grid worlds exactly, for `2_gridworld.py` and `entropy.py`."""

from __future__ import annotations

import numpy as np

from tokenrl.control import GridWorld

STEPS = 50
"""Steps after which an episode in `gridworld` and `trap` is truncated."""


def values_of(grid: GridWorld, policy: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """Return the expected return from each cell, [cells]; 0 where an episode ends.

    `V(s) = sum_a pi(a|s) (r(s, a) + V(s'))` is iterated once per step from V = 0, because there are no rewards
    after truncation.

    Args:
        grid: The grid.
        policy: [cells, 4]; each row holds the probabilities of the four actions in a cell.
        steps: Number of steps still to take.
    """
    bonus = np.zeros(grid.cells)
    bonus[list(grid.ends)] = list(grid.ends.values())
    alive = ~np.isin(np.arange(grid.cells), list(grid.ends))
    values = np.zeros(grid.cells)
    for _ in range(steps):
        values = alive * (policy * (grid.step_reward + (bonus + values)[grid.next_cells])).sum(1)
    return values
