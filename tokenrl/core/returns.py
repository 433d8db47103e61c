"""Computes returns, what each action is credited with: one formula for each of the returns in `choices`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.core.baselines import mean, std
from tokenrl.core.rows import sums_from, zero_outside
from tokenrl.core.scales import divide


def token_rewards(
    rewards: Float[Tensor, " N *T"], mask: Bool[Tensor, "N T"], valid: Bool[Tensor, " N"]
) -> Float[Tensor, "N T"]:
    """Place rewards in time [N, T]: the single reward of a row goes to the row's last action.

    Rewards given as [N, T] are kept at all positions, also where the mask is 0: an environment may reward an
    action a few positions later, and that reward belongs to the return. Padding must therefore hold zeros.
    Rows that are not valid are set to 0. A row without any action has its reward at the first position,
    because it still counts in the baseline of other rows.
    """
    if rewards.ndim == 2:
        return zero_outside(rewards, valid[:, None].expand_as(rewards))
    in_time = rewards[:, None].expand(mask.shape)
    return zero_outside(in_time, at_last_action(mask) & valid[:, None])


def at_last_action(mask: Bool[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
    """Mark the last action of each row, or the first position of a row without any."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    # The largest position that is an action; without any action all entries are 0, hence position 0.
    last = torch.where(mask, positions, 0).amax(-1, keepdim=True)
    return positions == last


class Turns(NamedTuple):
    """Which turn each position of a step belongs to, where a turn is one step in time.

    There are K = T turns, so that no shape depends on what was sampled; the last ones may hold nothing.
    """

    number: Int[Tensor, "N T"]
    """The last turn that began at or before each position; 0 before the first action."""
    begins: Bool[Tensor, "N T"]
    """True at the first action of each turn."""

    @classmethod
    def read(cls, turns: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Turns:
        """Read the number of the turn of each action; off the mask `turns` may hold anything."""
        latest = torch.where(mask, turns.long(), -1).cummax(-1).values
        before = pad(latest[:, :-1], (1, 0), value=-1)
        begins = latest > before
        return cls(latest.clamp(min=0), begins)

    def sums(self, x: Float[Tensor, "N T"]) -> Float[Tensor, "N K"]:
        """Return the sum over the positions of each turn."""
        return torch.zeros_like(x).scatter_add(-1, self.number, x)

    def spread(self, x: Float[Tensor, "N K"]) -> Float[Tensor, "N T"]:
        """Return for each position the number of its turn."""
        return x.gather(-1, self.number)


def reward_to_go(rewards: Float[Tensor, "N T"], gamma: float = 1.0) -> Float[Tensor, "N T"]:
    """Return the sum of future rewards: `G_t = sum_{u >= t} gamma^(u - t) r_u`.

    The first column is the return of the whole row. As is usual, later columns have no factor gamma^t; with
    gamma < 1 the estimator is therefore the gradient of no objective (Nota and Thomas 2020, arXiv
    1906.07073).
    """
    if gamma == 1.0:
        return sums_from(rewards)
    backwards = [rewards[:, -1]]
    # A recursion: in a cumulative sum the powers of 1/gamma would overflow on long rows.
    for t in range(rewards.shape[-1] - 2, -1, -1):
        backwards.append(rewards[:, t] + gamma * backwards[-1])
    return torch.stack(backwards[::-1], dim=-1)


def in_window(
    rewards: Float[Tensor, "N T"], window: int, gamma: float = 1.0
) -> Float[Tensor, "N T"]:
    """Return the sum of the next `window` rewards: `sum_{u=t}^{t + window - 1} gamma^(u - t) r_u`."""
    # G_t minus the part beyond the window, which is gamma^window G_{t + window}
    to_go = reward_to_go(rewards, gamma)
    beyond = pad(to_go, (0, window))[:, window:]
    return to_go - gamma**window * beyond


def lambda_return(
    rewards: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    actions: Bool[Tensor, "N T"],
    gamma: float,
    lam: float | Float[Tensor, " N"],
    length_lam: float = 0.0,
) -> Float[Tensor, "N T"]:
    """Return `G_t = r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1})`, with V and G 0 after the end.

    `G_t - V_t` is the advantage of GAE, `sum_l (gamma lam)^l delta_{t+l}` with `delta_t = r_t + gamma V_{t+1}
    - V_t` (Schulman et al. 2016, arXiv 1506.02438, eq. 16). With lam 1 it is `reward_to_go`, without values.
    A position that is not an action has no value of its own; the return of what follows is passed through it.

    Args:
        rewards: Rewards [N, T]; the value of the state after a truncation is a reward at the last action.
        values: Value of the state before each action [N, T]; may hold anything at other positions.
        actions: True where the position is an action [N, T].
        gamma: Discount per position.
        lam: Weight of the observed return against the value, from 0 to 1.
        length_lam: Above 0, lam of a row of l actions is `1 - 1 / (length_lam l)`, at least 0 (VAPO, arXiv
            2504.05118, eq. 8).
    """
    if length_lam:
        lam = (1 - 1 / (length_lam * actions.sum(-1))).clamp(min=0).to(rewards)  # [N]
    elif lam == 1.0:
        return reward_to_go(rewards, gamma)
    values = zero_outside(values, actions)
    after = value_after = torch.zeros_like(rewards[:, 0])
    backwards = []
    for t in range(rewards.shape[-1] - 1, -1, -1):
        # `after` is G_{t+1} and `value_after` is V_{t+1}, both 0 beyond the end of the row
        through = rewards[:, t] + gamma * after
        mixed = rewards[:, t] + gamma * ((1 - lam) * value_after + lam * after)
        after = torch.where(actions[:, t], mixed, through)
        # At a position without an action, V is the reward there plus the discounted value that follows.
        through = rewards[:, t] + gamma * value_after
        value_after = torch.where(actions[:, t], values[:, t], through)
        backwards.append(after)
    return torch.stack(backwards[::-1], dim=-1)


def episode_normalized(
    rewards: Float[Tensor, "N T"],
    actions: Bool[Tensor, "N T"],
    gamma: float,
    scale_ddof: int,
    scale_eps: float,
) -> Float[Tensor, "N T"]:
    """Return `(G_t - mean) / (std + eps)`, with the mean and the standard deviation over the row's own steps.

    A critic then learns these numbers, and the baseline 'value' is subtracted from them.
    """
    returns = reward_to_go(rewards, gamma)
    centred = zero_outside(returns - mean(returns, actions), actions)
    return divide(centred, std(returns, actions, scale_ddof), scale_eps)
