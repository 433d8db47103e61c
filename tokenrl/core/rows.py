"""Decides which rows and tokens of a step count: masks, truncations, groups of equal rewards, long rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.core.refusals import check_groups
from tokenrl.errors import Refused

T = TypeVar("T")
LARGE_REWARD = 4096.0
"""Rewards from this size on are not rounded to float32, since small rewards and KLs that are added would be lost."""
Mask = Float[Tensor, "N T"] | Bool[Tensor, "N T"]
"""1 (or True) where the policy chose the token."""


def required(name: str, value: T | None, purpose: str) -> T:
    """Return an input that the estimator needs.

    Raises:
        Refused: When it is missing.
    """
    if value is None:
        raise Refused(
            f"{name} was not given, and {purpose} needs it. Pass it, or take another estimator."
        )
    return value


def completion_mask(
    completion_ids: Int[Tensor, "N T"],
    eos_ids: Sequence[int],
    lengths: Int[Tensor, " N"] | None = None,
) -> Bool[Tensor, "N T"]:
    """Mark the tokens up to and including the first EOS of each row.

    To end is an action like any other, so the EOS is inside the mask. The mask is never found by comparison
    with the padding token: where that equals an EOS, as is common, the EOS would be left out of training.

    With `eos_ids=(2, 3)`::

        completion_ids   [[5, 2, 2, 2],      mask   [[1, 1, 0, 0],    the padding looks like an EOS
                          [5, 3, 6, 2],              [1, 1, 0, 0],    either id ends the row
                          [5, 6, 7, 8],              [1, 1, 1, 1],    cut off by the length
                          [2, 2, 2, 2]]              [1, 0, 0, 0]]    ended at once: one action

    Args:
        completion_ids: Token ids, padded on the right with anything.
        eos_ids: Every id that ends a completion; empty for a model that never ends by itself.
        lengths: Number of tokens generated in each row [N], for rows that may end earlier than the width
            without an EOS.

    Returns:
        The mask, boolean.
    """
    ends = torch.tensor(list(eos_ids), dtype=completion_ids.dtype, device=completion_ids.device)
    ended = torch.isin(completion_ids, ends)
    mask = ended.cumsum(-1) - ended.long() == 0  # no EOS strictly before
    if lengths is not None:
        positions = torch.arange(completion_ids.shape[-1], device=completion_ids.device)
        mask = mask & (positions < lengths[..., None])
    return mask


def zero_outside(
    x: Float[Tensor, "*shape"], inside: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return x with 0 in place of everything outside, also of nan and infinity.

    A product with the mask would keep these (0 * nan is nan), in the value and in the gradient, so this
    function is applied before any arithmetic.
    """
    return torch.where(inside, x, torch.zeros((), dtype=x.dtype, device=x.device))


def unrounded(rewards: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Return rewards, which may hold nan, in a precision that rounds none of them: `dtype`, or else their own.

    Advantages are differences of rewards, so 10^9 and 10^9 + 1 must not become equal.
    """
    narrow = rewards.to(dtype)
    is_kept = (narrow == rewards) & (rewards.abs() < LARGE_REWARD)
    return narrow if bool((is_kept | rewards.isnan()).all()) else rewards


def from_first(
    totals: Float[Tensor, "*S n"], valid: Bool[Tensor, "*S n"]
) -> tuple[Float[Tensor, "*S n"], Float[Tensor, "*S 1"]]:
    """Subtract from each set the total of its first valid row.

    Returns:
        The differences (0 in rows that are not valid) and the total of the first valid row.
    """
    index = valid.long().argmax(-1, keepdim=True)  # argmax returns the first maximum
    first = totals.gather(-1, index)
    return zero_outside(totals - first, valid), first


def sums_from(x: Float[Tensor, "*S n"]) -> Float[Tensor, "*S n"]:
    """Return `sum_{u >= t} x_u` for each t."""
    return x.flip(-1).cumsum(-1).flip(-1)


def in_rows(numbers: Float[Tensor, " M"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Place the numbers of M actions in rows of zeros, where the mask is True."""
    if mask.all():
        return numbers.reshape(mask.shape)
    return numbers.new_zeros(mask.shape).masked_scatter(mask, numbers)


def keep(
    rewards: Float[Tensor, " N *T"],
    mask: Mask,
    *,
    masks_truncated: bool,
    skips_equal_groups: bool,
    group_size: int | None,
    valid: Bool[Tensor, " N"] | None = None,
    truncated: Bool[Tensor, " N"] | None = None,
) -> tuple[Bool[Tensor, " N"], Bool[Tensor, "N T"]]:
    """Return which rows of a step count in the divisor, and which of their actions are in the gradient.

    A truncated row that is masked stays in baselines and divisors and has no gradient. A group of equal rewards
    that is skipped (also one that should have been refilled, but was not) stays in baselines and scales but not
    in the divisor: the loss is divided by the number of the remaining rows.

    Args:
        rewards: As given to `Estimator.advantages` [N] or [N, T].
        mask: 1 where the token is an action of the policy [N, T].
        masks_truncated: Whether truncated rows have no gradient.
        skips_equal_groups: Whether groups of equal rewards are skipped.
        group_size: Number of consecutive rows per prompt; None if rows do not share prompts.
        valid: False where a row abstains [N].
        truncated: True where a row was cut off at the maximum length [N].

    Raises:
        Refused: When `truncated` is needed and missing, or rows do not fall into groups.
    """
    actions = mask.bool()
    in_divisor = actions.new_ones(len(actions)) if valid is None else valid.bool()
    if masks_truncated:
        cut = required("truncated", truncated, "truncations 'mask'").bool()
        actions = actions & ~cut[:, None]
    if skips_equal_groups:
        equal = zero_spread(rewards, group_size, in_divisor)
        in_divisor = in_divisor & ~equal.repeat_interleave(len(actions) // len(equal))
    return in_divisor, actions & in_divisor[:, None]


class Advantages(NamedTuple):
    """What multiplies the scores, and the targets of a critic."""

    policy: Float[Tensor, " N *T"]
    """Advantages: [N] if all actions of a row share one, else [N, T]; 0 in rows without a gradient."""
    returns: Float[Tensor, "N T"]
    """The return from each position on [N, T], with what is added to the rewards: a critic's targets."""


class LossTerms(NamedTuple):
    """What `Estimator.loss` takes beside log-probabilities and entropies, for a whole step."""

    advantages: Float[Tensor, " N *T"]
    weights: Float[Tensor, "N T"]
    """The weights of an update that learns from all rows."""
    in_gradient: Bool[Tensor, "N T"]
    """The actions that are learnt from, after `truncations` and `zero_spread` have been applied."""
    in_divisor: Bool[Tensor, " N"]
    """The rows that the loss is divided by."""
    returns: Float[Tensor, "N T"]
    """The targets of a critic."""

    def to(self, dtype: torch.dtype) -> LossTerms:
        """Return the terms in the precision of the loss, whatever the rewards have."""
        names = ("advantages", "weights", "returns")
        return self._replace(**{name: getattr(self, name).to(dtype) for name in names})


def token_weights(
    mask: Mask,
    *,
    aggregation: str,
    max_length: int | None,
    valid: Bool[Tensor, " N"] | None = None,
    chosen: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, "N T"]:
    """Return the weight of every token of the whole step; the losses of slices add up to that of the step.

    With m the mask, L_i the number of actions of row i, and N the number of valid rows::

        sequence_sum  m / N                 sequence_mean  m / (N L_i)
        token_mean    m / sum_i L_i         fixed_length   m / (N max_length)

    N counts every valid row, also one without any action: it was sampled, and its gradient is zero. Rows that
    are not valid get weight 0 and count nowhere. 'fixed_length' (Dr. GRPO, arXiv 2503.20783) never divides by
    the padded width, which depends on what was sampled and would bias the gradient.

    Args:
        mask: 1 where the token is an action of the policy [N, T].
        aggregation: One of the four.
        max_length: The largest number of actions that a row may have, for the aggregation 'fixed_length'.
        valid: False where a row counts nowhere [N]; None if all rows count.
        chosen: False where a row does not belong to the update [N]; None for an update of the whole step.

    Raises:
        Refused: When the aggregation is 'fixed_length' and no length is given.
    """
    if aggregation == "fixed_length" and (max_length is None or max_length < 1):
        raise Refused(
            f"'fixed_length' divides by max_length, the most actions of a row; it is {max_length}."
        )
    rows_of_update = mask.new_ones(len(mask)).bool() if valid is None else valid.bool()
    if chosen is not None:
        rows_of_update = rows_of_update & chosen
    actions = mask.bool() & rows_of_update[:, None]
    lengths = actions.sum(-1, keepdim=True)
    # Of the whole update: never divide a slice by its own rows.
    rows = rows_of_update.sum().clamp(min=1)
    divisors = {
        "sequence_sum": rows,
        "fixed_length": rows * (max_length or 1),
        "token_mean": lengths.sum().clamp(min=1),
        "sequence_mean": rows * lengths.clamp(min=1),
    }
    dtype = mask.dtype if mask.is_floating_point() else torch.get_default_dtype()
    return actions.to(dtype) / divisors[aggregation]


def zero_spread(
    rewards: Float[Tensor, " N *T"], group_size: int | None, valid: Bool[Tensor, " N"]
) -> Bool[Tensor, " B"]:
    """Return which groups have equal rewards in all valid rows, or fewer than two valid rows.

    Raises:
        Refused: When rows do not fall into groups of two or more.
    """
    totals = rewards.sum(-1) if rewards.ndim == 2 else rewards
    size = check_groups("zero_spread", len(totals), group_size)
    differences, _ = from_first(totals.reshape(-1, size), valid.reshape(-1, size))
    return (differences == 0).all(-1)  # exact: a standard deviation would suffer from rounding


def overlong_penalty(
    lengths: Int[Tensor, " N"], max_length: int, buffer: int
) -> Float[Tensor, " N"]:
    """Return the penalty that is added to the reward: 0 up to `max_length - buffer`, then down to -1.

    It is `-(L - (max_length - buffer)) / buffer`, clipped to [-1, 0], for a row of length L (DAPO, arXiv
    2503.14476, eq. 13). It is part of the reward, so it is added before the baseline is computed.
    """
    return -((lengths - (max_length - buffer)) / buffer).clamp(0.0, 1.0)
