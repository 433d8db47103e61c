"""Weighs completions of a sampler that differs from the policy, and centres the scores of their tokens.

The sampler may be another engine, another precision, an older policy, or the policy at another temperature or
cut to its most probable tokens. `off_policy` says what each correction makes of the expected gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.rows import zero_outside

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def importance_weights(
    estimator: Estimator, log_weights: Float[Tensor, "N T"], live: Bool[Tensor, "N T"]
) -> Float[Tensor, N * T]:
    """Return the weight of each token, or one for each row [N, 1], without a gradient.

    With l the log-probability of a token under the trainer's policy minus that under the sampler::

        token      exp(l_t)
        sequence   exp(sum_t l_t), the ratio of the two probabilities of the completion
        geometric  exp(mean_t l_t)

    Args:
        estimator: The estimator whose importance, bound, cap and floor are used.
        log_weights: l, 0 outside `live`.
        live: True where the token is an action and its weight in the loss is not 0.
    """
    of_row = log_weights.detach()
    if estimator.importance in ("sequence", "geometric"):
        of_row = of_row.sum(-1, keepdim=True)
    if estimator.importance == "geometric":
        of_row = of_row / live.sum(-1, keepdim=True).clamp(min=1)
    return bounded(estimator, of_row.exp())


def bounded(estimator: Estimator, weights: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return the weights, those outside of floor and cap moved to the bound, or set to 0 by 'mask'."""
    low, high = estimator.importance_floor or 0.0, estimator.importance_cap or math.inf
    if estimator.importance_bound == "mask":
        return zero_outside(weights, (weights >= low) & (weights <= high))
    return weights.clamp(low, high)


def score_centres(
    estimator: Estimator, logprobs: Float[Tensor, "*N V"], sampling_logprobs: Float[Tensor, "*N V"]
) -> Float[Tensor, " *N"]:
    """Return `sum_v mu(v) w(v) log pi(v)`, whose gradient is the mean score of a token of the sampler.

    mu are the sampler's probabilities and w the weights of tokens, 1 without `importance`; both without a
    gradient. `Estimator.loss` subtracts the advantage times this number (`importance_centre`).

    Args:
        estimator: The estimator whose weights are used.
        logprobs: log pi of every token of the vocabulary, under the policy being trained.
        sampling_logprobs: log mu of the same tokens; -inf, or any very low number, for those never sampled.
    """
    chances = sampling_logprobs.detach().exp()
    possible = chances > 0  # others are left out before any product, which would be 0 * inf = nan
    logprobs = zero_outside(logprobs, possible)
    if estimator.importance != "none":
        log_mu = zero_outside(sampling_logprobs.detach(), possible)
        chances = chances * bounded(estimator, (logprobs.detach() - log_mu).exp())
    return (chances * logprobs).sum(-1)
