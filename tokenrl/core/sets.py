"""Computes means and spreads over sets of rows, with and without the row itself, weighted or not.

The functions take sets of rows [S, n]: the groups of a step, or the whole step as a single set. They average
the differences from the first valid row of the set. So the mean of equal returns is exactly that return, and
the advantage exactly 0, in any precision; the plain mean of equal float32 numbers may be rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.masking import zero_outside


def from_first(
    totals: Float[Tensor, "*S n"], valid: Bool[Tensor, "*S n"]
) -> tuple[Float[Tensor, "*S n"], Float[Tensor, "*S 1"]]:
    """Subtract from each set the total of its first valid row.

    Returns:
        The differences (0 in rows that are not valid) and the total of the first valid row.
    """
    first = totals.gather(-1, valid.long().argmax(-1, keepdim=True))  # argmax returns the first maximum
    return zero_outside(totals - first, valid), first


def set_mean(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"]) -> Float[Tensor, "S n"]:
    """Return the mean over the valid rows of the set, the row itself included: `(1/n) sum_j R_j`.

    Because the row's own return is in it, the expected gradient is (n - 1)/n of the true one.
    """
    differences, first = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True).clamp(min=1)  # the mean of no valid rows is not used
    return (first + differences.sum(-1, keepdim=True) / count).expand_as(totals)


def set_std(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int) -> Float[Tensor, "S n"]:
    """Return the standard deviation of the valid rows of each set: `sqrt(sum (R - mean)^2 / (n - ddof))`.

    It is exactly 0 for equal totals, because they are measured from the first one, and for a set of one row.
    """
    differences, _ = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True)
    centred = zero_outside(differences - differences.sum(-1, keepdim=True) / count.clamp(min=1), valid)
    # Two passes: E[R^2] - E[R]^2 would lose all digits where the spread is small compared with the mean.
    variance = centred.square().sum(-1, keepdim=True) / (count - ddof).clamp(min=1)
    return variance.sqrt().expand_as(totals)


def leave_one_out(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"]) -> Float[Tensor, "S n"]:
    """Return the mean over the OTHER valid rows: `(1/(n - 1)) sum_{j != i} R_j` (Kool et al. 2019).

    With this baseline b, `R_i - b_i = n/(n - 1) (R_i - mean)`. A row without another valid row has no such
    mean; it gets the first total, and `Estimator.advantages` sets its advantage to 0.
    """
    differences, first = from_first(totals, valid)
    others = valid.sum(-1, keepdim=True) - valid.long()
    return first + (differences.sum(-1, keepdim=True) - differences) / others.clamp(min=1)


def weighted_mean(
    totals: Float[Tensor, "*S n"],
    valid: Bool[Tensor, "*S n"],
    weights: Float[Tensor, "*S n"],
    *,
    leave_one_out: bool,
) -> tuple[Float[Tensor, "*S n"], Bool[Tensor, "*S n"]]:
    """Return `sum_j w_j R_j / sum_j w_j`, for weights of 0 or more; over j != i if `leave_one_out`.

    Returns:
        The mean, and the mask of the rows that have one: those whose weights do not sum to 0.
    """
    differences, first = from_first(totals, valid)
    weights = zero_outside(weights.to(totals.dtype), valid)
    mass = sum_of_others(weights) if leave_one_out else weights.sum(-1, keepdim=True).expand_as(weights)
    moment = weights * differences
    moment = sum_of_others(moment) if leave_one_out else moment.sum(-1, keepdim=True)
    known = mass > 0
    # Divide by 1 where there is no mean: a later `where` would not remove the nan of 0/0 from a gradient.
    return first + moment / torch.where(known, mass, 1.0), known


def sum_of_others(x: Float[Tensor, "*S n"]) -> Float[Tensor, "*S n"]:
    """Return `sum_{j != i} x_j`.

    It is summed from both sides: sum - x_i would lose the digits of the other x_j where x_i is much larger.
    """
    before = torch.nn.functional.pad(x[..., :-1].cumsum(-1), (1, 0))
    after = torch.nn.functional.pad(x[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    return before + after


def at_each_timestep(
    returns: Float[Tensor, "N T"],
    actions: Bool[Tensor, "N T"],
    weights: Float[Tensor, "N T"],
    *,
    size: int,
    leave_one_out: bool,
) -> Float[Tensor, "N T"]:
    """Return the weighted mean at each timestep over the rows of a set that act at it [N, T].

    Where no (other) row acts, the last such mean is carried forward: it does not use the row itself either.
    Before the first mean the result is 0.

    Args:
        returns: Return of each action.
        actions: True where a valid row acts.
        weights: Weight of each row at each timestep.
        size: Number of consecutive rows in a set.
        leave_one_out: Whether to leave out the row itself.
    """

    def by_time(x: Tensor) -> Tensor:  # [N, T] -> [S, T, n]
        return x.reshape(-1, size, x.shape[-1]).transpose(1, 2)

    mean, known = weighted_mean(
        by_time(returns), by_time(actions), by_time(weights), leave_one_out=leave_one_out
    )
    mean = mean.transpose(1, 2).reshape(returns.shape)
    known = known.transpose(1, 2).reshape(returns.shape)
    positions = torch.arange(returns.shape[-1], device=returns.device)
    latest = torch.where(known, positions, 0).cummax(-1).values  # [N, T] the latest timestep that has a mean
    return zero_outside(mean, known).gather(-1, latest)


def has_others_in_set(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], others: int = 1
) -> Bool[Tensor, "S n"]:
    """Return which rows are valid and share their set with at least `others` other valid rows."""
    return valid & (valid.sum(-1, keepdim=True) > others)


def in_sets(f: Callable[..., Tensor], size: int, totals: Float[Tensor, " N"], *others: Tensor) -> Tensor:
    """Apply a function of sets [S, n] to the rows of a step [N], with n = `size` consecutive rows per set."""
    return f(totals.reshape(-1, size), *(x.reshape(-1, size) for x in others)).reshape(-1)


def divide(
    advantages: Float[Tensor, " N *T"], std: Float[Tensor, " N *T"], eps: float
) -> Float[Tensor, " N *T"]:
    """Divide by `std + eps`, with eps outside the root; the result is 0 where `std + eps` is 0."""
    divisor = std + eps
    spread = divisor > 0  # False only for equal returns with eps 0
    return zero_outside(advantages / torch.where(spread, divisor, 1.0), spread.expand_as(advantages))
