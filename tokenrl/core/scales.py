"""What an advantage is divided by. One made from the row's own return bends the gradient: see `bias`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.baselines import from_first, set_mean
from tokenrl.core.masking import zero_outside


def set_std(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int) -> Float[Tensor, "S n"]:
    """Return the standard deviation of the valid rows of each set: `sqrt(sum (R - mean)^2 / (n - ddof))`.

    Exactly 0 for equal totals (they are measured from the first) and for a set with no row to spare.
    """
    differences, _ = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True)
    centred = zero_outside(differences - differences.sum(-1, keepdim=True) / count.clamp(min=1), valid)
    variance = centred.square().sum(-1, keepdim=True) / (count - ddof).clamp(min=1)
    return variance.sqrt().expand_as(totals)


def others_std(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int) -> Float[Tensor, "S n"]:
    """Standard deviation of the OTHER valid rows of the set, which contains nothing of the row itself."""
    differences, _ = from_first(totals, valid)
    n = totals.shape[-1]
    others = valid[..., None, :] & ~torch.eye(n, dtype=torch.bool, device=totals.device)  # [S, n, n]
    count = others.sum(-1)
    mean = (others * differences[..., None, :]).sum(-1) / count.clamp(min=1)
    squares = (others * (differences[..., None, :] - mean[..., None]).square()).sum(-1)
    return (squares / (count - ddof).clamp(min=1)).sqrt()


def other_sets_std(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int
) -> Float[Tensor, "S n"]:
    """Standard deviation over all valid rows of the OTHER sets, around their common mean.

    The squares around that mean are those around each set's own mean plus `n (own mean - common mean)^2`.
    """
    flat, inside = totals.reshape(1, -1), valid.reshape(1, -1)
    differences = from_first(flat, inside)[0].reshape(totals.shape)
    count = valid.sum(-1)  # [S]
    means = differences.sum(-1) / count.clamp(min=1)
    squares = zero_outside(differences - means[:, None], valid).square().sum(-1)
    others = ~torch.eye(len(count), dtype=torch.bool, device=totals.device)  # [S, S]
    rows = (others * count).sum(-1)
    common = (others * count * means).sum(-1) / rows.clamp(min=1)
    around = squares + count * (means - common[:, None]).square()
    variance = (others * around).sum(-1) / (rows - ddof).clamp(min=1)
    return variance.sqrt()[:, None].expand_as(totals)


def has_other_rows(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"]) -> Bool[Tensor, "S n"]:
    """Say which rows are valid and have two or more valid rows in the other sets."""
    return valid & (valid.sum() - valid.sum(-1, keepdim=True) >= 2)


def whiten(
    advantages: Float[Tensor, " N *T"], actions: Bool[Tensor, "N T"], *, ddof: int, eps: float
) -> Float[Tensor, " N *T"]:
    """Centre and divide by mean and standard deviation over all tokens: `(A - mean)/(std + eps)`.

    A row counts as often as it has tokens (REINFORCE++, arXiv 2501.03262). `advantages` may be [N, 1].
    """
    tokens, inside = advantages.expand(actions.shape).reshape(1, -1), actions.reshape(1, -1)
    mean, std = set_mean(tokens, inside)[:, :1], set_std(tokens, inside, ddof)[:, :1]
    return divide(advantages - mean, std, eps)


def divide(
    advantages: Float[Tensor, " N *T"], std: Float[Tensor, " N *T"], eps: float
) -> Float[Tensor, " N *T"]:
    """Divide by `std + eps`, with eps outside the root; 0 where both are 0, for no spread teaches nothing."""
    divisor = std + eps
    spread = divisor > 0
    return zero_outside(advantages / torch.where(spread, divisor, 1.0), spread.expand_as(advantages))
