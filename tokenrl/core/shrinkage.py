"""A baseline between the mean of the prompt and the mean of the step, with a weight that looks elsewhere."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.scales import set_std
from tokenrl.core.sets import leave_one_out, set_mean


def shrunk(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], weight: float | None
) -> Float[Tensor, "S n"]:
    """Mix two leave-one-out means: `lam * mean of the prompt's other rows + (1 - lam) * mean elsewhere`.

    Elsewhere is the mean of the other prompts' means. Neither mean nor weight contains anything of row i, so
    the gradient stays exact (two-level shrinkage, arXiv 2511.03710). A step without another prompt has the
    leave-one-out mean of the prompt alone.

    Args:
        totals: Returns, one row of the matrix a prompt.
        valid: Rows that count.
        weight: lam between 0 and 1; None to estimate it for each prompt from the other prompts, by
            `own_weight`.
    """
    own = leave_one_out(totals, valid)
    means = set_mean(totals, valid)[..., 0]  # [S]
    present = valid.any(-1)
    others = present & ~torch.eye(len(means), dtype=torch.bool, device=means.device)  # [S, S]
    number = others.sum(-1)
    # measured from one of the means, so that equal means give that very number
    first = means.gather(-1, present.long().argmax(-1, keepdim=True))
    elsewhere = first + (others * (means - first)).sum(-1) / number.clamp(min=1)  # [S]
    lam = own_weight(totals, valid, means, elsewhere, others) if weight is None else weight
    lam = torch.where(number > 0, lam, 1.0).to(totals.dtype)
    # lam own + (1 - lam) elsewhere, written as a step from one to the other: exact where both are equal
    return own + (1 - lam[:, None]) * (elsewhere[:, None] - own)


def own_weight(
    totals: Float[Tensor, "S n"],
    valid: Bool[Tensor, "S n"],
    means: Float[Tensor, " S"],
    elsewhere: Float[Tensor, " S"],
    others: Bool[Tensor, "S S"],
) -> Float[Tensor, " S"]:
    """Estimate the best weight of the own prompt, `tau^2 / (tau^2 + sigma^2/(n - 1))`, from the others.

    sigma^2 is the mean variance within the other prompts, tau^2 the variance of their means less what
    sampling adds to it, or 0. Fewer than two other prompts give no tau^2, and the weight is 1.
    """
    count = valid.sum(-1)  # [S]
    enough = others & (count >= 2)
    within = (enough * set_std(totals, valid, ddof=1)[..., 0].square()).sum(-1) / enough.sum(-1).clamp(min=1)
    number = others.sum(-1)
    spread = (others * (means - elsewhere[:, None]).square()).sum(-1) / (number - 1).clamp(min=1)
    shares = (others / count.clamp(min=1).to(totals.dtype)).sum(-1) / number.clamp(min=1)
    # the means spread by tau^2 and by the noise of sampling, sigma^2/n each; a negative rest is no variance
    between = (spread - within * shares).clamp(min=0.0)
    noise = within / (count - 1).clamp(min=1)
    known = (number >= 2) & (between + noise > 0)
    return torch.where(known, between / torch.where(known, between + noise, 1.0), 1.0)
