"""What an advantage is divided by: one formula for each row of `choices`.

A divisor made from the row's own return bends the gradient; the reasons stand in `choices`. A formula takes
the step, which knows its estimator, and the advantages. It returns the scaled advantages, and which rows have
such a scale at all: a row without others to compare with gets no advantage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.inputs import Step
from tokenrl.core.masking import zero_outside
from tokenrl.core.sets import from_first, has_company, in_sets, set_mean

Scaled = tuple[Tensor, Tensor]


def set_std(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int) -> Float[Tensor, "S n"]:
    """Return the standard deviation of the valid rows of each set: `sqrt(sum (R - mean)^2 / (n - ddof))`.

    Exactly 0 for equal totals (they are measured from the first) and for a set with no row to spare.
    """
    differences, _ = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True)
    centred = zero_outside(differences - differences.sum(-1, keepdim=True) / count.clamp(min=1), valid)
    # in two passes: E[R^2] - E[R]^2 would lose every digit where the spread is small beside the mean
    variance = centred.square().sum(-1, keepdim=True) / (count - ddof).clamp(min=1)
    return variance.sqrt().expand_as(totals)


def others_std(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int) -> Float[Tensor, "S n"]:
    """Standard deviation of the OTHER valid rows of the set, which contains nothing of the row itself."""
    differences, _ = from_first(totals, valid)
    n = totals.shape[-1]
    # [S, n, n]: row i sees the valid rows j != i
    others = valid[..., None, :] & ~torch.eye(n, dtype=torch.bool, device=totals.device)
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
    around = squares + count * (means - common[:, None]).square()  # [S, S]: set s' around the mean without s
    variance = (others * around).sum(-1) / (rows - ddof).clamp(min=1)
    return variance.sqrt()[:, None].expand_as(totals)


def has_other_rows(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"]) -> Bool[Tensor, "S n"]:
    """Say which rows are valid and have two or more valid rows in the other sets."""
    return valid & (valid.sum() - valid.sum(-1, keepdim=True) >= 2)


def divide(
    advantages: Float[Tensor, " N *T"], std: Float[Tensor, " N *T"], eps: float
) -> Float[Tensor, " N *T"]:
    """Divide by `std + eps`, with eps outside the root; 0 where both are 0, for no spread teaches nothing."""
    divisor = std + eps
    spread = divisor > 0  # false for eps 0 and equal returns, where the advantage is 0 as well
    return zero_outside(advantages / torch.where(spread, divisor, 1.0), spread.expand_as(advantages))


def by_sets(
    deviation: Callable[..., Tensor],
    enough: Callable[..., Tensor],
    step: Step,
    advantages: Float[Tensor, " N *T"],
) -> Scaled:
    """Divide by a standard deviation of the total returns, over the sets of rows that the scale compares.

    Args:
        deviation: Function of totals, valid rows and `ddof` that returns the standard deviation of each row.
        enough: Function of totals and valid rows that says which rows have one.
        step: The step.
        advantages: Advantages to divide.
    """
    size = step.set_size("scale") or 1
    std = in_sets(partial(deviation, ddof=step.estimator.scale_ddof), size, step.totals, step.valid)
    usable = in_sets(enough, size, step.totals, step.valid)
    return divide(advantages, std[:, None], step.estimator.scale_eps), usable


def token_whiten(step: Step, advantages: Float[Tensor, " N *T"]) -> Scaled:
    """Centre and divide by mean and standard deviation over all tokens: `(A - mean)/(std + eps)`.

    A row counts as often as it has tokens (REINFORCE++, arXiv 2501.03262). `advantages` may be [N, 1].
    """
    tokens, inside = advantages.expand(step.actions.shape).reshape(1, -1), step.actions.reshape(1, -1)
    mean, std = set_mean(tokens, inside)[:, :1], set_std(tokens, inside, step.estimator.scale_ddof)[:, :1]
    return divide(advantages - mean, std, step.estimator.scale_eps), step.valid


def episode_std(step: Step, advantages: Float[Tensor, " N *T"]) -> Scaled:
    """Divide by the standard deviation of the returns along the row itself."""
    returns = step.returns.expand_as(step.actions)
    std = set_std(returns, step.actions, step.estimator.scale_ddof)[:, :1]
    return divide(advantages, std, step.estimator.scale_eps), step.valid


SCALES: dict[str, Callable[[Step, Tensor], Scaled]] = {
    "none": lambda step, advantages: (advantages, step.valid),
    "group_std": partial(by_sets, set_std, has_company),
    "batch_std": partial(by_sets, set_std, has_company),
    "loo_std": partial(by_sets, others_std, partial(has_company, others=2)),
    "other_groups_std": partial(by_sets, other_sets_std, has_other_rows),
    "token_whiten": token_whiten,
    "episode_std": episode_std,
}
"""The formula of each name in `choices.CHOICES["scale"]`."""
