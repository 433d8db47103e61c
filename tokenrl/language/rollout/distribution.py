"""The distribution of the next token, from its logits: what sampling and scoring both compute from it."""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., V] at a temperature, in float32 at least."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def score_norm_of(chosen: Tensor, p: Tensor) -> Tensor:
    """Squared norm [...] of the score in logit space, `|onehot - p|^2 = 1 - 2 p(a) + sum_v p(v)^2`.

    Args:
        chosen: log-probability of the token that was taken [...].
        p: probabilities of all tokens [..., V].
    """
    return 1 - 2 * chosen.exp() + p.square().sum(dim=-1)
