"""Estimates KL(pi || ref), from the sampled tokens or in closed form, and holds it near a target.

sg(x) denotes x without its gradient (stop-gradient), and l the log ratio `log pi - log ref` of a token that the
policy sampled. k1, k2 and k3 are Schulman's names (2020, Approximating KL divergence,
joschu.net/blog/kl-approx.html). The mean of k1 and of k3 is the KL, that of k2 is not. The bias of the
gradient is a separate question: it depends on whether the estimate is in the reward or in the loss, see
`choices`. No value is clamped, because a clamp sets the gradient to zero where the policies differ most.
Log-probabilities must be 0 where the position is not an action.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tokenrl.core.returns import reward_to_go


def k1(
    logprobs: Float[Tensor, "*N T"], ref_logprobs: Float[Tensor, "*N T"]
) -> Float[Tensor, "*N T"]:
    """Return `l`: its mean is the KL, and a single value may be negative."""
    return logprobs - ref_logprobs


def k2(
    logprobs: Float[Tensor, "*N T"], ref_logprobs: Float[Tensor, "*N T"]
) -> Float[Tensor, "*N T"]:
    """Return `l^2 / 2`: its mean is not the KL; its gradient in a loss is `l grad log pi`."""
    return (logprobs - ref_logprobs).square() / 2


def k3(
    logprobs: Float[Tensor, "*N T"], ref_logprobs: Float[Tensor, "*N T"]
) -> Float[Tensor, "*N T"]:
    """Return `exp(-l) - 1 + l`: its mean is the KL, and it is never negative."""
    log_ratio = logprobs - ref_logprobs
    # Near the reference exp(-l) - 1 would lose its digits to cancellation and k3 could be negative; expm1
    # does not.
    return torch.expm1(-log_ratio) + log_ratio


def k2_sequence(
    logprobs: Float[Tensor, "N T"], ref_logprobs: Float[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """Return each token's share of `(sum_t l_t)^2 / 2`: `l_t sum_u l_u / 2`.

    In a loss the sum over tokens has the gradient `(sum_t l_t) grad log pi(y)`, whose mean is the gradient of
    the KL of the whole sequence.
    """
    log_ratio = logprobs - ref_logprobs
    # Both factors carry a gradient, so the gradient of the sum over t is (sum_t l_t) grad log pi(y).
    return log_ratio * log_ratio.sum(-1, keepdim=True) / 2


def full_path(
    logprobs: Float[Tensor, "N T"], ref_logprobs: Float[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """Return k1 in value, with the gradient `(sum_{u >= t} l_u) grad log pi_t`.

    The mean of this gradient is that of the KL of the whole sequence, as for `k2_sequence`. The log ratios of
    earlier tokens are left out, because they do not depend on this token and only add noise.
    """
    log_ratio = (logprobs - ref_logprobs).detach()
    # The second term is 0 in value; its gradient is the sum of the log ratios from t on times the score.
    return log_ratio + reward_to_go(log_ratio) * (logprobs - logprobs.detach())


def closed_form_path(
    logprobs: Float[Tensor, "N T"], token_kl: Float[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """Return `KL_t` in value, with the gradient `grad KL_t + (sum_{u > t} KL_u) grad log pi_t`.

    The mean of this gradient is the gradient of the KL of the whole sequence. `full_path` has sampled log ratios
    where this has their means at each prefix. These usually have less noise, but what a sampled token adds may
    also cancel against other terms, where prefixes share parameters. MiniLLM (Gu et al. 2024, arXiv 2306.08543)
    takes such a mean for the token itself and sampled log ratios for later tokens.

    Args:
        logprobs: log pi of the sampled tokens.
        token_kl: `kl_of` at the prefix of each token, with a gradient.
    """
    values = token_kl.detach()
    later = reward_to_go(values) - values
    return token_kl + later * (logprobs - logprobs.detach())


def kl_of(
    logprobs: Float[Tensor, "*N V"],
    probabilities: Float[Tensor, "*N V"],
    ref_logprobs: Float[Tensor, "*N V"],
) -> Float[Tensor, " *N"]:
    """Return `KL(pi || ref) = sum_v p_v (log p_v - log ref_v)` in nats; a token of probability 0 adds 0.

    Args:
        logprobs: log p of all tokens; it may be -inf.
        probabilities: p, the exponential of the first.
        ref_logprobs: log ref of all tokens; it must be finite where p is above 0.
    """
    return (probabilities * (logprobs.clamp(min=-1e4) - ref_logprobs.clamp(min=-1e4))).sum(-1)


LARGEST_ERROR = 0.2
"""The relative error of the KL at which `next_beta` clips: beyond it beta moves no faster."""

LEAST_BETA = 1e-8
"""The lower bound of beta, because from 0 it could never rise again."""


def next_beta(beta: float, kl: float, *, target: float, gain: float = 0.1) -> float:
    """Move beta so that the KL nears its target: `beta (1 + gain clip((KL - target)/target, -0.2, 0.2))`.

    This is the proportional controller of Ziegler et al. 2019 (arXiv 1909.08593), with their gain of 0.1.
    Given the past, the beta of a step is a constant, so its gradient is as exact as with a fixed beta. Two
    things to know: a run starts at its reference, where the KL is 0, so beta falls at first; and beta
    accumulates past errors while the KL responds late, so a large gain makes both oscillate.

    Args:
        beta: Weight of the KL in the step just made, above 0.
        kl: The KL measured in that step, in nats per completion; nan leaves beta unchanged.
        target: The KL that is wanted, in nats per completion, above 0.
        gain: Above 0, and below 5 so that beta stays positive. Beta changes by at most gain / 5 per step,
            relatively.

    Returns:
        The weight of the KL in the next step, at least `LEAST_BETA`.
    """
    if math.isnan(kl):
        return beta
    error = min(max((kl - target) / target, -LARGEST_ERROR), LARGEST_ERROR)
    return max(beta * (1 + gain * error), LEAST_BETA)
