"""Decides which rows and tokens of a step count: masks, truncations, groups of equal rewards, long rows.

A mask is 1 (or True) where the policy chose the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.core.choices import required
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator

ALONE = "choose the baseline 'running_mean', 'constant' or 'none', with the scale 'none'"
"""What to do where there are no other rows to compare with."""


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
    ended = (completion_ids[..., None] == ends).any(-1)
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


def from_first(
    totals: Float[Tensor, "*S n"], valid: Bool[Tensor, "*S n"]
) -> tuple[Float[Tensor, "*S n"], Float[Tensor, "*S 1"]]:
    """Subtract from each set the total of its first valid row.

    Returns:
        The differences (0 in rows that are not valid) and the total of the first valid row.
    """
    first = totals.gather(
        -1, valid.long().argmax(-1, keepdim=True)
    )  # argmax returns the first maximum
    return zero_outside(totals - first, valid), first


def in_rows(numbers: Float[Tensor, " M"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Place the numbers of M actions in rows of zeros, where the mask is True."""
    if mask.all():
        return numbers.reshape(mask.shape)
    return numbers.new_zeros(mask.shape).masked_scatter(mask, numbers)


class Kept(NamedTuple):
    """The rows and actions that count after `truncations` and `zero_spread` have been applied."""

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
    """Return which rows and actions of a step count, by the fields `truncations` and `zero_spread`.

    A truncated row that is masked stays in baselines and divisors and has no gradient. A group of equal rewards
    that is dropped (or should have been refilled, but was not) stays in baselines and scales but not in the
    divisor: the loss is divided by the number of the remaining rows.

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
    valid = actions.new_ones(len(actions)) if valid is None else valid.bool()
    if estimator.truncations != "keep":
        cut = required("truncated", truncated, f"truncations {estimator.truncations!r}").bool()
        actions = actions & ~cut[:, None]
    counted = valid  # with 'keep', groups of equal rewards count: they were sampled
    if estimator.zero_spread != "keep":
        dead = zero_spread(rewards, group_size, valid)
        counted = counted & ~dead.repeat_interleave(len(actions) // len(dead))
    return Kept(counted, actions & counted[:, None])


class LossTerms(NamedTuple):
    """What `Estimator.loss` takes beside log-probabilities and entropies, for a whole step."""

    advantages: Float[Tensor, " N *T"]
    weights: Float[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    returns: Float[Tensor, "N T"]
    """The targets of a critic."""


def loss_terms(
    estimator: Estimator,
    rewards: Float[Tensor, " N *T"],
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
    *,
    group_size: int | None,
    max_length: int,
    valid: Bool[Tensor, " N"] | None = None,
    truncated: Bool[Tensor, " N"] | None = None,
    **inputs: Any,
) -> LossTerms:
    """Apply `keep` to a step and return its advantages, weights and mask.

    Args:
        estimator: The estimator.
        rewards: As given to `Estimator.advantages` [N] or [N, T].
        mask: 1 where the token is an action of the policy [N, T].
        group_size: Number of consecutive rows per prompt; None if rows do not share prompts.
        max_length: The largest number of actions that a row may have.
        valid: False where a row abstains [N].
        truncated: True where a row was cut off at the maximum length [N].
        **inputs: Further arguments of `Estimator.advantages`.
    """
    kept_rows = keep(
        estimator, rewards, mask, group_size=group_size, valid=valid, truncated=truncated
    )
    sizes: dict[str, Any] = {"group_size": group_size, "max_length": max_length}
    advantages, returns = estimator.advantages(rewards, mask, valid=valid, **sizes, **inputs)
    weights = estimator.token_weights(
        kept_rows.mask.to(advantages.dtype), max_length=max_length, valid=kept_rows.counted
    )
    return LossTerms(advantages, weights, kept_rows.mask, returns)


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


def check_groups(choice: str, rows: int, group_size: int | None) -> int:
    """Return the group size; refuse rows that do not fall into groups of two or more.

    Args:
        choice: The baseline or scale that compares the rows of a group.
        rows: Rows in the step.
        group_size: Consecutive rows per prompt; None if there are no groups.

    Raises:
        Refused: Without groups, with groups of one, or when `rows` is no multiple of `group_size`.
    """
    if group_size is None or group_size < 2:
        raise Refused(
            f"{choice!r} compares the rows of a group, but group_size is {group_size}. Take two or more "
            f"(num_generations; in control num_envs), or {ALONE}."
        )
    if rows % group_size:
        raise Refused(f"{rows} rows are no multiple of group_size {group_size}; give whole groups.")
    return group_size


def overlong_penalty(
    lengths: Int[Tensor, " N"], max_length: int, buffer: int
) -> Float[Tensor, " N"]:
    """Return the penalty that is added to the reward: 0 up to `max_length - buffer`, then down to -1.

    It is `-(L - (max_length - buffer)) / buffer`, clipped to [-1, 0], for a row of length L (DAPO, arXiv
    2503.14476, eq. 13). It is part of the reward, so it is added before the baseline is computed.
    """
    return -((lengths - (max_length - buffer)) / buffer).clamp(0.0, 1.0)
