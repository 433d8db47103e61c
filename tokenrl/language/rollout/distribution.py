"""Computes the distribution of the next token from its logits, for sampling and for scoring alike."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Tokens of a block; a larger vocabulary is drawn from in two steps, first a block and then a token of it."""


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., V] of logits [..., V] at a temperature, computed in float32 or better."""
    # The logsumexp over a large vocabulary loses too many digits in half precision.
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting the CDF; a token of probability 0 is never drawn.

    The uniforms are float64, since rounding errors of a float32 CDF could change which token is drawn. For a
    large vocabulary only the sums of blocks are converted, and the probabilities of one block a row.

    Args:
        p: probabilities [n, V].
        uniforms: random numbers in [0, 1) [n].

    Returns:
        The tokens [n].
    """
    vocabulary = p.shape[1]
    if vocabulary <= BLOCK:
        return _invert(_cdf(p, uniforms), uniforms)
    whole = vocabulary // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2)  # [n, blocks]
    if whole < vocabulary:
        sums = torch.cat([sums, p[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    cdf = _cdf(sums, uniforms)
    block = _invert(cdf, uniforms)
    inside = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)  # [n, BLOCK]
    values = torch.where(inside < vocabulary, p.gather(1, inside.clamp(max=vocabulary - 1)), 0)
    # What is left of the uniform within its block is again uniform.
    chosen = sums.gather(1, block[:, None]).to(uniforms.dtype).squeeze(1)
    below = cdf.gather(1, block[:, None]).squeeze(1) - chosen
    rest = ((uniforms * cdf[:, -1] - below) / chosen).clamp(0, 1 - torch.finfo(uniforms.dtype).eps)
    return block * BLOCK + _invert(_cdf(values, uniforms), rest)


def _cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    return p.to(uniforms.dtype).cumsum(dim=1)


def _invert(cdf: Tensor, uniforms: Tensor) -> Tensor:
    """Return in each row the first entry [n] below whose end in the CDF [n, V] the uniform lies."""
    # Rounding leaves the total, the last entry, near 1 and not at 1, so the uniform is scaled by it.
    # right=True finds the first entry above the draw, so a token of probability 0 is never chosen.
    index = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(1)
    return index.clamp(max=cdf.shape[1] - 1)
