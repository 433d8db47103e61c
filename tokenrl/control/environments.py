"""Finds and describes gymnasium environments, and steps many copies of one.

An environment whose spaces fit no policy here is refused.

Vector environments of gymnasium reset on the NEXT step: the step after the end of an episode ignores its
action and returns the first observation of a new episode, with reward 0. Such a step belongs to no episode,
and `rollouts` leaves it out. Whatever the code of an environment raises, also sys.exit, is reported as a
failure of that environment, by its name.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from tokenrl.errors import USER_CODE_FAILED, Refused, Stopped, nearest, raised
from tokenrl.names import import_source
from tokenrl.settings import LARGEST
from tokenrl.user_code import user_code

WORLDS = "tokenrl.control.worlds"
GRID = f"{WORLDS}:GridWorld"
WALK = f"{WORLDS}:Walk"
TRAP = {"size": 6, "decoy": 1, "decoy_reward": 0.5}
OWN: dict[str, tuple[str, str, int, float | None, dict[str, Any]]] = {
    # The threshold of the grid is the return of a path one step longer than the shortest.
    "gridworld": ("tokenrl/GridWorld-v0", GRID, 50, 0.93, {}),
    # Between the return of the decoy, 0.49, and that of the goal, at most 0.9.
    "trap": ("tokenrl/Trap-v0", GRID, 50, 0.8, TRAP),
    # The return of the straight path.
    "walk": ("tokenrl/Walk-v0", WALK, 50, 1.1, {}),
    # The return of a path two steps longer than the shortest.
    "costly_walk": (
        "tokenrl/CostlyWalk-v0",
        WALK,
        50,
        0.88,
        {"step_reward": -0.01},
    ),
    "bandit": ("tokenrl/Bandit-v0", f"{WORLDS}:Bandit", 1, None, {}),
}
"""The environments of tokenrl by their short names: id, class, most steps, threshold, and its arguments."""
PICTURE = 1024
"""A Box with several axes is a picture if its numbers are bytes (uint8), or if they are more than these.

A flattened picture is thousands of inputs, and the network cannot see which of them lie side by side. A Box
with one axis is never a picture, so with `gymnasium.wrappers.FlattenObservation` a user can flatten any Box.
"""
REGISTER = (
    "Register it in a wrapper in a file, and give --env my_envs.py:Mine-v0: gymnasium.wrappers.{}."
)

for _id, _class, _steps, _threshold, _arguments in OWN.values():
    if _id not in gymnasium.registry:
        gymnasium.register(
            _id, _class, reward_threshold=_threshold, max_episode_steps=_steps, kwargs=_arguments
        )


def find(env: str) -> EnvSpec:
    """Look an environment up in gymnasium's registry.

    Args:
        env: a name in `OWN`, the id of a gymnasium environment, or that of one which a file or module
            registers: `path/to/file.py:id` or `package.module:id`. A module may lie in the
            current directory.

    Raises:
        Refused: there is no environment of that name, or the file or module cannot be imported.
    """
    if not isinstance(env, str):
        raise Refused(
            f"env was given as a {type(env).__name__}; give the id under which it is registered."
        )
    if env in OWN:
        return gymnasium.spec(OWN[env][0])
    source, _, name = env.rpartition(":")
    if source:
        import_source(source, "env")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium warns of older versions
            return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        if source:
            raise Refused(
                f"env '{env}': {source} registers no environment {name!r}.{nearest(name, gymnasium.registry)} "
                f"Call gymnasium.register({name!r}, ...) in it."
            ) from error
        reason = str(error).partition(" Did you mean")[0].rstrip(".")
        raise Refused(
            f"There is no environment {env!r} ({reason}).{nearest(name, [*OWN, *gymnasium.registry])} Give a "
            f"gymnasium id with its version (CartPole-v1), one of {', '.join(OWN)}, or my_envs.py:Mine-v0."
        ) from error


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
        render_modes: how the environment can draw itself.
    """

    env: str
    observation_size: int
    actions: int | None
    action_size: int
    horizon: int
    solved: float | None
    fast: bool
    render_modes: tuple[str, ...] = ()

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
    with contextlib.closing(Environments(env, 1, max_episode_steps)) as envs:
        observations = envs.vector.single_observation_space
        actions = envs.vector.single_action_space
        modes = envs.vector.metadata.get("render_modes", ())
    discrete = isinstance(actions, spaces.Discrete)
    size = int(spaces.flatdim(actions))
    return Spec(
        env=spec.id,
        observation_size=int(spaces.flatdim(observations)),
        actions=size if discrete else None,
        action_size=0 if discrete else size,
        horizon=_horizon(spec, max_episode_steps),
        solved=None if spec.reward_threshold is None else float(spec.reward_threshold),
        fast=spec.vector_entry_point is not None,
        render_modes=tuple(modes),
    )


def make(env: str, num_envs: int, max_episode_steps: int | None = None) -> VectorEnv:
    """Make `num_envs` copies that are stepped together, by the environment's own vector code if it has any.

    Raises:
        Refused: the environment cannot be made; see `describe`.
    """
    spec = find(env)
    limit = _horizon(spec, max_episode_steps)
    mode = "sync" if spec.vector_entry_point is None else "vector_entry_point"
    try:
        with warnings.catch_warnings(), user_code():
            warnings.simplefilter("ignore")
            vector = gymnasium.make_vec(
                spec.id, num_envs, vectorization_mode=mode, max_episode_steps=limit
            )
    except USER_CODE_FAILED as error:
        raise Refused(f"The environment {spec.id} could not be made: {raised(error)}.") from error
    if vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP) != AutoresetMode.NEXT_STEP:
        raise Refused(
            f"The environment {spec.id} does not reset on the next step; give one that does."
        )
    observations = vector.single_observation_space
    actions = vector.single_action_space
    shape = observations.shape or ()
    if not isinstance(observations, (spaces.Box, spaces.Discrete)):
        raise Refused(
            f"Observations of {spec.id} are of kind {type(observations).__name__}; supported are Box "
            f"(flattened), Discrete (one-hot). {REGISTER.format('FlattenObservation')}"
        )
    if len(shape) > 1 and (observations.dtype == np.uint8 or math.prod(shape) > PICTURE):
        size = " x ".join(map(str, shape))
        wrapper = "TransformObservation (features), or FlattenObservation if they are no picture"
        raise Refused(
            f"Observations of {spec.id} are pictures (Box, shape {size}, dtype {observations.dtype}), and no "
            f"policy here has convolutional layers. {REGISTER.format(wrapper)}"
        )
    real = isinstance(actions, spaces.Box) and np.issubdtype(actions.dtype, np.floating)
    is_vector = real and len(actions.shape or ()) == 1
    if not (is_vector or isinstance(actions, spaces.Discrete)):
        raise Refused(
            f"Actions of {spec.id} are {actions!s:.200}; supported are Discrete, and a Box of real numbers with "
            f"one axis. {REGISTER.format('TransformAction')}"
        )
    return vector


def _horizon(spec: EnvSpec, limit: int | None) -> int:
    limit = limit or spec.max_episode_steps
    if limit is None:
        raise Refused(
            f"Episodes of {spec.id} have no limit in length. Set one: --max-episode-steps 200."
        )
    return limit


class Environments:
    """Copies of one environment: observations are flat float32 vectors, actions come from a policy.

    gymnasium's own wrappers for vectors go over the copies one by one, or need bounds on both sides.
    """

    def __init__(
        self, env: str, num_envs: int, limit: int | None = None, *, vector: VectorEnv | None = None
    ) -> None:
        """Make the copies, of at most `limit` steps an episode (see `make`), or take those of a `vector`."""
        self.vector = vector or make(env, num_envs, limit)
        spec = find(env)
        self.env = spec.id
        # Those of gymnasium and tokenrl leave settings and processes alone, and a step should cost little.
        is_library = str(spec.entry_point).startswith(("gymnasium.", "tokenrl."))
        self._in_context = contextlib.nullcontext if is_library else user_code
        self.num_envs = num_envs
        self._observations: Any = self.vector.single_observation_space
        self._actions: Any = self.vector.single_action_space
        if isinstance(self._actions, spaces.Box):
            low = self._actions.low.astype(np.float64)
            high = self._actions.high.astype(np.float64)
            # Where a bound is missing, -1 and 1 stand for themselves.
            bounded = (np.abs(low) <= LARGEST) & (np.abs(high) <= LARGEST)
            low = np.where(bounded, low, -1.0)
            high = np.where(bounded, high, 1.0)
            self._middle = (low + high) / 2
            self._half = (high - low) / 2

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start a new episode in every copy; return the observations [E, O].

        Raises:
            Stopped: the environment raised an error.
        """
        with self._failures("reset"):
            return self.flat(self.vector.reset(seed=seed)[0])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step every copy.

        Args:
            actions: indices of discrete actions [E], or continuous actions [E, D], in which -1 and 1 stand
                for the bounds of the action space. They are clipped to the bounds only for the
                environment; the policy is trained on the unclipped actions.

        Returns:
            Observations [E, O], where the last of an episode is its final one; rewards, terminated and
            truncated, each [E]. They are copies, since an environment may write into the same memory again.

        Raises:
            Stopped: the environment raised an error.
        """
        with self._failures("step"):
            observations, *columns = self.vector.step(self.translate(actions))
            rewards, terminated, truncated = map(np.array, columns[:3])
            return self.flat(observations), rewards, terminated, truncated

    @contextlib.contextmanager
    def _failures(self, method: str) -> Iterator[None]:
        """Run the environment's own code, and report an error of it by its name."""
        try:
            with self._in_context():
                yield
        except USER_CODE_FAILED as error:
            text = f"The environment {self.env} failed in {method}(): {raised(error)}."
            raise Stopped(text) from error

    def translate(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions of the policy to actions of the environment."""
        space = self._actions
        if isinstance(space, spaces.Discrete):
            return actions + int(space.start)
        scaled = self._middle + self._half * actions
        return np.clip(scaled, space.low, space.high).astype(space.dtype)

    def flat(self, observations: np.ndarray) -> np.ndarray:
        """Flatten the observations of E copies to [E, O]."""
        space = self._observations
        if isinstance(space, spaces.Discrete):
            return np.eye(int(space.n), dtype=np.float32)[observations - int(space.start)]
        return np.array(observations, np.float32).reshape(len(observations), -1)

    def close(self) -> None:
        """Close the copies. An error is only a warning, because they are not needed any more."""
        try:
            with self._failures("close"):
                self.vector.close()
        except Stopped as error:
            warnings.warn(str(error), stacklevel=2)
