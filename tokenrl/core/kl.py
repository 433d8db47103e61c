"""Estimates of KL(pi || ref) from tokens the policy sampled, with `l = log pi - log ref`.

k1, k2, k3 are Schulman's names, one number a token. k1 and k3 have the KL as their mean, k2 has not; their
gradients are another matter, and depend on whether the estimate is put in the reward or in the loss: see
`choices`. The two that look at the whole sequence have the gradient of its KL when they are in the loss.
Nothing is clamped: a clamp on the value silently sets the gradient to zero where the policies differ most.

All take log-probabilities that are 0, in both, where the position is no action.

`statistics.mean_and_error` makes a mean over completions of such numbers, and `next_beta` holds it near a
target.
"""

from __future__ import annotations

import math
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
    # expm1: near the reference exp(-l) - 1 would cancel to noise, and could turn negative
    return torch.expm1(-log_ratio) + log_ratio


def k2_sequence(logprobs: Float[Tensor, "N T"], ref_logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Share `(sum_t l_t)^2 / 2` out over the tokens: `l_t sum_u l_u / 2`.

    Its gradient in a loss, `(sum_t l_t) grad log pi(y)`, has the gradient of the sequence's KL as its mean.
    """
    log_ratio = logprobs - ref_logprobs
    # summed over t this is (sum_t l_t)^2 / 2: both factors carry the gradient, hence the half
    return log_ratio * log_ratio.sum(-1, keepdim=True) / 2


def full_path(logprobs: Float[Tensor, "N T"], ref_logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Have the value of k1 and the gradient `(sum_{u >= t} l_u) grad log pi_t`.

    In the mean this is the gradient of the sequence's KL, like `k2_sequence`, without the log ratios of
    earlier tokens, which do not depend on this one and only add noise.
    """
    log_ratio = (logprobs - ref_logprobs).detach()
    # the second term is 0 in value; in the gradient it is the KL still to come times the score
    return log_ratio + reward_to_go(log_ratio) * (logprobs - logprobs.detach())


PER_TOKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k2_sequence": k2_sequence,
    "full_path": full_path,
}

LARGEST_ERROR = 0.2
"""The relative error of the KL that `next_beta` answers to: beyond it beta moves no faster."""
LEAST_BETA = 1e-8
"""Below it beta does not fall: at 0 it could never rise again."""


def next_beta(beta: float, kl: float, *, target: float, gain: float = 0.1) -> float:
    """Move beta so that the KL comes to its target: `beta (1 + gain clip((KL - target)/target, -0.2, 0.2))`.

    The proportional controller of Ziegler et al. 2019 (arXiv 1909.08593), whose gain is 0.1. Given the past,
    a step's beta is a constant, so each step's gradient is as exact as with a fixed beta. Two things to know:
    a run starts at its reference, where the KL is 0, so beta falls at first; and beta adds up past errors
    while the KL answers late, so a large gain makes both swing.

    Args:
        beta: Weight of the KL in the step just made, above 0.
        kl: Measured in that step, in nats a completion; nan moves nothing.
        target: Wanted, in nats a completion, above 0.
        gain: Largest relative change is a fifth of it a step; above 0 and below 5, that beta stays above 0.

    Returns:
        Weight of the KL in the next step, `LEAST_BETA` or more.
    """
    if math.isnan(kl):
        return beta
    error = min(max((kl - target) / target, -LARGEST_ERROR), LARGEST_ERROR)
    return max(beta * (1 + gain * error), LEAST_BETA)
