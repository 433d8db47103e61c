"""From rewards to returns: what an action is paid."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.masking import zero_outside


def token_rewards(
    rewards: Float[Tensor, " N *T"], mask: Bool[Tensor, "N T"], valid: Bool[Tensor, " N"]
) -> Float[Tensor, "N T"]:
    """Lay rewards out in time: one reward a row is paid at the row's last action.

    Rewards that come as [N, T] are kept everywhere, also where the mask is 0: an environment may answer an
    action a few positions later, and that answer belongs to the return. Padding must therefore hold zeros.
    Rows that are not valid hold zeros afterwards, whatever they held before. A row without any action keeps
    its reward at the first position, for it still counts in the baseline of its neighbours.
    """
    if rewards.ndim == 2:
        return zero_outside(rewards, valid[:, None].expand_as(rewards))
    return zero_outside(rewards[:, None].expand(mask.shape), at_last_action(mask) & valid[:, None])


def at_last_action(mask: Bool[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
    """Mark the last action of each row, or the first position of a row without any."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return positions == torch.where(mask, positions, 0).amax(-1, keepdim=True)


def reward_to_go(rewards: Float[Tensor, "N T"], gamma: float = 1.0) -> Float[Tensor, "N T"]:
    """Sum what is still to come: `G_t = sum_{u >= t} gamma^(u - t) r_u`.

    The first column is the return of the whole row. No factor gamma^t is applied to later columns, as is
    usual; with gamma < 1 their gradient is therefore that of no objective (see `bias`).
    """
    if gamma == 1.0:
        return rewards.flip(-1).cumsum(-1).flip(-1)
    backwards = [rewards[:, -1]]
    # a recursion, for with a cumulative sum the powers of 1/gamma would overflow on long rows
    for t in range(rewards.shape[-1] - 2, -1, -1):
        backwards.append(rewards[:, t] + gamma * backwards[-1])
    return torch.stack(backwards[::-1], dim=-1)


def in_window(rewards: Float[Tensor, "N T"], window: int, gamma: float = 1.0) -> Float[Tensor, "N T"]:
    """Sum the next `window` rewards only: `sum_{u=t}^{t + window - 1} gamma^(u - t) r_u`."""
    to_go = reward_to_go(rewards, gamma)
    beyond = torch.nn.functional.pad(to_go, (0, window))[:, window:]
    return to_go - gamma**window * beyond


def lambda_return(
    rewards: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    gamma: float = 1.0,
    lam: float,
) -> Float[Tensor, "N T"]:
    """Mix bootstrapped returns: `G_t = r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1})`, 0 after the end.

    `G_t - V_t` is the advantage of GAE, `sum_l (gamma lam)^l delta_{t+l}` with `delta_t = r_t + gamma V_{t+1}
    - V_t` (Schulman et al. 2016, arXiv 1506.02438, eq. 16). lam 1 is `reward_to_go`, which no value enters.
    A position that is no action has no value of its own: what follows it is passed through.

    Args:
        rewards: [N, T]; what follows a truncation is a reward at the last action.
        values: [N, T] of the state in which each action is taken; anything where the mask is 0.
        mask: True where the position is an action.
        gamma: Discount a position.
        lam: Weight of what was really earned against the value.
    """
    if lam == 1.0:
        return reward_to_go(rewards, gamma)
    values = zero_outside(values, mask)
    after = value_after = torch.zeros_like(rewards[:, 0])
    backwards = []
    for t in range(rewards.shape[-1] - 1, -1, -1):
        through = rewards[:, t] + gamma * after
        mixed = rewards[:, t] + gamma * ((1 - lam) * value_after + lam * after)
        after = torch.where(mask[:, t], mixed, through)
        value_after = torch.where(mask[:, t], values[:, t], rewards[:, t] + gamma * value_after)
        backwards.append(after)
    return torch.stack(backwards[::-1], dim=-1)
