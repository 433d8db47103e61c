"""Decides which rows of a step are learnt from: truncations, groups of equal rewards, long completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.core import guards
from tokenrl.core.sets import from_first

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


class Kept(NamedTuple):
    """The rows and actions that are left when `truncations` and `zero_spread` have been applied."""

    compared: Bool[Tensor, " N"]
    """`valid` of `Estimator.advantages`: the rows that baselines and scales use."""
    counted: Bool[Tensor, " N"]
    """`valid` of `Estimator.token_weights`: the rows that the loss is divided by."""
    mask: Bool[Tensor, "N T"]
    """`mask` of `Estimator.token_weights` and `Estimator.loss`: the actions that are learnt from."""


def keep(
    estimator: Estimator,
    rewards: Float[Tensor, " N *T"],
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
    *,
    group_size: int | None,
    valid: Bool[Tensor, " N"] | None = None,
    truncated: Bool[Tensor, " N"] | None = None,
) -> Kept:
    """Apply the fields `truncations` and `zero_spread` to a step.

    A truncated row that is masked stays in baselines and divisors and has no gradient; one that is dropped
    counts nowhere. A group of equal rewards that is dropped (or should have been refilled, but was not) stays
    in baselines and scales but not in the divisor, so the loss is divided by the number of rows that are
    left.

    Args:
        estimator: The estimator whose fields are applied.
        rewards: As given to `Estimator.advantages` [N] or [N, T].
        mask: 1 where the token is an action of the policy [N, T].
        group_size: Number of consecutive rows per prompt; None if rows do not share prompts.
        valid: False where a row abstains [N].
        truncated: True where a row was cut off at the maximum length [N].

    Raises:
        Refused: When truncations are not kept and `truncated` is missing, or rows do not fall into groups.
    """
    actions = mask.bool()
    compared = actions.new_ones(len(actions)) if valid is None else valid.bool()
    if estimator.truncations != "keep":
        cut = guards.given("truncated", truncated, f"truncations {estimator.truncations!r}").bool()
        if estimator.truncations == "drop":
            compared = compared & ~cut
        actions = actions & ~cut[:, None]
    counted = compared  # with 'keep', groups of equal rewards count: they were sampled
    if estimator.zero_spread != "keep":
        dead = zero_spread(rewards, group_size, compared)
        counted = counted & ~dead.repeat_interleave(len(actions) // len(dead))
    return Kept(compared, counted, actions & counted[:, None])


def zero_spread(
    rewards: Float[Tensor, " N *T"], group_size: int | None, valid: Bool[Tensor, " N"]
) -> Bool[Tensor, " B"]:
    """Return which groups have equal rewards in all valid rows, or fewer than two valid rows.

    Raises:
        Refused: When rows do not fall into groups of two or more.
    """
    totals = rewards.sum(-1) if rewards.ndim == 2 else rewards
    size = guards.check_groups("zero_spread", len(totals), group_size)
    differences, _ = from_first(totals.reshape(-1, size), valid.reshape(-1, size))
    return (differences == 0).all(-1)  # exact: a standard deviation would suffer from rounding


def overlong_penalty(lengths: Int[Tensor, " N"], max_length: int, buffer: int) -> Float[Tensor, " N"]:
    """Return the penalty that is added to the reward: 0 up to `max_length - buffer`, then down to -1.

    It is `-(L - (max_length - buffer)) / buffer`, clipped to [-1, 0], for a row of length L (DAPO, arXiv
    2503.14476, eq. 13). It is part of the reward, so it is added before the baseline is computed.
    """
    return -((lengths - (max_length - buffer)) / buffer).clamp(0.0, 1.0)


def in_rows(numbers: Float[Tensor, " M"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Place the numbers of M actions in rows of zeros, where the mask is True."""
    if mask.all():
        return numbers.reshape(mask.shape)
    return numbers.new_zeros(mask.shape).masked_scatter(mask, numbers)
