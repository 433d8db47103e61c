"""From rewards to returns: what each action is credited with, one formula for each row of `choices`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.guards import given
from tokenrl.core.masking import zero_outside

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def token_rewards(
    rewards: Float[Tensor, " N *T"], mask: Bool[Tensor, "N T"], valid: Bool[Tensor, " N"]
) -> Float[Tensor, "N T"]:
    """Lay rewards out in time: a row's single reward comes at the row's last action.

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
    # the largest position that is an action; a row without any has only zeros, hence position 0
    return positions == torch.where(mask, positions, 0).amax(-1, keepdim=True)


def reward_to_go(rewards: Float[Tensor, "N T"], gamma: float = 1.0) -> Float[Tensor, "N T"]:
    """Sum what is still to come: `G_t = sum_{u >= t} gamma^(u - t) r_u`.

    The first column is the return of the whole row. No factor gamma^t is applied to later columns, as is
    usual; with gamma < 1 their gradient is therefore that of no objective (see `choices`).
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
    # G_t less the part that lies beyond the window, which is gamma^window G_{t + window}
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
        # `after` is G_{t+1} and `value_after` is V_{t+1}, both 0 beyond the end of the row
        through = rewards[:, t] + gamma * after
        mixed = rewards[:, t] + gamma * ((1 - lam) * value_after + lam * after)
        after = torch.where(mask[:, t], mixed, through)
        # what is no action has no value; V stands there for the reward plus the next action's value
        value_after = torch.where(mask[:, t], values[:, t], rewards[:, t] + gamma * value_after)
        backwards.append(after)
    return torch.stack(backwards[::-1], dim=-1)


def gae(
    estimator: Estimator,
    rewards: Float[Tensor, "N T"],
    actions: Bool[Tensor, "N T"],
    values: Float[Tensor, "N T"] | None,
) -> Float[Tensor, "N T"]:
    """Return the targets whose distance from the values is GAE's advantage; see `lambda_return`."""
    known = given("values", values, "returns 'gae'").detach().to(rewards.dtype)
    return lambda_return(rewards, known, actions, gamma=estimator.gamma, lam=estimator.lam)


RETURNS: dict[str, Callable[[Estimator, Tensor, Tensor, Tensor | None], Tensor]] = {
    # with 'total' every action shares the first column; the others are a critic's targets
    "total": lambda e, rewards, actions, values: reward_to_go(rewards, e.gamma),
    "reward_to_go": lambda e, rewards, actions, values: reward_to_go(rewards, e.gamma),
    "blame_window": lambda e, rewards, actions, values: in_window(rewards, e.window, e.gamma),
    "gae": gae,
}
"""The formula of each name in `choices.CHOICES["returns"]`, from rewards [N, T] to returns [N, T]."""
