"""Marks the positions that are actions of the policy. A mask is 1 (or True) where it chose the token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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


def zero_outside(x: Float[Tensor, "*shape"], inside: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Set everything outside to 0, also nan and infinity.

    A product with the mask would keep them (0 * nan is nan), in the value and in the gradient. Therefore this
    is applied before any arithmetic.
    """
    return torch.where(inside, x, torch.zeros((), dtype=x.dtype, device=x.device))
