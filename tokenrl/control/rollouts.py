"""Episodes, or pieces of them, as rows: the same [N, T] tensors as completions of a language model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy

NOISE_CHUNK = 64


class Rollout(NamedTuple):
    """N rows of at most T steps; a row is an episode, or a piece of one.

    Attributes:
        observations: in which each action was taken [N, T, O]; anything where the mask is False.
        actions: [N, T] numbers, or [N, T, D]; anything where the mask is False.
        rewards: [N, T], as the environment gave them; zeros where the mask is False.
        mask: steps that were taken [N, T].
        terminated: rows that ended in a final state [N].
        truncated: rows that a time limit ended [N]; a row that is neither goes on in a later rollout.
        final_observations: after the last step of each row [N, O].
        returns: undiscounted, of the episodes that ended in this rollout, and the lengths of those.
        env_steps: steps taken by the environments, those of the mask.
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
    envs: Environments, policy: Policy, horizon: int, generator: torch.Generator | None, *, seed: int | None
) -> Rollout:
    """Play one whole episode in every environment; a greedy one without a generator.

    One each, not the first N that end: those would be the short ones.

    Args:
        envs: all are reset.
        policy: what acts.
        horizon: the most steps an episode has.
        generator: of the policy's draws.
        seed: of the starting states; None goes on with the environments' own random states.
    """
    observation = envs.reset(seed)
    alive = np.ones(envs.num_envs, bool)
    seen, acts, rewards, masks = [], [], [], []
    terminated, final = np.zeros(envs.num_envs, bool), observation
    noise: Tensor | None = None
    for t in range(horizon):
        if generator is not None and t % NOISE_CHUNK == 0:
            noise = policy.noise(min(NOISE_CHUNK, horizon - t), envs.num_envs, generator=generator)
        now = torch.from_numpy(observation)
        actions = policy.act(now, None if noise is None else noise[t % NOISE_CHUNK])
        observation, reward, done, cut = envs.step(actions.numpy())
        seen.append(now)
        acts.append(actions)
        rewards.append(reward)
        masks.append(alive)
        over = done | cut
        if over.any():
            ending = alive & over
            final = np.where(ending[:, None], observation, final)
            terminated = terminated | (ending & done)
            alive = alive & ~over
            if not alive.any():
                break
    final = np.where(alive[:, None], observation, final)
    mask = torch.from_numpy(np.stack(masks, 1))
    paid = torch.from_numpy(np.stack(rewards, 1).astype(np.float32)) * mask
    ended = torch.from_numpy(terminated)
    shown = torch.stack(seen, 1)
    taken = torch.stack(acts, 1)
    return Rollout(
        shown, taken, paid, mask, ended, ~ended, torch.from_numpy(np.asarray(final, np.float32)),
        paid.sum(1), mask.sum(1), int(mask.sum()),
    )  # fmt: skip


class Pieces:
    """Collects a fixed number of steps of every environment, again and again; episodes go on in between."""

    def __init__(self, envs: Environments, num_steps: int, *, seed: int) -> None:
        """Start an episode everywhere."""
        self.envs, self.num_steps = envs, num_steps
        self._observation = envs.reset(seed)
        self._dummy = np.zeros(envs.num_envs, bool)  # the next step only resets
        self._earned = np.zeros(envs.num_envs)
        self._length = np.zeros(envs.num_envs, int)

    @torch.no_grad()
    def collect(self, policy: Policy, generator: torch.Generator) -> Rollout:
        """Take `num_steps` steps everywhere; each episode that was at work in them gives one row."""
        noise = policy.noise(self.num_steps, self.envs.num_envs, generator=generator)
        seen, acts, rewards, dones, cuts, dummies = [], [], [], [], [], []
        returns: list[float] = []
        lengths: list[int] = []
        for t in range(self.num_steps):
            now = torch.from_numpy(self._observation)
            actions = policy.act(now, noise[t])
            self._observation, reward, done, cut = self.envs.step(actions.numpy())
            seen.append(now)
            acts.append(actions)
            rewards.append(torch.from_numpy(np.asarray(reward, np.float32)))
            dones.append(torch.from_numpy(done.copy()))
            cuts.append(torch.from_numpy(cut.copy()))
            dummies.append(torch.from_numpy(self._dummy))
            self._count(reward, done | cut, returns, lengths)
        after = torch.from_numpy(self._observation)
        steps = Steps(*(torch.stack(x, 1) for x in (seen, acts, rewards, dones, cuts, dummies)))
        return into_rows(steps, after, torch.tensor(returns), torch.tensor(lengths))

    def _count(self, reward: np.ndarray, over: np.ndarray, returns: list[float], lengths: list[int]) -> None:
        self._earned += np.where(self._dummy, 0.0, reward)
        self._length += ~self._dummy
        over = over & ~self._dummy
        returns += self._earned[over].tolist()
        lengths += self._length[over].tolist()
        self._earned[over], self._length[over] = 0.0, 0
        self._dummy = over


class Steps(NamedTuple):
    """What E environments did in n steps, ends of episodes and dummy steps (which only reset) included.

    Shapes are [E, n, O] for observations, [E, n] or [E, n, D] for actions, [E, n] for the rest.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    dummy: Tensor


def into_rows(steps: Steps, after: Tensor, returns: Tensor, lengths: Tensor) -> Rollout:
    """Cut steps at the ends of episodes and leave the dummy steps out.

    Args:
        steps: all of them.
        after: observations after the last step [E, O].
        returns: of the episodes that ended.
        lengths: of the episodes that ended.
    """
    real = ~steps.dummy
    first = real & torch.nn.functional.pad(steps.dummy[:, :-1], (1, 0), value=True)
    row = first.flatten().cumsum(0).reshape(first.shape) - 1  # [E, n]
    count = int(first.sum())
    time = torch.arange(real.shape[1]).expand(real.shape)
    start = torch.zeros(count, dtype=torch.long).index_put((row[first],), time[first])
    place = (row[real], time[real] - start[row[real]])
    width = int(place[1].max()) + 1

    def rows(x: Tensor) -> Tensor:
        return x.new_zeros(count, width, *x.shape[2:]).index_put(place, x[real])

    # What follows a step, at the end of an episode its last observation: gymnasium resets one step later.
    following = torch.cat([steps.observations[:, 1:], after[:, None]], 1)
    mask = rows(real)
    last = (torch.arange(count), mask.sum(1) - 1)
    ended = rows(steps.terminated)[last]
    return Rollout(
        rows(steps.observations), rows(steps.actions), rows(steps.rewards), mask, ended,
        rows(steps.truncated)[last] & ~ended,
        rows(following)[last], returns, lengths, int(real.sum()),
    )  # fmt: skip
