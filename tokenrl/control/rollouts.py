"""Collects episodes, or pieces of them, as rows of [N, T] tensors, like completions of a language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy
from tokenrl.errors import Stopped
from tokenrl.settings import LARGEST_REWARD

NOISE_CHUNK = 64
"""Steps for which random numbers are drawn at once, because each draw has a fixed cost."""


class Rollout(NamedTuple):
    """N rows of at most T steps; a row is an episode, or a piece of one.

    Attributes:
        observations: the observation before each action, [N, T, O]; arbitrary where the mask is False.
        actions: indices [N, T] or vectors [N, T, D]; arbitrary where the mask is False.
        rewards: unscaled rewards [N, T]; zero where the mask is False.
        mask: True for the steps that were taken, [N, T].
        terminated: True for rows that ended in a terminal state, [N].
        truncated: True for rows that a time limit ended, [N]; a row that is neither continues later.
        final_observations: the observation after the last step of each row, [N, O].
        returns: undiscounted returns of the episodes that ended in this rollout.
        lengths: lengths of those episodes.
        env_steps: number of steps taken, the sum of the mask.
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
    env_steps: int


@torch.no_grad()
def collect_episodes(
    envs: Environments, policy: Policy, horizon: int, generator: torch.Generator | None, *, seed: int
) -> Rollout:
    """Play one whole episode in every environment.

    Each environment plays exactly one. The first N episodes to end would be a biased sample: the short ones.

    Args:
        envs: the environments, which are all reset.
        policy: chooses the actions.
        horizon: the largest number of steps of an episode.
        generator: random numbers of the actions; None for the most probable actions.
        seed: seed of the starting states.

    Raises:
        Stopped: the environment raised an error, or gave a number that `check_finite` stops at.
    """
    observation = envs.reset(seed)
    alive = np.ones(envs.num_envs, bool)
    seen, acts, rewards, masks = [], [], [], []
    terminated, final = np.zeros(envs.num_envs, bool), observation
    act = policy.actor()
    noise: Sequence[Tensor | None] = [None] * NOISE_CHUNK
    for t in range(horizon):
        if generator is not None and t % NOISE_CHUNK == 0:
            noise = policy.noise(min(NOISE_CHUNK, horizon - t), envs.num_envs, generator=generator).unbind()
        now = torch.from_numpy(observation)
        actions = act(now, noise[t % NOISE_CHUNK])
        observation, reward, done, cut = envs.step(actions.numpy())
        seen.append(now)
        acts.append(actions)
        rewards.append(reward)
        masks.append(alive)
        ending = alive & (done | cut)
        if ending.any():
            final = np.where(ending[:, None], observation, final)
            terminated = terminated | (ending & done)
            alive = alive & ~ending
            if not alive.any():
                break
    final = np.where(alive[:, None], observation, final)
    mask = torch.from_numpy(np.stack(masks, 1))
    # An environment whose episode has ended plays on until the others end; those rewards do not count.
    counted = torch.from_numpy(_in_32_bits(np.stack(rewards, 1))).where(mask, 0.0)
    ended = torch.from_numpy(terminated)
    shown = torch.stack(seen, 1)
    taken = torch.stack(acts, 1)
    rollout = Rollout(
        shown, taken, counted, mask, ended, ~ended, torch.from_numpy(np.asarray(final, np.float32)),
        counted.sum(1), mask.sum(1), int(mask.sum()),
    )  # fmt: skip
    check_rollout(envs.env, rollout, np.zeros(envs.num_envs, int))
    return rollout


def _in_32_bits(rewards: np.ndarray) -> np.ndarray:
    """Round rewards; one that is too large becomes infinite, which `check_rollout` names."""
    with np.errstate(over="ignore"):
        return np.asarray(rewards, np.float32)


def check_rollout(env: str, rollout: Rollout, taken: np.ndarray) -> None:
    """Stop at a number of the environment that cannot be used, instead of much later at a gradient.

    Args:
        env: id of the environment.
        rollout: what was collected.
        taken: steps of each row's episode before this rollout, [N].

    Raises:
        Stopped: an observation or a reward is not finite, or a reward is larger than `LARGEST_REWARD`, among
            those that count; the message names it and the step of the episode.
    """
    # One sum is many times faster than a look at every number. It is finite only if all of them are.
    finite = math.isfinite(float(rollout.observations.sum()) + float(rollout.final_observations.sum()))
    if finite and float(rollout.rewards.abs().max()) <= LARGEST_REWARD:  # a nan is the largest
        return
    for row, mask in enumerate(rollout.mask):
        seen = torch.cat([rollout.observations[row, mask], rollout.final_observations[row, None]])
        rewards = rollout.rewards[row, mask]
        bad_observation = ~seen.isfinite().all(1)  # [T + 1], before each step and after the last
        bad_reward = ~(rewards.abs() <= LARGEST_REWARD)  # [T]; not `>`, which is False for nan
        wrong = bad_observation | torch.nn.functional.pad(bad_reward, (1, 0))
        if wrong.any():
            step = int(wrong.int().argmax())
            observation = f"the observation {seen[step].tolist()!s:.200}"
            what = observation if bad_observation[step] else f"the reward {float(rewards[step - 1]):g}"
            when = f"in step {step + int(taken[row])} of an episode" if step + int(taken[row]) else "at reset"
            raise Stopped(
                f"The environment {env} gave {what} {when}. Observations must be finite, and rewards at most "
                f"{LARGEST_REWARD:g} in size. Look for a division by 0, a logarithm or an overflow in it."
            )


class Pieces:
    """Collects a fixed number of steps of every environment per rollout; episodes go on in the next."""

    def __init__(self, envs: Environments, num_steps: int, *, seed: int) -> None:
        """Start an episode in every environment."""
        self.envs, self.num_steps = envs, num_steps
        self._observation = envs.reset(seed)
        self._dummy = np.zeros(envs.num_envs, bool)  # whether the next step only resets
        self._returns = np.zeros(envs.num_envs)
        self._length = np.zeros(envs.num_envs, int)

    @torch.no_grad()
    def collect(self, policy: Policy, generator: torch.Generator) -> Rollout:
        """Take `num_steps` steps in every environment; every episode with a step among them gives a row.

        Raises:
            Stopped: the environment raised an error, or gave a number that `check_finite` stops at.
        """
        before = self._length.copy()
        act = policy.actor()
        noise = policy.noise(self.num_steps, self.envs.num_envs, generator=generator).unbind()
        taken: list[tuple[Tensor, ...]] = []
        returns: list[float] = []
        lengths: list[int] = []
        for t in range(self.num_steps):
            now = torch.from_numpy(self._observation)
            actions = act(now, noise[t])
            self._observation, reward, done, cut = self.envs.step(actions.numpy())
            numbers = (_in_32_bits(reward), done.copy(), cut.copy(), self._dummy)
            taken.append((now, actions, *map(torch.from_numpy, numbers)))
            self._count(reward, done | cut, returns, lengths)
        after = torch.from_numpy(self._observation)
        steps = Steps(*(torch.stack(values, 1) for values in zip(*taken, strict=True)))
        rollout = into_rows(steps, after, torch.tensor(returns), torch.tensor(lengths))
        rows = _first_of_rows(steps.dummy).sum(1).numpy()  # of each environment, one after the other
        began = np.zeros(rows.sum(), int)
        began[rows.cumsum() - rows] = before
        check_rollout(self.envs.env, rollout, began)
        return rollout

    def _count(self, reward: np.ndarray, over: np.ndarray, returns: list[float], lengths: list[int]) -> None:
        self._returns += np.where(self._dummy, 0.0, reward)
        self._length += ~self._dummy
        over = over & ~self._dummy
        returns += self._returns[over].tolist()
        lengths += self._length[over].tolist()
        self._returns[over], self._length[over] = 0.0, 0
        self._dummy = over


class Steps(NamedTuple):
    """The n steps of E environments, with dummy steps, which only reset.

    Shapes are [E, n, O] for observations, [E, n] or [E, n, D] for actions, and [E, n] for all others.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    dummy: Tensor


def _first_of_rows(dummy: Tensor) -> Tensor:
    """Return where a row begins, [E, n]: at the first step, and after every dummy step."""
    return ~dummy & torch.nn.functional.pad(dummy[:, :-1], (1, 0), value=True)


def into_rows(steps: Steps, after: Tensor, returns: Tensor, lengths: Tensor) -> Rollout:
    """Split the steps into rows at the ends of episodes, without the dummy steps.

    Args:
        steps: all steps of a rollout.
        after: observations after the last step, [E, O].
        returns: undiscounted returns of the episodes that ended.
        lengths: lengths of those episodes.
    """
    real = ~steps.dummy
    first = _first_of_rows(steps.dummy)
    row = first.flatten().cumsum(0).reshape(first.shape) - 1  # [E, n]
    count = int(first.sum())
    time = torch.arange(real.shape[1]).expand(real.shape)
    start = torch.zeros(count, dtype=torch.long).index_put((row[first],), time[first])
    place = (row[real], time[real] - start[row[real]])
    width = int(place[1].max()) + 1

    def rows(x: Tensor) -> Tensor:
        return x.new_zeros(count, width, *x.shape[2:]).index_put(place, x[real])

    # The observation after each step. At the end of an episode that is its final observation, because
    # gymnasium resets one step later.
    following = torch.cat([steps.observations[:, 1:], after[:, None]], 1)
    mask = rows(real)
    last = (torch.arange(count), mask.sum(1) - 1)
    ended = rows(steps.terminated)[last]
    return Rollout(
        rows(steps.observations), rows(steps.actions), rows(steps.rewards), mask, ended,
        rows(steps.truncated)[last] & ~ended,
        rows(following)[last], returns, lengths, int(real.sum()),
    )  # fmt: skip
