"""The sigmoid bandit: two actions with fixed rewards, and nothing to observe.

A policy with one parameter theta takes the first action with probability sigmoid(theta). An episode is one
action, or T actions in a row that share theta (`steps`). Mean and variance of its gradient are known in
closed form, which `recipes/control_1_bandit.py` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from tokenrl.errors import Refused

REWARDS = (1.0, 0.0)
"""Rewards of the first action (index 0) and the second (index 1)."""


class Bandit(gymnasium.Env[np.ndarray, np.int64]):
    """The bandit as an environment.

    Attributes:
        observation_space: [1], float32; the observation is always 1, as a linear policy needs it.
        action_space: 0 and 1, the first action and the second.
        rewards: rewards of the two actions.
        steps: number of actions after which the episode terminates; it is never truncated.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, gymnasium declares it so

    def __init__(self, rewards: Sequence[float] = REWARDS, steps: int = 1) -> None:
        """Make the bandit.

        Args:
            rewards: rewards of the first and the second action.
            steps: T, the number of actions of an episode.

        Raises:
            Refused: there are not two rewards.
        """
        if len(rewards) != 2:
            raise Refused(
                f"rewards were given as {rewards!r}; the bandit has two actions. Give one number for each, "
                "such as (1.0, 0.0)."
            )
        self.rewards, self.steps = (float(rewards[0]), float(rewards[1])), steps
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(2)
        self._left = steps  # actions until the end

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; the seed changes nothing, since nothing here is random."""
        super().reset(seed=seed)
        self._left = self.steps
        return np.ones(1, np.float32), {}

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take an action; return observation, reward, terminated, truncated and an empty info."""
        self._left -= 1
        return np.ones(1, np.float32), self.rewards[action], self._left == 0, False, {}
