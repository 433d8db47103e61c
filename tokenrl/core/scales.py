"""Divides advantages by a scale: one formula for each scale in `choices`.

A divisor made of the row's own return biases the gradient; the reasons are in `choices`. Each formula takes
the `Step`, which holds the estimator and its inputs, and the advantages. It returns the scaled advantages and
the mask of the rows that have a scale: a row without others to compare with gets the advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.inputs import Step
from tokenrl.core.masking import zero_outside
from tokenrl.core.sets import divide, from_first, has_others_in_set, in_sets, set_mean, set_std

Scaled = tuple[Tensor, Tensor]
"""Advantages [N, 1] or [N, T], and the mask [N] of the rows that have a scale."""


def others_std(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], ddof: int) -> Float[Tensor, "S n"]:
    """Return the standard deviation of the OTHER valid rows of the set; it does not use the row itself."""
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
    """Return the standard deviation over all valid rows of the OTHER sets, around their common mean.

    For each set the sum of squares around the common mean is the sum of squares around the set's own mean
    plus `n (own mean - common mean)^2`.
    """
    flat, inside = totals.reshape(1, -1), valid.reshape(1, -1)
    differences = from_first(flat, inside)[0].reshape(totals.shape)
    count = valid.sum(-1)  # [S]
    means = differences.sum(-1) / count.clamp(min=1)
    squares = zero_outside(differences - means[:, None], valid).square().sum(-1)
    others = ~torch.eye(len(count), dtype=torch.bool, device=totals.device)  # [S, S]
    rows = (others * count).sum(-1)
    common = (others * count * means).sum(-1) / rows.clamp(min=1)
    # [S, S]: entry (s, s') is the sum of squares of set s' around the mean of all sets but s
    around = squares + count * (means - common[:, None]).square()
    variance = (others * around).sum(-1) / (rows - ddof).clamp(min=1)
    return variance.sqrt()[:, None].expand_as(totals)


def has_rows_in_other_sets(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"]) -> Bool[Tensor, "S n"]:
    """Return which rows are valid and have two or more valid rows in the other sets."""
    return valid & (valid.sum() - valid.sum(-1, keepdim=True) >= 2)


def by_sets(
    deviation: Callable[..., Tensor],
    enough: Callable[..., Tensor],
    step: Step,
    advantages: Float[Tensor, " N *T"],
) -> Scaled:
    """Divide by a standard deviation of the total returns over the sets of rows that the scale compares.

    Args:
        deviation: Function of totals, valid rows and `ddof` that returns the standard deviation for each row.
        enough: Function of totals and valid rows that returns which rows have one.
        step: The step.
        advantages: The advantages to divide [N, 1] or [N, T].
    """
    size = step.set_size("scale") or 1
    std = in_sets(partial(deviation, ddof=step.estimator.scale_ddof), size, step.totals, step.valid)
    usable = in_sets(enough, size, step.totals, step.valid)
    return divide(advantages, std[:, None], step.estimator.scale_eps), usable


def token_whiten(step: Step, advantages: Float[Tensor, " N *T"]) -> Scaled:
    """Return `(A - mean)/(std + eps)`, with mean and standard deviation over all tokens of the step.

    A row counts once for each of its tokens (REINFORCE++, Hu et al. 2025, arXiv 2501.03262).
    """
    tokens, inside = advantages.expand(step.actions.shape).reshape(1, -1), step.actions.reshape(1, -1)
    mean, std = set_mean(tokens, inside)[:, :1], set_std(tokens, inside, step.estimator.scale_ddof)[:, :1]
    return divide(advantages - mean, std, step.estimator.scale_eps), step.valid


def episode_std(step: Step, advantages: Float[Tensor, " N *T"]) -> Scaled:
    """Divide by the standard deviation of the returns of the row's own steps."""
    returns = step.returns.expand_as(step.actions)
    std = set_std(returns, step.actions, step.estimator.scale_ddof)[:, :1]
    return divide(advantages, std, step.estimator.scale_eps), step.valid


SCALES: dict[str, Callable[[Step, Tensor], Scaled]] = {
    "none": lambda step, advantages: (advantages, step.valid),
    "group_std": partial(by_sets, set_std, has_others_in_set),
    "batch_std": partial(by_sets, set_std, has_others_in_set),
    "loo_std": partial(by_sets, others_std, partial(has_others_in_set, others=2)),
    "other_groups_std": partial(by_sets, other_sets_std, has_rows_in_other_sets),
    "token_whiten": token_whiten,
    "episode_std": episode_std,
}
"""The formula of each name in `choices.CHOICES["scale"]`."""
