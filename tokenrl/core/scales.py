"""Divides advantages by a scale: one formula for each scale in `choices`.

A divisor made of the row's own return biases the gradient; the reasons are in `choices`. The formulas of
standard deviations take sets of rows [S, n], as those of `baselines` do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.baselines import mean, std
from tokenrl.core.rows import zero_outside

if TYPE_CHECKING:
    from tokenrl.core.advantages import Step

Scaled = tuple[Tensor, Tensor]
"""Advantages [S, n, 1] or [S, n, T], and the mask [S, n] of the rows that have a scale."""


def divide(
    advantages: Float[Tensor, "*N T"], deviation: Float[Tensor, "*N #T"], eps: float
) -> Float[Tensor, "*N T"]:
    """Divide by `deviation + eps`, with eps outside the root; the result is 0 where that sum is 0."""
    divisor = deviation + eps
    positive = divisor > 0  # False only for equal returns with eps 0
    return zero_outside(
        advantages / torch.where(positive, divisor, 1.0), positive.expand_as(advantages)
    )


def std_of_set(step: Step, advantages: Float[Tensor, "S n #T"]) -> Scaled:
    """Divide by the standard deviation of the returns of the set, the row itself included."""
    deviation = std(step.totals, step.valid, step.estimator.scale_ddof)
    usable = step.valid & (step.valid.sum(-1, keepdim=True) > 1)
    return divide(advantages, deviation[..., None], step.estimator.scale_eps), usable


def std_of_others(
    step: Step, advantages: Float[Tensor, "S n #T"], compared: Bool[Tensor, "S n M"]
) -> Scaled:
    """Divide by the standard deviation of the returns of other rows, so that the row itself plays no part.

    Args:
        step: The step.
        advantages: The advantages to divide.
        compared: True where a row is compared with one of M rows: those of its set, or of the whole step.
    """
    totals = step.totals.reshape(-1, 1, compared.shape[-1]).expand_as(compared)
    deviation = std(totals, compared, step.estimator.scale_ddof)[
        ..., :1
    ]  # of equal others exactly 0
    return divide(advantages, deviation, step.estimator.scale_eps), step.valid & (
        compared.sum(-1) > 1
    )


def loo_std(step: Step, advantages: Float[Tensor, "S n #T"]) -> Scaled:
    """Divide by the standard deviation of the OTHER rows of the set."""
    itself = torch.eye(step.valid.shape[1], dtype=torch.bool, device=step.valid.device)
    return std_of_others(step, advantages, step.valid[:, None] & ~itself)


def other_groups_std(step: Step, advantages: Float[Tensor, "S n #T"]) -> Scaled:
    """Divide by the standard deviation of all rows of the OTHER sets, around their common mean."""
    sets, n = step.valid.shape
    own_set = torch.eye(sets, dtype=torch.bool, device=step.valid.device).repeat_interleave(
        n, 1
    )  # [S, S n]
    return std_of_others(step, advantages, (step.valid.reshape(1, -1) & ~own_set)[:, None])


def token_whiten(step: Step, advantages: Float[Tensor, "S n #T"]) -> Scaled:
    """Return `(A - mean)/(std + eps)`, with mean and standard deviation over all tokens of the step.

    A row counts once for each of its tokens (REINFORCE++, Hu et al. 2025, arXiv 2501.03262).
    """
    tokens, inside = advantages.expand_as(step.actions).reshape(1, -1), step.actions.reshape(1, -1)
    centre, deviation = (
        mean(tokens, inside)[0, 0],
        std(tokens, inside, step.estimator.scale_ddof)[0, 0],
    )
    return divide(advantages - centre, deviation, step.estimator.scale_eps), step.valid


def episode_std(step: Step, advantages: Float[Tensor, "S n #T"]) -> Scaled:
    """Divide by the standard deviation of the returns of the row's own steps."""
    deviation = std(step.returns.expand_as(step.actions), step.actions, step.estimator.scale_ddof)
    return divide(advantages, deviation[..., :1], step.estimator.scale_eps), step.valid


SCALES: dict[str, Callable[[Step, Tensor], Scaled]] = {
    "none": lambda step, advantages: (advantages, step.valid),
    "group_std": std_of_set,
    "batch_std": std_of_set,
    "loo_std": loo_std,
    "other_groups_std": other_groups_std,
    "token_whiten": token_whiten,
    "episode_std": episode_std,
}
"""The formula of each name in `choices.CHOICES["scale"]`."""
