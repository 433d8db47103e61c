"""Draws tokens by inverting the CDF of their probabilities at uniform random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenrl.language.rollout.rollout import to_device

BLOCK = 256
"""Tokens of a block; a larger vocabulary is drawn from in two steps, first a block and then a token of it."""
UNIT, UNIFORM_BITS = 40, 31
"""On a device probabilities are whole numbers of 2**-UNIT, and uniforms whole numbers of 2**-UNIFORM_BITS."""


def on_device(uniforms: Tensor, device: torch.device) -> Tensor:
    """Return uniforms [N, T] as `draw` takes them: float64 on a CPU, whole numbers on a device."""
    if device.type == "cpu":
        return uniforms
    return to_device((uniforms * 2**UNIFORM_BITS).long(), device)


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting the CDF; a token of probability 0 is never drawn.

    With the rounding errors of float32, a CDF could draw another token, or one of probability 0 where a
    device adds in another order. So the sums are in float64 on a CPU. A device may have no float64; there the
    probabilities are whole numbers, whose sums are exact. For a large vocabulary a CPU converts only the sums
    of blocks, and the probabilities of one block per row.

    Args:
        p: probabilities [n, V].
        uniforms: random numbers in [0, 1) [n], in float64 or as whole numbers of 2**-UNIFORM_BITS.

    Returns:
        The tokens [n].
    """
    exact = not uniforms.is_floating_point()
    if exact:
        p = (p * 2**UNIT).long()
    vocabulary = p.shape[1]
    if vocabulary <= BLOCK:
        cdf = _cdf(p, uniforms)
        return _invert(cdf, _threshold(cdf[:, -1], uniforms))
    whole = vocabulary // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2)  # [n, blocks]
    if whole < vocabulary:
        sums = torch.cat([sums, p[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    cdf = _cdf(sums, uniforms)
    threshold = _threshold(cdf[:, -1], uniforms)
    block = _invert(cdf, threshold)
    inside = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)  # [n, BLOCK]
    values = torch.where(inside < vocabulary, p.gather(1, inside.clamp(max=vocabulary - 1)), 0)
    chosen = sums.gather(1, block[:, None]).to(uniforms.dtype).squeeze(1)
    rest = threshold - (cdf.gather(1, block[:, None]).squeeze(1) - chosen)
    cdf = _cdf(values, uniforms)
    if not exact:  # what is left of the uniform within its block is again uniform
        share = (rest / chosen).clamp(0, 1 - torch.finfo(uniforms.dtype).eps)
        rest = _threshold(cdf[:, -1], share)
    return block * BLOCK + _invert(cdf, rest)


def _cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    return p.to(uniforms.dtype).cumsum(dim=1)


def _threshold(total: Tensor, uniforms: Tensor) -> Tensor:
    """Return the product of a CDF's total [n] and the uniforms [n], which is below the total."""
    if uniforms.is_floating_point():
        return uniforms * total  # rounding leaves the total near 1 and not at 1
    # So many bits of the total are left out that the product has 63 bits.
    spare = UNIT - UNIFORM_BITS
    return ((total >> spare) * uniforms) >> (UNIFORM_BITS - spare)


def _invert(cdf: Tensor, threshold: Tensor) -> Tensor:
    """Return in each row the first entry [n] below whose end in the CDF [n, V] the threshold [n] lies."""
    # right=True finds the first entry above the threshold, so a token of probability 0 is never chosen.
    index = torch.searchsorted(cdf, threshold[:, None], right=True).squeeze(1)
    return index.clamp(max=cdf.shape[1] - 1)
