"""An environment whose every number is known: what it answers says which step of which episode it is."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces

ID = "tokenrl-tests/Counting-v0"


class Counting(gymnasium.Env):
    """Observation [episode, step]; reward 10 * episode + steps so far; ends after `lengths[episode]`."""

    def __init__(self, lengths=(3, 1, 4, 2)):
        self.lengths = lengths
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.episode, self.steps = -1, 0

    def _answer(self):
        return np.array([self.episode, self.steps], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return self._answer(), {}

    def step(self, action):
        self.steps += 1
        reward = 10.0 * self.episode + self.steps
        return (
            self._answer(),
            reward,
            self.steps >= self.lengths[self.episode % len(self.lengths)],
            False,
            {},
        )


def register(limit=100, **options):
    """Put it into gymnasium's registry, with a time limit, and return its id."""
    gymnasium.registry.pop(ID, None)
    gymnasium.register(ID, entry_point=Counting, max_episode_steps=limit, kwargs=options)
    return ID
