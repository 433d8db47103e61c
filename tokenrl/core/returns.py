"""From rewards to returns."""

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
    positions = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask, positions, 0).amax(-1, keepdim=True)
    return zero_outside(rewards[:, None].expand(mask.shape), (positions == last) & valid[:, None])


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
