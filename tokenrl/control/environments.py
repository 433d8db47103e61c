"""Finds and describes gymnasium environments, and steps many copies of one.

An environment whose spaces fit no policy here is refused.

Vector environments of gymnasium reset on the NEXT step: the step after the end of an episode ignores its
action and returns the first observation of a new episode, with reward 0. Such a step belongs to no episode,
and `rollouts` leaves it out. Whatever the code of an environment raises, also sys.exit, is reported as a
failure of that environment, by its name.

An environment may say which of its discrete actions are allowed: by a method `action_masks()` of its own or of a
wrapper, which sb3-contrib reads too, or by `info["action_mask"]`, as gymnasium's Taxi does. The method goes first,
as it may be a wrapper's correction. Vector code of an environment gives the masks of all copies as the latter.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from tokenrl.errors import Refused, Stopped, TokenrlError, refusing
from tokenrl.names import import_source
from tokenrl.settings import LARGEST
from tokenrl.user_code import guarded, user_code

TRAP = {"size": 6, "decoy": 1, "decoy_reward": 0.5}
OWN: dict[str, tuple[str, int, float | None, dict[str, Any]]] = {
    # The threshold of the grid is the return of a path one step longer than the shortest.
    "gridworld": ("GridWorld", 50, 0.93, {}),
    # Between the return of the decoy, 0.49, and that of the goal, at most 0.9.
    "trap": ("GridWorld", 50, 0.8, TRAP),
    # The return of the straight path.
    "walk": ("Walk", 50, 1.1, {}),
    # The return of a path two steps longer than the shortest.
    "costly_walk": ("Walk", 50, 0.88, {"step_reward": -0.01}),
    "bandit": ("Bandit", 1, None, {}),
}
"""The environments of tokenrl by their ids: class, most steps of an episode, threshold, and arguments."""
REGISTER = (
    "Register it in a wrapper in a file, and give --env my_envs.py:Mine-v0: gymnasium.wrappers."
)

for _id, (_class, _steps, _threshold, _arguments) in OWN.items():
    gymnasium.register(
        _id,
        f"tokenrl.control.worlds:{_class}",
        reward_threshold=_threshold,
        max_episode_steps=_steps,
        kwargs=_arguments,
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
    source, _, name = env.rpartition(":")
    remedy = f"Give a gymnasium id with its version (CartPole-v1), one of {', '.join(OWN)}, or my_envs.py:Mine-v0."
    if source:
        import_source(source, "env")
        remedy = f"Call gymnasium.register({name!r}, ...) in {source}."
    with warnings.catch_warnings(), refusing(f"There is no environment {env!r}", remedy):
        warnings.simplefilter("ignore")  # gymnasium warns of older versions
        return gymnasium.spec(name)


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
        masked: whether the environment says which actions are allowed.
    """

    env: str
    observation_size: int
    actions: int | None
    action_size: int
    horizon: int
    solved: float | None
    fast: bool
    masked: bool = False

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
            not supported, does not limit the length of an episode, or cannot be reset.
    """
    spec = find(env)
    with contextlib.closing(Environments(env, 1, max_episode_steps)) as envs:
        observations = envs.vector.single_observation_space
        actions = envs.vector.single_action_space
        envs.reset(0, Refused)  # masks of actions may stand in what a reset returns
    discrete = isinstance(actions, spaces.Discrete)
    size = int(spaces.flatdim(actions))
    return Spec(
        env=spec.id,
        observation_size=int(spaces.flatdim(observations)),
        actions=size if discrete else None,
        action_size=0 if discrete else size,
        horizon=envs.horizon,
        solved=spec.reward_threshold,
        fast=spec.vector_entry_point is not None,
        masked=envs.gives_masks,
    )


def check_spaces(env: str, vector: VectorEnv) -> None:
    """Refuse an environment whose observations or actions no policy here can take or give.

    Args:
        env: its id.
        vector: copies of it.

    Raises:
        Refused: the message names the space, and what is supported.
    """
    observations: Any = vector.single_observation_space
    actions: Any = vector.single_action_space
    if not isinstance(observations, (spaces.Box, spaces.Discrete)):
        raise Refused(
            f"Observations of {env} are {observations!s:.200}; supported are Box (flattened) and Discrete "
            f"(one-hot). {REGISTER}FlattenObservation."
        )
    if observations.dtype == np.uint8 and len(observations.shape or ()) > 1:
        raise Refused(
            f"Observations of {env} are pictures ({observations!s:.200}), and no policy here has convolutional "
            f"layers. {REGISTER}TransformObservation (features), or FlattenObservation if they are no picture."
        )
    is_vector = isinstance(actions, spaces.Box) and actions.low.ndim == 1
    if not (isinstance(actions, spaces.Discrete) or (is_vector and actions.dtype.kind == "f")):
        raise Refused(
            f"Actions of {env} are {actions!s:.200}; supported are Discrete, and a Box of real numbers with "
            f"one axis. {REGISTER}TransformAction."
        )
    if vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP) != AutoresetMode.NEXT_STEP:
        raise Refused(f"The environment {env} does not reset on the next step; give one that does.")


class Environments:
    """Copies of one environment: observations are flat float32 vectors, actions come from a policy.

    gymnasium's own wrappers for vectors go over the copies one by one, or need bounds on both sides.

    Attributes:
        env: id of the environment.
        num_envs: E, the number of copies.
        horizon: number of steps after which an episode is truncated.
        vector: the copies, which the environment's own vector code steps if it has any.
        gives_masks: whether it has said so far which actions are allowed, by a method or with an observation.
    """

    gives_masks = False

    def __init__(self, env: str, num_envs: int, limit: int | None = None) -> None:
        """Make the copies.

        Args:
            env: id of the environment; see `find`.
            num_envs: number of copies.
            limit: most steps of an episode. Default: the environment's own limit.

        Raises:
            Refused: the environment cannot be made; see `describe`.
        """
        spec = find(env)
        self.env = spec.id
        self.num_envs = num_envs
        self.horizon = limit or spec.max_episode_steps or 0
        if not self.horizon:
            raise Refused(
                f"Episodes of {env} have no limit in length. Set one: --max-episode-steps 200."
            )
        # Those of gymnasium and tokenrl leave settings and processes alone, and a step should cost little.
        is_library = str(spec.entry_point).startswith(("gymnasium.", "tokenrl."))
        self._in_context = contextlib.nullcontext if is_library else user_code
        mode = "sync" if spec.vector_entry_point is None else "vector_entry_point"
        with warnings.catch_warnings(), self._failures("__init__", Refused):
            warnings.simplefilter("ignore")
            self.vector: Any = gymnasium.make_vec(
                spec.id, num_envs, vectorization_mode=mode, max_episode_steps=self.horizon
            )
        check_spaces(self.env, self.vector)
        self._observations: Any = self.vector.single_observation_space
        self._actions: Any = self.vector.single_action_space
        if isinstance(self._actions, spaces.Box):
            bounds = np.array([self._actions.low, self._actions.high], np.float64)
            # Where a bound is missing, -1 and 1 stand for themselves.
            bounded = (np.abs(bounds) <= LARGEST).all(0)
            low, high = np.where(bounded, bounds, [[-1.0], [1.0]])
            self._middle = (low + high) / 2
            self._half = (high - low) / 2

    def reset(self, seed: int | None = None, kind: type[TokenrlError] = Stopped) -> np.ndarray:
        """Start a new episode in every copy; return the observations [E, O].

        Raises:
            TokenrlError: the environment raised an error; it is of this kind.
        """
        with self._failures("reset", kind):
            observations, self._facts = self.vector.reset(seed=seed)
            self._maskers = [
                copy.get_wrapper_attr("action_masks")
                for copy in getattr(self.vector.unwrapped, "envs", ())
                if copy.has_wrapper_attr("action_masks")
            ]
            self.gives_masks |= bool(self._maskers) or "action_mask" in self._facts
            self._ended = np.zeros(self.num_envs, bool)
            self._steps = 0
            return self.flat(observations)

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
            observations, *columns, self._facts = self.vector.step(self.translate(actions))
            rewards, terminated, truncated = map(np.array, columns)
            self._ended = terminated | truncated
            self._steps += 1
            self.gives_masks |= "action_mask" in self._facts
            return self.flat(observations), rewards, terminated, truncated

    def masks(self) -> np.ndarray:
        """Return 1 for each action that the latest observations allow, else 0 [E, A]; 1 where the next step resets.

        Raises:
            Stopped: a copy gave no mask, or one that cannot be used, or its method raised an error.
        """
        allowed = np.ones((self.num_envs, int(self._actions.n)), np.float32)
        # gymnasium fills in zeros for a copy that gives none
        masks = self._facts.get("action_mask", [None] * self.num_envs)
        with self._failures("action_masks"):
            for copy in np.flatnonzero(~self._ended):
                mask = np.asarray(self._maskers[copy]() if self._maskers else masks[copy])
                usable = mask.shape == allowed[copy].shape and {0, 1}.issuperset(mask.tolist())
                if not (usable and mask.any()):
                    raise Stopped(
                        f"The environment {self.env} gave no mask of actions in copy {copy}, or one that cannot be "
                        f"used, {self._steps} steps after the reset: {mask!s:.80}, of shape {mask.shape}. Each "
                        f"observation needs one of shape {allowed[copy].shape}, of booleans or of 0 and 1, that allows "
                        "an action. Correct the environment, or set action_masks 'off'."
                    )
                allowed[copy] = mask
        return allowed

    def _failures(
        self, method: str, kind: type[TokenrlError] = Stopped
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context that runs the environment's own code, and reports an error of it by its name."""
        failure = f"The environment {self.env} failed in {method}()"
        return guarded(failure, kind, self._in_context)

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
