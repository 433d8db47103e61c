"""A walk on a line, the smallest environment in which the value depends on the state."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

WALK_STEPS = 50
"""Steps after which an episode of the default environment is truncated."""

STEP = 0.1
LAST = 11  # steps from the middle to the first place beyond 1


class Walk(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Start at x = 0 and step by 0.1 to the left or to the right, until x is beyond 1 or -1.

    The step to x = 1.1 has a reward of 1, the step to x = -1.1 a reward of -1, and both end the episode
    (terminated). Every other step has the reward `step_reward`. After `time_limit` steps the episode is
    truncated, unless that step terminates it.

    By default a step pays 0.01. Standing about for the whole episode returns 0.5, the straight path of eleven
    steps to the right 1.1, and a path to the right that dawdles even more, 1.48 at most. A uniform policy
    returns 0.459, and 76 % of its episodes are truncated. With a step reward of -0.01, which is the
    environment `costly_walk`, standing about costs as much as it pays here; the best is the straight path,
    with a return of 0.9.

    Actions: `Discrete(2)`, left, right. Observations: `Box(-1.1, 1.1, [4], float32)`, which are (x, 0, 0, 0).
    """

    metadata = {"render_modes": []}  # noqa: RUF012  gymnasium's own form

    def __init__(self, *, step_reward: float = 0.01, time_limit: int | None = WALK_STEPS) -> None:
        """Make the walk.

        Args:
            step_reward: Reward of each step that does not end the episode at either end.
            time_limit: Steps until truncation; None if a wrapper such as gymnasium's TimeLimit truncates.
        """
        self.step_reward, self.time_limit, self.render_mode = step_reward, time_limit, None
        self.action_space = gymnasium.spaces.Discrete(2)
        end = np.float32(LAST * STEP)
        self.observation_space = gymnasium.spaces.Box(-end, end, (4,), np.float32)
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
        """
        self.place += 2 * int(action) - 1
        self.steps += 1
        terminated = abs(self.place) >= LAST
        truncated = not terminated and self.time_limit is not None and self.steps >= self.time_limit
        reward = float(np.sign(self.place)) if terminated else self.step_reward
        return self.observe(), reward, terminated, truncated, {}

    def observe(self) -> NDArray[np.float32]:
        """Return (x, 0, 0, 0)."""
        return np.array([self.place * STEP, 0, 0, 0], np.float32)
