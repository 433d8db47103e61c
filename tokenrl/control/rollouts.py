"""Collects episodes, or pieces of them, as rows of [N, T] tensors, like completions of a language model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy
from tokenrl.errors import Stopped
from tokenrl.settings import LARGEST_REWARD

NOISE_CHUNK = 64
"""Steps for which random numbers are drawn at once, because each draw has a fixed cost."""


class Rollout(NamedTuple):
    """N rows of at most T steps; a row is an episode, or a piece of one.

    Attributes:
        observations: the observation before each action, [N, T, O]; zero where the mask is False. With masks of
            actions (`Shape.action_masks`) these follow, [N, T, O + A], here and in `final_observations`.
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


def collect_episodes(
    envs: Environments,
    policy: Policy,
    generator: torch.Generator | None,
    *,
    seed: int,
) -> Rollout:
    """Play one whole episode in every environment.

    The first N episodes to end would be a biased sample, in which short episodes are too frequent.

    Args:
        envs: the environments, which are all reset.
        policy: chooses the actions.
        generator: random numbers of the actions; None for the most probable actions.
        seed: seed of the starting states.

    Raises:
        Stopped: the environment raised an error, or gave a number that cannot be used.
    """
    idle = np.zeros(envs.num_envs, bool)
    rollout, *_ = _play(envs, policy, envs.reset(seed), idle, envs.horizon, generator, once=True)
    return rollout._replace(truncated=~rollout.terminated)


class Pieces:
    """Collects a fixed number of steps of every environment; their episodes go on in the next rollout."""

    def __init__(self, envs: Environments, num_steps: int, *, seed: int) -> None:
        """Start an episode in every environment."""
        # gymnasium's wrapper adds up the rewards of each episode, also over several rollouts.
        self._episodes = RecordEpisodeStatistics(envs.vector, num_steps * envs.num_envs)
        envs.vector = self._episodes
        self.envs = envs
        self.num_steps = num_steps
        self._observation = envs.reset(seed)
        self._idle = np.zeros(envs.num_envs, bool)

    def collect(self, policy: Policy, generator: torch.Generator) -> Rollout:
        """Take `num_steps` steps in every environment; every episode with a step among them gives a row.

        Raises:
            Stopped: the environment raised an error, or gave a number that cannot be used.
        """
        rollout, self._observation, self._idle = _play(
            self.envs,
            policy,
            self._observation,
            self._idle,
            self.num_steps,
            generator,
            once=False,
        )
        returns, lengths = self._episodes.return_queue, self._episodes.length_queue
        rollout = rollout._replace(
            returns=torch.tensor([*returns], dtype=torch.float64), lengths=torch.tensor([*lengths])
        )
        returns.clear()
        lengths.clear()
        return rollout


@torch.no_grad()
def _play(
    envs: Environments,
    policy: Policy,
    observation: np.ndarray,
    idle: np.ndarray,
    steps: int,
    generator: torch.Generator | None,
    *,
    once: bool,
) -> tuple[Rollout, np.ndarray, np.ndarray]:
    """Step all environments with the actions of a policy.

    Args:
        envs: the environments.
        policy: chooses the actions.
        observation: the latest observations [E, O].
        idle: True for environments whose next step only resets [E].
        steps: the largest number of steps.
        generator: random numbers of the actions; None for the most probable actions.
        once: whether only one episode of each environment counts. It plays on, idle, until all have ended.

    Returns:
        The rollout, the observations after the last step [E, O], and the next `idle`.

    Raises:
        Stopped: the environment raised an error, or gave a number that cannot be used.
    """
    history = []
    noise = None
    chunk = NOISE_CHUNK if once else steps
    for t in range(steps):
        if generator is not None and t % chunk == 0:
            count = min(chunk, steps - t)
            noise = policy.noise(count, envs.num_envs, generator=generator)
        before = torch.from_numpy(observation)
        if policy.shape.action_masks:
            before = torch.cat([before, torch.from_numpy(envs.masks())], 1)
        actions = policy.act(before, None if noise is None else noise[t % chunk])
        observation, reward, terminated, truncated = envs.step(actions.numpy())
        history.append((before, actions, reward, terminated, truncated, idle))
        ended = terminated | truncated
        if not once:
            idle = ended & ~idle  # the next step resets
            continue
        idle = idle | ended
        if idle.all():
            break
    columns = (torch.stack(list(map(torch.as_tensor, x)), 1) for x in zip(*history, strict=True))
    # No action follows the last observations, so what is allowed there is left open.
    after = pad(torch.from_numpy(observation), (0, before.shape[1] - observation.shape[1]))
    rollout = into_rows(*columns, after=after)
    # A sum is finite only if all numbers are, and the maximum is nan if any reward is.
    numbers = rollout.observations.sum() + rollout.final_observations.sum()
    largest = rollout.rewards.abs().max()
    if not (numbers.isfinite() and largest <= LARGEST_REWARD):
        raise Stopped(
            f"The environment {envs.env} gave an observation that is not finite, or a reward that is too large: "
            f"the largest is {largest:g} in size. Observations must be finite, and rewards at most "
            f"{LARGEST_REWARD:g} in size."
        )
    return rollout, observation, idle


def into_rows(
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    idle: Tensor,
    *,
    after: Tensor,
) -> Rollout:
    """Split the n steps of E environments into rows at the ends of episodes, without the idle steps.

    Args:
        observations: the observation before each step [E, n, O].
        actions: [E, n] or [E, n, D].
        rewards: [E, n].
        terminated: [E, n].
        truncated: [E, n].
        idle: True for steps that only reset, or come after the episode that counts, [E, n].
        after: observations after the last step, [E, O].

    Returns:
        The rollout, with the return and the length of each row as if each were an episode.
    """
    real = ~idle
    first = real & pad(idle[:, :-1], (1, 0), value=True)  # a row begins here, [E, n]
    starts = first[real].nonzero()[:, 0]  # among the real steps
    last = torch.cat([starts[1:], real.sum()[None]]) - 1
    lengths = last - starts + 1

    def rows(x: Tensor) -> Tensor:
        return pad_sequence(x[real].split(lengths.tolist()), batch_first=True)

    # The observation after each step. At the end of an episode that is its final observation, because
    # gymnasium resets one step later.
    following = torch.cat([observations[:, 1:], after[:, None]], 1)
    padded = rows(rewards.double())
    return Rollout(
        observations=rows(observations),
        actions=rows(actions),
        rewards=padded,
        mask=rows(real),
        terminated=terminated[real][last],
        truncated=truncated[real][last],
        final_observations=following[real][last],
        returns=padded.sum(1),
        lengths=lengths,
    )
