"""Describes and makes gymnasium environments, many copies at a time; refuses those not supported.

Vector environments of gymnasium reset on the NEXT step: the step after the end of an episode ignores its
action and returns the first observation of a new episode, with reward 0. Such a step belongs to no episode,
and `rollouts` leaves it out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from tokenrl.control.failures import raised, refusing
from tokenrl.control.spaces import action_size, observation_size
from tokenrl.errors import Refused, Stopped, nearest, suggest
from tokenrl.names import import_source
from tokenrl.settings import check_number

OWN: dict[str, dict[str, Any]] = {
    "gridworld": {
        "id": "tokenrl/GridWorld-v0",
        "entry_point": "tokenrl.control.worlds.gridworld:GridWorld",
        "max_episode_steps": 50,
        "reward_threshold": 0.93,  # the return of a path one step longer than the shortest
        "kwargs": {"time_limit": None},  # gymnasium's wrapper truncates episodes
    },
    "trap": {
        "id": "tokenrl/Trap-v0",
        "entry_point": "tokenrl.control.worlds.gridworld:GridWorld",
        "max_episode_steps": 50,
        "reward_threshold": 0.8,  # between the return of the decoy, 0.49, and that of the goal, at most 0.9
        "kwargs": {"size": 6, "decoy": 1, "decoy_reward": 0.5, "time_limit": None},
    },
    "walk": {
        "id": "tokenrl/Walk-v0",
        "entry_point": "tokenrl.control.worlds.walk:Walk",
        "max_episode_steps": 50,
        "reward_threshold": 1.1,  # the return of the straight path
        "kwargs": {"time_limit": None},
    },
    "costly_walk": {
        "id": "tokenrl/CostlyWalk-v0",
        "entry_point": "tokenrl.control.worlds.walk:Walk",
        "max_episode_steps": 50,
        "reward_threshold": 0.88,  # the return of a path two steps longer than the shortest
        "kwargs": {"time_limit": None, "step_reward": -0.01},
    },
    "bandit": {
        "id": "tokenrl/Bandit-v0",
        "entry_point": "tokenrl.control.worlds.bandit:Bandit",
        "max_episode_steps": 1,
    },
}
"""The environments of tokenrl by their short names, with the arguments to register them in gymnasium."""

_IMPORTED: dict[str, set[str]] = {}
"""By file or module that was imported for an environment, the ids that it registered."""

for _own in OWN.values():
    if _own["id"] not in gymnasium.registry:
        gymnasium.register(**_own)


@dataclass(frozen=True)
class Spec:
    """The facts about an environment that an agent needs.

    Attributes:
        env: id of the gymnasium environment.
        observation_size: O, the length of an observation, flattened; a discrete observation is one-hot.
        actions: A, the number of discrete actions; None if actions are continuous.
        action_size: D, the length of a continuous action; 0 if actions are discrete.
        horizon: number of steps after which an episode is truncated.
        solved: mean return from which the environment counts as solved; None if it has no such threshold.
        fast: whether one call steps many copies; else they are stepped one by one.
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
        """Whether actions are chosen from a finite list."""
        return self.actions is not None

    @property
    def head(self) -> Literal["softmax", "gaussian"]:
        """The kind of distribution that gives such actions."""
        return "softmax" if self.discrete else "gaussian"


def describe(env: str, max_episode_steps: int | None = None) -> Spec:
    """Return the facts about an environment.

    Args:
        env: id of a gymnasium environment; see `find`.
        max_episode_steps: limit of an episode's length that replaces the environment's own.

    Raises:
        Refused: the environment does not exist, needs a package that is not installed, has spaces that are
            not supported, or does not limit the length of an episode.
    """
    spec = find(env)
    made = make(env, 1, max_episode_steps)
    observations, actions = made.single_observation_space, made.single_action_space
    made.close()
    return Spec(
        env=spec.id,
        observation_size=observation_size(spec.id, observations),
        actions=int(actions.n) if isinstance(actions, spaces.Discrete) else None,
        action_size=action_size(spec.id, actions),
        horizon=_horizon(spec, max_episode_steps),
        solved=None if spec.reward_threshold is None else float(spec.reward_threshold),
        fast=spec.vector_entry_point is not None,
    )


def find(env: str) -> EnvSpec:
    """Look an environment up in gymnasium's registry.

    Args:
        env: a name in `OWN`, the id of a gymnasium environment, or that of one which a file or module
            registers: `path/to/file.py:id` or `package.module:id`. It is imported once in a process; a
            module may lie in the current directory.

    Raises:
        Refused: there is no environment of that name, or the file or module cannot be imported.
    """
    if not isinstance(env, str):
        raise Refused(f"env was given as a {type(env).__name__}; give the id under which it is registered.")
    source, _, name = OWN.get(env, {"id": env})["id"].rpartition(":")
    added = _imported(source, f"env '{env}'") if source else set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about older versions: the id given is used
            return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        if source:
            hint = suggest(name, added) if added else f" Call gymnasium.register({name!r}, ...) in it."
            raise Refused(f"env '{env}': {source} registers no environment {name!r}.{hint}") from error
        reason = str(error).partition(" Did you mean")[0].rstrip(".")
        raise Refused(
            f"There is no environment {env!r} ({reason}).{nearest(name, [*OWN, *gymnasium.registry])} Give a "
            "gymnasium id with its version, such as CartPole-v1, Acrobot-v1 or LunarLander-v3, one of "
            f"{', '.join(OWN)}, or your own, as my_envs.py:Mine-v0 if my_envs.py registers Mine-v0."
        ) from error


def _imported(source: str, whose: str) -> set[str]:
    """Import a file or module, unless that was done before; return the ids that it registered."""
    key = str(Path(source).resolve()) if source.endswith(".py") else source
    if key not in _IMPORTED:
        before = dict(gymnasium.registry)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Overriding environment")  # imported before by another name
            import_source(source, whose)
        _IMPORTED[key] = {name for name, spec in gymnasium.registry.items() if before.get(name) is not spec}
    return _IMPORTED[key]


def make(env: str, num_envs: int, max_episode_steps: int | None = None) -> VectorEnv:
    """Make `num_envs` copies that are stepped together, by the environment's own vector code if it has any.

    Raises:
        Refused: the environment cannot be made; see `describe`.
    """
    spec = find(env)
    check_number("num_envs", num_envs, int, at_least=1)
    limit = _horizon(spec, max_episode_steps)
    mode = "sync" if spec.vector_entry_point is None else "vector_entry_point"
    with refusing(spec.id):
        made = gymnasium.make_vec(spec.id, num_envs, vectorization_mode=mode, max_episode_steps=limit)
    if made.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP) != AutoresetMode.NEXT_STEP:
        raise Refused(f"The environment {spec.id} does not reset on the next step; give one that does.")
    observation_size(spec.id, made.single_observation_space)
    action_size(spec.id, made.single_action_space)
    return made


def _horizon(spec: EnvSpec, limit: int | None) -> int:
    if limit is not None:
        check_number("max_episode_steps", limit, int, at_least=1)
        return limit
    if spec.max_episode_steps is None:
        raise Refused(
            f"Episodes of {spec.id} have no limit in length. Set one: --max-episode-steps 200 (in Python: "
            "max_episode_steps=200)."
        )
    return spec.max_episode_steps


class Environments:
    """Copies of one environment: observations are flat float32 vectors, actions are those of a policy."""

    def __init__(self, env: str, num_envs: int, max_episode_steps: int | None = None) -> None:
        """Make the copies; see `make`."""
        self.vector = make(env, num_envs, max_episode_steps)
        self.env, self.num_envs = find(env).id, num_envs
        self._observations: Any = self.vector.single_observation_space
        actions: Any = self.vector.single_action_space
        self._start = int(actions.start) if isinstance(actions, spaces.Discrete) else None
        if self._start is None:
            low, high = np.asarray(actions.low, np.float32), np.asarray(actions.high, np.float32)
            bounded = np.isfinite(low) & np.isfinite(high)
            least, most = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
            self._middle = ((least + most) / 2).astype(np.float32)
            self._half = ((most - least) / 2).astype(np.float32)
            self._low, self._high = low, high

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start a new episode in every copy; return the observations [E, O].

        Raises:
            Stopped: the environment raised an error.
        """
        try:
            return self.flat(self.vector.reset(seed=seed)[0])
        except Exception as error:
            raise Stopped(f"The environment {self.env} failed in reset(): {raised(error)}.") from error

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step every copy.

        Args:
            actions: indices of discrete actions [E], or continuous actions [E, D], in which -1 and 1 stand
                for the bounds of the action space. They are clipped to the bounds only for the
                environment; the policy is trained on the unclipped actions.

        Returns:
            Observations [E, O], where the last of an episode is its final one; rewards, terminated and
            truncated, each [E].

        Raises:
            Stopped: the environment raised an error.
        """
        try:
            observations, rewards, terminated, truncated, _ = self.vector.step(self.translate(actions))
            return self.flat(observations), rewards, terminated, truncated
        except Exception as error:
            strange = (
                "" if np.isfinite(actions).all() else " Its observations before were not finite numbers."
            )
            raise Stopped(
                f"The environment {self.env} failed in step(): {raised(error)}.{strange}"
            ) from error

    def translate(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions of the policy to actions of the environment."""
        if self._start is not None:
            return actions + self._start if self._start else actions
        return np.clip(self._middle + self._half * actions, self._low, self._high)

    def close(self) -> None:
        """Close the copies."""
        self.vector.close()

    def flat(self, observations: np.ndarray) -> np.ndarray:
        """Flatten the observations of E copies to [E, O]."""
        space = self._observations
        if isinstance(space, spaces.Discrete):
            return np.eye(int(space.n), dtype=np.float32)[observations - int(space.start)]
        return np.asarray(observations, np.float32).reshape(len(observations), -1)
