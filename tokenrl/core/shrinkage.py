"""Computes a baseline between the mean of the prompt and that of the other prompts (two-level shrinkage)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.sets import leave_one_out, set_mean, set_std


def shrunk(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], weight: float | None
) -> Float[Tensor, "S n"]:
    """Return `lam * mean of the prompt's other rows + (1 - lam) * mean elsewhere`.

    The mean elsewhere is the mean of the other prompts' means. Neither mean nor weight depends on row i, so
    the gradient stays exact (after the James-Stein shrinkage of arXiv 2511.03710). In a step of one prompt
    the result is the leave-one-out mean of the prompt.

    Args:
        totals: Returns, one row of the matrix for each prompt.
        valid: True for rows that count.
        weight: lam, between 0 and 1; None to estimate it for each prompt from the other prompts, by
            `own_weight`.
    """
    own = leave_one_out(totals, valid)
    means = set_mean(totals, valid)[..., 0]  # [S]
    present = valid.any(-1)
    others = present & ~torch.eye(len(means), dtype=torch.bool, device=means.device)  # [S, S]
    number = others.sum(-1)
    # Average differences from one of the means, so that the mean of equal means is exactly that number.
    first = means.gather(-1, present.long().argmax(-1, keepdim=True))
    elsewhere = first + (others * (means - first)).sum(-1) / number.clamp(min=1)  # [S]
    lam = own_weight(totals, valid, means, elsewhere, others) if weight is None else weight
    lam = torch.where(number > 0, lam, 1.0).to(totals.dtype)
    # lam own + (1 - lam) elsewhere, written as a difference so that it is exact where both are equal
    return own + (1 - lam[:, None]) * (elsewhere[:, None] - own)


def own_weight(
    totals: Float[Tensor, "S n"],
    valid: Bool[Tensor, "S n"],
    means: Float[Tensor, " S"],
    elsewhere: Float[Tensor, " S"],
    others: Bool[Tensor, "S S"],
) -> Float[Tensor, " S"]:
    """Estimate the best weight of a prompt's own mean, `tau^2 / (tau^2 + sigma^2/(n - 1))`, from the others.

    sigma^2 is the mean variance within the other prompts. tau^2 is the variance of their means minus what
    sampling adds to it, and at least 0. With fewer than two other prompts there is no tau^2, and the weight
    is 1.
    """
    count = valid.sum(-1)  # [S]
    enough = others & (count >= 2)
    within = (enough * set_std(totals, valid, ddof=1)[..., 0].square()).sum(-1) / enough.sum(-1).clamp(min=1)
    number = others.sum(-1)
    spread = (others * (means - elsewhere[:, None]).square()).sum(-1) / (number - 1).clamp(min=1)
    shares = (others / count.clamp(min=1).to(totals.dtype)).sum(-1) / number.clamp(min=1)
    # The variance of the means is tau^2 plus the sampling noise sigma^2/n; a negative difference is set to 0.
    between = (spread - within * shares).clamp(min=0.0)
    noise = within / (count - 1).clamp(min=1)
    known = (number >= 2) & (between + noise > 0)
    return torch.where(known, between / torch.where(known, between + noise, 1.0), 1.0)
