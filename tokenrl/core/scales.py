"""Computes what advantages are divided by: one formula for each scale in `choices`.

A divisor made of the row's own return biases the gradient; the reasons are in `choices`. The formulas of
standard deviations take sets of rows [S, n], as those of `baselines` do.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.baselines import each_itself, mean, std
from tokenrl.core.rows import zero_outside


def divide(
    advantages: Float[Tensor, "*N T"], deviation: Float[Tensor, "*N #T"], eps: float
) -> Float[Tensor, "*N T"]:
    """Divide by `deviation + eps`, with eps outside the root; the result is 0 where that sum is 0."""
    divisor = deviation + eps
    positive = divisor > 0  # False only for equal returns with eps 0
    divided = advantages / torch.where(positive, divisor, 1.0)
    return zero_outside(divided, positive.expand_as(advantages))


def std_of_others(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int
) -> tuple[Float[Tensor, "S n"], Bool[Tensor, "S n"]]:
    """Return the standard deviation of the OTHER rows of the set.

    Returns:
        The deviation, exactly 0 for equal others, and the mask of the rows with two or more others.
    """
    peers = valid[:, None] & ~each_itself(valid.shape[1], valid)  # [S, n, n]
    compared = totals[:, None].expand_as(peers)
    deviation = std(compared, peers, ddof)[..., 0]
    return deviation, peers.sum(-1) > 1


def std_of_other_sets(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int
) -> tuple[Float[Tensor, "S 1"], Bool[Tensor, "S 1"]]:
    """Return the standard deviation of all rows of the OTHER sets, around their common mean.

    Returns:
        The deviation, exactly 0 for equal others, and the mask of the sets with two or more other rows.
    """
    sets, n = valid.shape
    own_set = each_itself(sets, valid).repeat_interleave(n, 1)  # [S, S n]
    peers = valid.reshape(1, -1) & ~own_set
    compared = totals.reshape(1, -1).expand_as(peers)
    deviation = std(compared, peers, ddof)[:, :1]
    return deviation, peers.sum(-1, keepdim=True) > 1


def token_whiten(
    advantages: Float[Tensor, "S n #T"], actions: Bool[Tensor, "S n T"], *, ddof: int, eps: float
) -> Float[Tensor, "S n #T"]:
    """Return `(A - mean)/(std + eps)`, with mean and standard deviation over all tokens of the step.

    A row counts once for each of its tokens (REINFORCE++, Hu et al. 2025, arXiv 2501.03262).
    """
    tokens = advantages.expand_as(actions).reshape(1, -1)
    inside = actions.reshape(1, -1)
    centre = mean(tokens, inside)[0, 0]
    return divide(advantages - centre, std(tokens, inside, ddof)[0, 0], eps)
