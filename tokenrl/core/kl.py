"""Estimates of KL(pi || ref) from tokens the policy sampled, with `l = log pi - log ref`.

k1, k2, k3 are Schulman's names, one number a token. k1 and k3 have the KL as their mean, k2 has not; their
gradients are another matter, and depend on whether the estimate is put in the reward or in the loss: see
`bias`. The two that look at the whole sequence have the gradient of its KL when they are in the loss. Nothing
is clamped: a clamp on the value silently sets the gradient to zero where the policies differ most.

All take log-probabilities that are 0, in both, where the position is no action.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tokenrl.core.returns import reward_to_go


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


def k2_sequence(logprobs: Float[Tensor, "N T"], ref_logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Share `(sum_t l_t)^2 / 2` out over the tokens: `l_t sum_u l_u / 2`.

    Its gradient in a loss, `(sum_t l_t) grad log pi(y)`, has the gradient of the sequence's KL as its mean.
    """
    log_ratio = logprobs - ref_logprobs
    return log_ratio * log_ratio.sum(-1, keepdim=True) / 2


def full_path(logprobs: Float[Tensor, "N T"], ref_logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Have the value of k1 and the gradient `(sum_{u >= t} l_u) grad log pi_t`.

    In the mean this is the gradient of the sequence's KL, like `k2_sequence`, without the log ratios of
    earlier tokens, which do not depend on this one and only add noise.
    """
    log_ratio = (logprobs - ref_logprobs).detach()
    return log_ratio + reward_to_go(log_ratio) * (logprobs - logprobs.detach())


PER_TOKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k2_sequence": k2_sequence,
    "full_path": full_path,
}
