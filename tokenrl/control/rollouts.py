"""Collects episodes, or pieces of them, as rows of [N, T] tensors, like completions of a language model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy
from tokenrl.errors import Stopped
from tokenrl.settings import LARGEST_REWARD

NOISE_CHUNK = 64
"""Steps for which random numbers are drawn at once, because each draw has a fixed cost."""


class Rollout(NamedTuple):
    """N rows of at most T steps; a row is an episode, or a piece of one.

    Attributes:
        observations: the observation before each action, [N, T, O]; zero where the mask is False.
        actions: indices [N, T] or vectors [N, T, D]; zero where the mask is False.
        rewards: unscaled rewards [N, T]; zero where the mask is False.
        mask: True for the steps that were taken, [N, T].
        terminated: True for rows that ended in a terminal state, [N].
        truncated: True for rows that a time limit cut, [N]. A row that is neither continues later.
        final_observations: the observation after the last step of each row, [N, O].
        returns: undiscounted returns of the episodes that ended in this rollout.
        lengths: lengths of those episodes.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    mask: Tensor
    terminated: Tensor
    truncated: Tensor
    final_observations: Tensor
    returns: Tensor
    lengths: Tensor

    @property
    def env_steps(self) -> int:
        """Number of steps taken."""
        return int(self.mask.sum())


class Steps(NamedTuple):
    """The n steps of E environments. Idle steps only reset, or come after the episode that counts.

    Shapes are [E, n, O] for observations, [E, n] or [E, n, D] for actions, and [E, n] for all others.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    idle: Tensor


def collect_episodes(
    envs: Environments,
    policy: Policy,
    horizon: int,
    generator: torch.Generator | None,
    *,
    seed: int,
) -> Rollout:
    """Play one whole episode in every environment.

    The first N episodes to end would be a biased sample, in which short episodes are too frequent.

    Args:
        envs: the environments, which are all reset.
        policy: chooses the actions.
        horizon: the largest number of steps of an episode.
        generator: random numbers of the actions; None for the most probable actions.
        seed: seed of the starting states.

    Raises:
        Stopped: the environment raised an error, or gave a number that cannot be used.
    """
    observation = envs.reset(seed)
    idle = np.zeros(envs.num_envs, bool)
    steps, after, _ = _play(
        envs, policy, observation, idle, horizon, generator, chunk=NOISE_CHUNK, once=True
    )
    rollout = into_rows(steps, after)
    _check_numbers(envs.env, rollout, "an episode")
    return rollout._replace(truncated=~rollout.terminated)


class Pieces:
    """Collects a fixed number of steps of every environment; their episodes go on in the next rollout."""

    def __init__(self, envs: Environments, num_steps: int, *, seed: int) -> None:
        """Start an episode in every environment."""
        self.envs = envs
        self.num_steps = num_steps
        self._observation = envs.reset(seed)
        self._idle = np.zeros(envs.num_envs, bool)
        self._returns = np.zeros(envs.num_envs)  # of the episodes so far
        self._lengths = np.zeros(envs.num_envs, int)

    def collect(self, policy: Policy, generator: torch.Generator) -> Rollout:
        """Take `num_steps` steps in every environment; every episode with a step among them gives a row.

        Raises:
            Stopped: the environment raised an error, or gave a number that cannot be used.
        """
        steps, after, self._idle = _play(
            self.envs,
            policy,
            self._observation,
            self._idle,
            self.num_steps,
            generator,
            chunk=self.num_steps,
            once=False,
        )
        self._observation = after.numpy()
        rollout = into_rows(steps, after)
        _check_numbers(self.envs.env, rollout, "a piece of an episode")
        real = ~steps.idle.numpy()
        ends = real & (steps.terminated | steps.truncated).numpy()
        rewards = np.where(real, steps.rewards.double().numpy(), 0.0)
        returns: list[float] = []
        lengths: list[int] = []
        for t in range(self.num_steps):
            self._returns += rewards[:, t]
            self._lengths += real[:, t]
            ended = ends[:, t]
            returns += self._returns[ended].tolist()
            lengths += self._lengths[ended].tolist()
            self._returns[ended] = 0.0
            self._lengths[ended] = 0
        totals = torch.tensor(returns, dtype=torch.float64)
        return rollout._replace(returns=totals, lengths=torch.tensor(lengths))


@torch.no_grad()
def _play(
    envs: Environments,
    policy: Policy,
    observation: np.ndarray,
    idle: np.ndarray,
    steps: int,
    generator: torch.Generator | None,
    *,
    chunk: int,
    once: bool,
) -> tuple[Steps, Tensor, np.ndarray]:
    """Step all environments with the actions of a policy.

    Args:
        envs: the environments.
        policy: chooses the actions.
        observation: the latest observations [E, O].
        idle: True for environments whose next step only resets [E].
        steps: the largest number of steps.
        generator: random numbers of the actions; None for the most probable actions.
        chunk: steps for which random numbers are drawn at once.
        once: whether only one episode of each environment counts. It plays on, idle, until all have ended.

    Returns:
        The steps, the observations after the last of them [E, O], and the next `idle`.
    """
    act = policy.actor()
    history = []
    noise = None
    for t in range(steps):
        if generator is not None and t % chunk == 0:
            count = min(chunk, steps - t)
            noise = policy.noise(count, envs.num_envs, generator=generator)
        before = torch.from_numpy(observation)
        actions = act(before, None if noise is None else noise[t % chunk])
        observation, reward, terminated, truncated = envs.step(actions.numpy())
        history.append((before, actions, reward, terminated, truncated, idle))
        ended = terminated | truncated
        if not once:
            idle = ended & ~idle  # the next step resets
            continue
        idle = idle | ended
        if idle.all():
            break
    columns = zip(*history, strict=True)
    played = Steps(*(torch.stack([torch.as_tensor(x) for x in column], 1) for column in columns))
    played = played._replace(rewards=played.rewards.double())
    return played, torch.from_numpy(observation), idle


def into_rows(steps: Steps, after: Tensor) -> Rollout:
    """Split the steps into rows at the ends of episodes, without the idle steps.

    Args:
        steps: all steps of a rollout.
        after: observations after the last step, [E, O].

    Returns:
        The rollout, with the return and the length of each row as if each were an episode.
    """
    real = ~steps.idle
    first = real & pad(steps.idle[:, :-1], (1, 0), value=True)  # a row begins here, [E, n]
    row = first.flatten().cumsum(0).reshape(first.shape) - 1  # [E, n]
    count = int(first.sum())
    time = torch.arange(real.shape[1]).expand(real.shape)
    start = torch.zeros(count, dtype=torch.long).index_put((row[first],), time[first])
    index = (row[real], time[real] - start[row[real]])
    width = int(index[1].max()) + 1

    def rows(x: Tensor) -> Tensor:
        return x.new_zeros(count, width, *x.shape[2:]).index_put(index, x[real])

    # The observation after each step. At the end of an episode that is its final observation, because
    # gymnasium resets one step later.
    following = torch.cat([steps.observations[:, 1:], after[:, None]], 1)
    rewards = rows(steps.rewards)
    mask = rows(real)
    lengths = mask.sum(1)
    last = torch.arange(count), lengths - 1
    return Rollout(
        observations=rows(steps.observations),
        actions=rows(steps.actions),
        rewards=rewards,
        mask=mask,
        terminated=rows(steps.terminated)[last],
        truncated=rows(steps.truncated)[last],
        final_observations=rows(following)[last],
        returns=rewards.sum(1),
        lengths=lengths,
    )


def _check_numbers(env: str, rollout: Rollout, unit: str) -> None:
    """Stop the run at a number of the environment that cannot be used, before it spoils a gradient.

    Raises:
        Stopped: an observation or a reward is not finite, or a reward is larger than `LARGEST_REWARD`; the
            message names the reward and its step in the row, which is a `unit`.
    """
    problem = ""
    # One sum is many times faster than a check of every number, and it is finite only if all of them are.
    if not (rollout.observations.sum() + rollout.final_observations.sum()).isfinite():
        problem = "an observation that is not finite"
    is_wrong = ~(rollout.rewards.abs() <= LARGEST_REWARD)  # not `>`, which is False for nan
    if is_wrong.any():
        row, t = is_wrong.nonzero()[0].tolist()
        problem = f"the reward {float(rollout.rewards[row, t]):g} in step {t + 1} of {unit}"
    if problem:
        raise Stopped(
            f"The environment {env} gave {problem}. "
            f"Observations must be finite, and rewards at most {LARGEST_REWARD:g} in size."
        )
