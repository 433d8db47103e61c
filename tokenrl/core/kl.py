"""Estimates of KL(pi || ref) from a token the policy sampled, with `l = log pi - log ref`.

Schulman's names. k1 and k3 have the KL as their mean, k2 has not; their gradients are another matter, and
depend on whether the estimate is put in the reward or in the loss: see `bias`. Nothing is clamped: a clamp
on the value silently sets the gradient to zero where the policies differ most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "*N T"], ref_logprobs: Float[Tensor, "*N T"]) -> Float[Tensor, "*N T"]:
    """Estimate by `l`: without bias, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "*N T"], ref_logprobs: Float[Tensor, "*N T"]) -> Float[Tensor, "*N T"]:
    """Estimate by `l^2 / 2`: biased in value; its gradient in a loss is `l grad log pi`."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, "*N T"], ref_logprobs: Float[Tensor, "*N T"]) -> Float[Tensor, "*N T"]:
    """Estimate by `exp(-l) - 1 + l`: without bias, never negative."""
    log_ratio = logprobs - ref_logprobs
    return torch.expm1(-log_ratio) + log_ratio


PER_TOKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
