"""Computes the distribution of the next token from its logits, for sampling and for scoring alike."""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., V] of logits [..., V] at a temperature, computed in float32 or better."""
    # The logsumexp over a large vocabulary loses too many digits in half precision.
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def score_norm_of(chosen: Tensor, p: Tensor) -> Tensor:
    """Squared norm [...] of the score, the gradient of `log p(a)` with respect to the logits.

    That gradient is `onehot(a) - p`, so its squared norm is `1 - 2 p(a) + sum_v p(v)^2`.

    Args:
        chosen: log-probability `log p(a)` of the token `a` that was sampled [...].
        p: probabilities of all tokens [..., V].
    """
    return 1 - 2 * chosen.exp() + p.square().sum(dim=-1)
