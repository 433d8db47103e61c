"""What an advantage is divided by. One made from the row's own return bends the gradient: see `bias`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.baselines import from_first
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


def divide(
    advantages: Float[Tensor, " N *T"], std: Float[Tensor, " N *T"], eps: float
) -> Float[Tensor, " N *T"]:
    """Divide by `std + eps`, with eps outside the root; 0 where both are 0, for no spread teaches nothing."""
    divisor = std + eps
    spread = divisor > 0
    return zero_outside(advantages / torch.where(spread, divisor, 1.0), spread.expand_as(advantages))
