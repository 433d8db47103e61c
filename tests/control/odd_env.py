"""An environment of a user with any spaces."""

from __future__ import annotations

import gymnasium
from gymnasium import spaces

ID = "tokenrl-tests/Odd-v0"
TWO, THREE = spaces.Discrete(2), spaces.Discrete(3)


def register_odd(observations, actions=TWO, answer=None):
    """Register an environment with these spaces and this answer, and return its id."""

    class Odd(gymnasium.Env):
        observation_space, action_space = observations, actions

        def reset(self, *, seed=None, options=None):
            return answer, {}

        def step(self, action):
            return answer + 1, float(action), False, False, {}

    gymnasium.registry.pop(ID, None)
    gymnasium.register(ID, entry_point=Odd, max_episode_steps=3, disable_env_checker=True)
    return ID
