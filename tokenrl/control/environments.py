"""Describes gymnasium environments and steps many copies of one; refuses those in which no policy can act.

Vector environments of gymnasium reset on the NEXT step: the step after the end of an episode ignores its
action and returns the first observation of a new episode, with reward 0. Such a step belongs to no episode,
and `rollouts` leaves it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from tokenrl.control.failures import close, failed, refusing
from tokenrl.control.registered import find
from tokenrl.errors import USER_CODE_FAILED, Refused
from tokenrl.settings import check_number

PICTURE = 1024
"""A Box with several axes is a picture if its numbers are bytes (uint8), or if they are more than these.

Flattened, a picture would be thousands of inputs that do not know which of them are neighbours. A Box with
one axis is never a picture, so `gymnasium.wrappers.FlattenObservation` still lets a user flatten any Box.
"""
REGISTER = "Write a file that registers it in a wrapper{}, and give it as --env my_envs.py:Mine-v0."


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
    close(spec.id, made)
    return Spec(
        env=spec.id,
        observation_size=int(spaces.flatdim(observations)),
        actions=int(actions.n) if isinstance(actions, spaces.Discrete) else None,
        action_size=0 if isinstance(actions, spaces.Discrete) else int(spaces.flatdim(actions)),
        horizon=_horizon(spec, max_episode_steps),
        solved=None if spec.reward_threshold is None else float(spec.reward_threshold),
        fast=spec.vector_entry_point is not None,
    )


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
    _check_observations(spec.id, made.single_observation_space)
    _check_actions(spec.id, made.single_action_space)
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


def _check_observations(env: str, space: spaces.Space[Any]) -> None:
    if not isinstance(space, (spaces.Box, spaces.Discrete)):
        raise Refused(
            f"Observations of {env} are of kind {type(space).__name__}; supported are Box (flattened) and "
            "Discrete (one-hot). "
            + REGISTER.format(" that returns one of these, such as gymnasium.wrappers.FlattenObservation")
        )
    shape = space.shape or ()
    if len(shape) > 1 and (space.dtype == np.uint8 or math.prod(shape) > PICTURE):
        raise Refused(
            f"Observations of {env} are pictures (Box, shape {' x '.join(map(str, shape))}, dtype "
            f"{space.dtype}), and the policies here have no convolutional layers. "
            + REGISTER.format(" that returns features instead (gymnasium.wrappers.TransformObservation)")
            + " Atari games have obs_type='ram' for this. If the numbers are no picture, the wrapper "
            f"gymnasium.wrappers.FlattenObservation makes a vector of all {math.prod(shape):,}."
        )


def _check_actions(env: str, space: spaces.Space[Any]) -> None:
    real = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if not isinstance(space, spaces.Discrete) and not (real and len(space.shape or ()) == 1):
        raise Refused(
            f"Actions of {env} are {space!s:.200}; supported are Discrete, and a Box of real numbers with "
            "one axis. "
            + REGISTER.format(" that takes one of these, such as gymnasium.wrappers.TransformAction")
        )


class Environments:
    """Copies of one environment: observations are flat float32 vectors, actions are those of a policy.

    gymnasium's own wrappers for vectors go over the copies one by one, or need bounds on both sides.
    """

    def __init__(
        self,
        env: str,
        num_envs: int,
        max_episode_steps: int | None = None,
        *,
        vector: VectorEnv | None = None,
    ) -> None:
        """Make the copies (see `make`), or take those of a `vector`."""
        self.vector = vector or make(env, num_envs, max_episode_steps)
        self.env, self.num_envs = find(env).id, num_envs
        self._observations: Any = self.vector.single_observation_space
        actions: Any = self.vector.single_action_space
        self._start = int(actions.start) if isinstance(actions, spaces.Discrete) else None
        if self._start is None:
            self._low, self._high = np.asarray(actions.low, np.float32), np.asarray(actions.high, np.float32)
            bounded = np.isfinite(self._low) & np.isfinite(self._high)
            least, most = np.where(bounded, self._low, -1.0), np.where(bounded, self._high, 1.0)
            self._middle = ((least + most) / 2).astype(np.float32)
            self._half = ((most - least) / 2).astype(np.float32)

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start a new episode in every copy; return the observations [E, O].

        Raises:
            Stopped: the environment raised an error.
        """
        try:
            return self.flat(self.vector.reset(seed=seed)[0])
        except USER_CODE_FAILED as error:
            raise failed(self.env, "reset", error) from error

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
        except USER_CODE_FAILED as error:
            raise failed(self.env, "step", error) from error

    def translate(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions of the policy to actions of the environment."""
        if self._start is not None:
            return actions + self._start if self._start else actions
        return np.clip(self._middle + self._half * actions, self._low, self._high)

    def flat(self, observations: np.ndarray) -> np.ndarray:
        """Flatten the observations of E copies to [E, O]."""
        space = self._observations
        if isinstance(space, spaces.Discrete):
            return np.eye(int(space.n), dtype=np.float32)[observations - int(space.start)]
        return np.asarray(observations, np.float32).reshape(len(observations), -1)

    def close(self) -> None:
        """Close the copies."""
        close(self.env, self.vector)
