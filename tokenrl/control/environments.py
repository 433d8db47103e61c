"""Gymnasium environments, many at a time: what they look like, how they are made, what is not supported.

Vector environments of gymnasium reset on the NEXT step: the step after the end of an episode ignores its
action and answers the new episode's first observation with reward 0. It is no step of anybody's, and
`rollouts` leaves it out.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from tokenrl.errors import Refused

OWN: dict[str, dict[str, Any]] = {
    "gridworld": {
        "id": "tokenrl/GridWorld-v0",
        "entry_point": "tokenrl.control.worlds.gridworld:GridWorld",
        "max_episode_steps": 50,
        "reward_threshold": 0.93,  # one step more than the shortest way
        "kwargs": {"time_limit": None},  # gymnasium's own wrapper cuts
    },
    "walk": {
        "id": "tokenrl/Walk-v0",
        "entry_point": "tokenrl.control.worlds.walk:Walk",
        "max_episode_steps": 50,
        "reward_threshold": 0.88,
        "kwargs": {"time_limit": None},
    },
    "bandit": {
        "id": "tokenrl/Bandit-v0",
        "entry_point": "tokenrl.control.worlds.bandit:Bandit",
        "max_episode_steps": 1,
    },
}
"""Environments that come with tokenrl, as gymnasium registers them, by their short names."""

for _own in OWN.values():
    if _own["id"] not in gymnasium.registry:
        gymnasium.register(**_own)


@dataclass(frozen=True)
class Spec:
    """What an agent needs to know of an environment.

    Attributes:
        env: gymnasium id.
        observation_size: numbers in an observation, flattened; a discrete one is one-hot.
        actions: how many there are; None if they are continuous.
        action_size: numbers in a continuous action; 0 if actions are discrete.
        horizon: steps after which an episode is cut.
        solved: mean return from which the environment counts as solved, if it names one.
        fast: whether it steps many copies in one call.
    """

    env: str
    observation_size: int
    actions: int | None
    action_size: int
    horizon: int
    solved: float | None
    fast: bool

    @property
    def discrete(self) -> bool:
        """Whether actions are chosen from a list."""
        return self.actions is not None


def describe(env: str, max_episode_steps: int | None = None) -> Spec:
    """Say what an environment looks like.

    Args:
        env: gymnasium id, or a name in `OWN`.
        max_episode_steps: limit in place of the environment's own.

    Raises:
        Refused: no such environment; something it needs is not installed; spaces that are not supported; no
            limit to the length of an episode.
    """
    spec = find(env)
    made = make(env, 1, max_episode_steps)
    observations, actions = made.single_observation_space, made.single_action_space
    made.close()
    return Spec(
        env=spec.id,
        observation_size=_observation_size(spec.id, observations),
        actions=int(actions.n) if isinstance(actions, spaces.Discrete) else None,
        action_size=_action_size(spec.id, actions),
        horizon=_horizon(spec, max_episode_steps),
        solved=None if spec.reward_threshold is None else float(spec.reward_threshold),
        fast=spec.vector_entry_point is not None,
    )


def find(env: str) -> EnvSpec:
    """Look an environment up in gymnasium's registry.

    Raises:
        Refused: there is none of that name, with the nearest names.
    """
    env = OWN[env]["id"] if env in OWN else env
    try:
        if ":" in env:  # gymnasium's own way to name the module that registers an environment
            importlib.import_module(env.partition(":")[0])
            env = env.partition(":")[2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions: an id is taken as it stands or refused
            return gymnasium.spec(env)
    except (gymnasium.error.Error, ImportError) as error:
        raise Refused(
            f"There is no environment {env!r} ({error}). Give a gymnasium id with its version, such as "
            f"CartPole-v1, Acrobot-v1 or LunarLander-v3, or one of {', '.join(OWN)}."
        ) from error


def make(env: str, num_envs: int, max_episode_steps: int | None = None) -> VectorEnv:
    """Make `num_envs` copies that are stepped together, by the environment's own fast path if it has one.

    Raises:
        Refused: see `describe`.
    """
    spec = find(env)
    limit = _horizon(spec, max_episode_steps)
    mode = "sync" if spec.vector_entry_point is None else "vector_entry_point"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = gymnasium.make_vec(spec.id, num_envs, vectorization_mode=mode, max_episode_steps=limit)
    except gymnasium.error.DependencyNotInstalled as error:
        extra = 'pip install "gymnasium[box2d]"' if "box2d" in str(error).lower() else "see the message"
        raise Refused(
            f"{spec.id} needs a package that is not installed ({error}). To mend: {extra}."
        ) from error
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise Refused(f"The environment {spec.id} could not be made ({error}).") from error
    if made.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP) != AutoresetMode.NEXT_STEP:
        raise Refused(f"The environment {spec.id} does not reset on the next step; give one that does.")
    return made


def _horizon(spec: EnvSpec, limit: int | None) -> int:
    limit = limit or spec.max_episode_steps
    if limit is None:
        raise Refused(
            f"Episodes of {spec.id} have no limit in length. Give one: --max-episode-steps 200 (in Python: "
            "max_episode_steps=200)."
        )
    return limit


def _observation_size(env: str, space: spaces.Space[Any]) -> int:
    if isinstance(space, (spaces.Box, spaces.Discrete)):
        return int(spaces.flatdim(space))
    raise Refused(
        f"Observations of {env} are of kind {type(space).__name__}; supported are Box (flattened) and "
        "Discrete (one-hot). Wrap the environment so that it answers one of these."
    )


def _action_size(env: str, space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Discrete):
        return 0
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return int(space.shape[0])
    raise Refused(
        f"Actions of {env} are of kind {type(space).__name__}; supported are Discrete and Box with one axis. "
        "Wrap the environment so that it takes one of these."
    )


class Environments:
    """Copies of one environment, with flat float32 observations and actions as the policy gives them."""

    def __init__(self, env: str, num_envs: int, max_episode_steps: int | None = None) -> None:
        """Make them; see `make`."""
        self.vector = make(env, num_envs, max_episode_steps)
        self.num_envs = num_envs
        self._observations: Any = self.vector.single_observation_space
        actions: Any = self.vector.single_action_space
        self._start = int(actions.start) if isinstance(actions, spaces.Discrete) else None
        if self._start is None:
            low, high = np.asarray(actions.low, np.float32), np.asarray(actions.high, np.float32)
            bounded = np.isfinite(low) & np.isfinite(high)
            self._middle = np.where(bounded, (low + high) / 2, 0.0).astype(np.float32)
            self._half = np.where(bounded, (high - low) / 2, 1.0).astype(np.float32)
            self._low, self._high = low, high

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start a new episode in every copy; returns observations [E, O]."""
        observations, _ = self.vector.reset(seed=seed)
        return self.flat(observations)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step every copy.

        Args:
            actions: [E] numbers of actions, or [E, D] where -1 and 1 are the bounds of each one; what lies
                beyond them is cut at the bounds here, and stays what it is for the policy.

        Returns:
            Observations [E, O], at the end of an episode its last one; rewards, terminated, truncated [E].
        """
        observations, rewards, terminated, truncated, _ = self.vector.step(self.translate(actions))
        return self.flat(observations), rewards, terminated, truncated

    def translate(self, actions: np.ndarray) -> np.ndarray:
        """Turn the policy's actions into the environment's."""
        if self._start is not None:
            return actions + self._start if self._start else actions
        return np.clip(self._middle + self._half * actions, self._low, self._high)

    def close(self) -> None:
        """Release what the copies hold."""
        self.vector.close()

    def flat(self, observations: np.ndarray) -> np.ndarray:
        """Turn observations of any number of copies into [copies, O]."""
        space = self._observations
        if isinstance(space, spaces.Discrete):
            return np.eye(int(space.n), dtype=np.float32)[observations - int(space.start)]
        return np.asarray(observations, np.float32).reshape(len(observations), -1)
