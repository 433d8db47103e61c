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
        truncated: True for rows that a time limit ended, [N]; a row that is neither continues later.
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
    began = envs.reset(seed), np.zeros(envs.num_envs, bool)
    steps, after, _ = _play(envs, policy, *began, horizon, generator, chunk=NOISE_CHUNK, once=True)
    rollout = into_rows(steps, after)
    _check_numbers(envs.env, rollout, "an episode")
    return rollout._replace(truncated=~rollout.terminated)


class Pieces:
    """Collects a fixed number of steps of every environment; their episodes go on in the next rollout."""

    def __init__(self, envs: Environments, num_steps: int, *, seed: int) -> None:
        """Start an episode in every environment."""
        self.envs, self.num_steps = envs, num_steps
        self._observation, self._idle = envs.reset(seed), np.zeros(envs.num_envs, bool)
        self._returns, self._lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, int)

    def collect(self, policy: Policy, generator: torch.Generator) -> Rollout:
        """Take `num_steps` steps in every environment; every episode with a step among them gives a row.

        Raises:
            Stopped: the environment raised an error, or gave a number that cannot be used.
        """
        now, n = (self._observation, self._idle), self.num_steps
        steps, after, self._idle = _play(self.envs, policy, *now, n, generator, chunk=n, once=False)
        self._observation = after.numpy()
        rollout = into_rows(steps, after)
        _check_numbers(self.envs.env, rollout, "a piece of an episode")
        returns, lengths = self._ended(steps)
        return rollout._replace(returns=torch.tensor(returns), lengths=torch.tensor(lengths))

    def _ended(self, steps: Steps) -> tuple[list[float], list[int]]:
        """Add rewards to the returns of the episodes so far; give returns and lengths of those that ended."""
        returns: list[float] = []
        lengths: list[int] = []
        columns = (steps.rewards.double(), ~steps.idle, steps.terminated | steps.truncated)
        for reward, counts, over in zip(*(x.T.numpy() for x in columns), strict=True):
            self._returns += np.where(counts, reward, 0.0)
            self._lengths += counts
            over = over & counts
            returns += self._returns[over].tolist()
            lengths += self._lengths[over].tolist()
            self._returns[over], self._lengths[over] = 0.0, 0
        return returns, lengths


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
    act, history = policy.actor(), []
    noise: list[Tensor | None] = [None] * chunk
    for t in range(steps):
        if generator is not None and t % chunk == 0:
            size = min(chunk, steps - t), envs.num_envs
            noise = list(policy.noise(*size, generator=generator).unbind())
        now = torch.from_numpy(observation)
        actions = act(now, noise[t % chunk])
        observation, reward, terminated, truncated = envs.step(actions.numpy())
        history.append((now, actions, reward, terminated, truncated, idle))
        over = terminated | truncated
        idle = idle | over if once else over & ~idle
        if once and idle.all():
            break
    columns = [
        torch.stack([torch.as_tensor(x) for x in column], 1)
        for column in zip(*history, strict=True)
    ]
    columns[2] = columns[
        2
    ].float()  # a reward beyond float32 becomes infinite, which `_check_numbers` finds
    return Steps(*columns), torch.from_numpy(observation), idle


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
    rewards, mask = rows(steps.rewards), rows(real)
    lengths = mask.sum(1)
    last = torch.arange(count), lengths - 1
    terminated, truncated, final = (
        rows(x)[last] for x in (steps.terminated, steps.truncated, following)
    )
    truncated &= ~terminated
    ends = {"terminated": terminated, "truncated": truncated, "final_observations": final}
    returns = rewards.sum(1)
    return Rollout(
        rows(steps.observations),
        rows(steps.actions),
        rewards,
        mask,
        **ends,
        returns=returns,
        lengths=lengths,
    )


def _check_numbers(env: str, rollout: Rollout, unit: str) -> None:
    """Stop the run at a number of the environment that cannot be used, before it spoils a gradient.

    Raises:
        Stopped: an observation or a reward is not finite, or a reward is larger than `LARGEST_REWARD`; the
            message names it and its step in the row, which is a `unit`.
    """
    # One sum is many times faster than a check of every number, and it is finite only if all of them are.
    finite = (rollout.observations.sum() + rollout.final_observations.sum()).isfinite()
    if finite and rollout.rewards.abs().max() <= LARGEST_REWARD:  # a nan is the largest
        return
    for row, mask in enumerate(rollout.mask):
        observations = torch.cat(
            [rollout.observations[row, mask], rollout.final_observations[row, None]]
        )
        rewards = rollout.rewards[row, mask]
        bad_observation = ~observations.isfinite().all(
            1
        )  # [T + 1], before each step and after the last
        bad_reward = ~(rewards.abs() <= LARGEST_REWARD)  # [T]; not `>`, which is False for nan
        wrong = bad_observation | pad(bad_reward, (1, 0))
        if wrong.any():
            step = int(wrong.int().argmax())
            observation = f"the observation {observations[step].tolist()!s:.200}"
            number = (
                observation if bad_observation[step] else f"the reward {float(rewards[step - 1]):g}"
            )
            where = f"in step {step}" if step else "at the start"
            raise Stopped(
                f"The environment {env} gave {number} {where} of {unit}. "
                f"Observations must be finite, and rewards at most {LARGEST_REWARD:g} in size."
            )
