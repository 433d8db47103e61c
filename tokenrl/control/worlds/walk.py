"""A walk on a line, the smallest environment in which the value depends on the state."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from tokenrl.errors import Refused
from tokenrl.settings import check_number

WALK_STEPS = 50
"""Steps after which an episode of the default environment is truncated."""

STEP, STEP_REWARD = 0.1, -0.01
LAST = 11  # steps from the middle to the first place beyond 1


class Walk(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Start at 0 and step by 0.1 to the left or to the right, until x is beyond 1 or -1.

    The episode terminates at x = 1.1 with a reward of 1, and at x = -1.1 with a reward of -1. Every step,
    also the last one, has a reward of -0.01 besides, so that short paths are better. After `time_limit`
    steps the episode is truncated, unless that step terminates it. The best path is eleven steps to the
    right, with a return of 0.89; the mean return of a uniform policy is -0.46, and 76 % of its episodes are
    truncated.

    Actions: `Discrete(2)`, left, right. Observations: `Box(-1.1, 1.1, [1], float32)`, x itself.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  gymnasium's own form

    def __init__(self, *, time_limit: int | None = WALK_STEPS) -> None:
        """Make the walk.

        Args:
            time_limit: Steps until truncation; None if a wrapper such as gymnasium's TimeLimit truncates.

        Raises:
            Refused: The time limit is below 1.
        """
        if time_limit is not None:
            check_number("time_limit", time_limit, at_least=1)
        self.time_limit, self.render_mode = time_limit, None
        self.action_space = gymnasium.spaces.Discrete(2)
        end = np.float32(LAST * STEP)
        self.observation_space = gymnasium.spaces.Box(-end, end, (1,), np.float32)
        self.place, self.steps = 0, 0  # in whole steps: tenths added up in floating point miss the limit

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode at x = 0. Nothing here is random, and no options are known."""
        super().reset(seed=seed)
        self.place, self.steps = 0, 0
        return self.observe(), {}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Take one step, 0 to the left or 1 to the right.

        Returns:
            The observation, the reward, terminated, truncated, and an empty dict.

        Raises:
            Refused: The action is neither 0 nor 1.
        """
        if action not in (0, 1):
            raise Refused(f"action was given as {action!r}; it must be 0 (left) or 1 (right).")
        self.place += 2 * int(action) - 1
        self.steps += 1
        terminated = abs(self.place) >= LAST
        truncated = not terminated and self.time_limit is not None and self.steps >= self.time_limit
        reward = STEP_REWARD + (float(np.sign(self.place)) if terminated else 0.0)
        return self.observe(), reward, terminated, truncated, {}

    def observe(self) -> NDArray[np.float32]:
        """Return [x]."""
        return np.array([self.place * STEP], np.float32)
