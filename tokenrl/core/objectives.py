"""What is summed into the loss: a gain for each token, and the weight with which it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core import entropy as entropies
from tokenrl.core import kl, rules
from tokenrl.core.masking import zero_outside

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def token_weights(
    mask: Float[Tensor, "N T"], valid: Bool[Tensor, " N"], *, aggregation: str, max_length: int
) -> Float[Tensor, "N T"]:
    """Weigh every token of the whole step, so that any slice of the step carries its own share of the loss.

    With m the mask, L_i the actions of row i, and N the number of valid rows::

        sequence_sum  m / N                 sequence_mean  m / (N L_i)
        token_mean    m / sum_i L_i         fixed_length   m / (N max_length)

    N counts every valid row, also one without any action: it was sampled, and its gradient happens to be
    zero. Rows that are not valid get weight 0 and count nowhere.
    """
    actions = mask.bool() & valid[:, None]
    dtype = mask.dtype if mask.is_floating_point() else torch.get_default_dtype()
    rows = valid.sum().clamp(min=1)
    if aggregation == "sequence_sum":
        divisor = rows
    elif aggregation == "sequence_mean":
        divisor = rows * actions.sum(-1, keepdim=True).clamp(min=1)
    elif aggregation == "token_mean":
        divisor = actions.sum().clamp(min=1)
    else:
        divisor = rows * max_length
    return actions.to(dtype) / divisor


def loss(
    estimator: Estimator,
    logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N *T"],
    weights: Float[Tensor, "N T"],
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"] | None,
    sampling_logprobs: Float[Tensor, "N T"] | None,
    ref_logprobs: Float[Tensor, "N T"] | None,
    entropy: Float[Tensor, "N T"] | None,
) -> Float[Tensor, ""]:
    """Do the work of `Estimator.loss`, which explains the arguments."""
    if not logprobs.shape == weights.shape == mask.shape:
        raise ValueError(f"shapes differ: {logprobs.shape=}, {weights.shape=}, {mask.shape=}")
    live = mask.bool() & (weights != 0)

    def inside(name: str, x: Tensor | None, purpose: str) -> Tensor:
        return zero_outside(rules.given(name, x, purpose).detach(), live)

    logprobs = zero_outside(logprobs, live)
    advantages = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None]
    advantages = zero_outside(advantages.expand(live.shape), live)
    old = logprobs.detach()
    if estimator.needs_old_logprobs:
        old = inside("old_logprobs", old_logprobs, f"the ratio {estimator.ratio!r}")
    elif estimator.importance_cap is not None and old_logprobs is not None:
        old = inside("old_logprobs", old_logprobs, "the importance weight")
    gain = policy_gain(estimator, logprobs, old, advantages, live)
    if estimator.importance_cap is not None:
        sampled = inside("sampling_logprobs", sampling_logprobs, "importance_cap")
        gain = gain * (old - sampled).exp().clamp(max=estimator.importance_cap)
    if estimator.needs_kl and estimator.kl_placement == "loss":
        ref = inside("ref_logprobs", ref_logprobs, "a KL in the loss")
        gain = gain - estimator.beta * kl.PER_TOKEN[estimator.kl_estimator](logprobs, ref)
    if estimator.needs_entropy:
        bonus = zero_outside(rules.given("entropy", entropy, "an entropy bonus"), live)
        if estimator.entropy_form == "sequence":
            bonus = entropies.along_path(bonus, logprobs)
        gain = gain + estimator.entropy_coef * bonus
    return -(zero_outside(weights, live) * gain).sum()


def policy_gain(
    estimator: Estimator,
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    live: Bool[Tensor, "N T"],
) -> Float[Tensor, "N T"]:
    """Gain of each token by the axis `ratio`; log-probabilities are 0 outside `live`."""
    low = 1.0 - estimator.epsilon
    high = 1.0 + (estimator.epsilon if estimator.epsilon_high is None else estimator.epsilon_high)
    if estimator.ratio == "none":
        return reinforce(logprobs, advantages)
    log_ratio = logprobs - old_logprobs
    if estimator.ratio == "cispo":
        return reinforce(logprobs, advantages * log_ratio.detach().exp().clamp(low, high))
    if estimator.ratio == "sequence_product":
        return advantages * of_sequence(log_ratio.sum(-1, keepdim=True), logprobs)
    ratio = log_ratio.exp()
    if estimator.ratio == "sequence_mean":
        mean = log_ratio.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
        ratio = of_sequence(mean, logprobs)
    return clipped(ratio, advantages, low=low, high=high, dual=estimator.dual_clip)


def reinforce(logprobs: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Gain `A log pi`, whose gradient is the score times the advantage (Williams 1992)."""
    return advantages * logprobs


def of_sequence(log_ratio: Float[Tensor, "N 1"], logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Give each token the ratio of its sequence as value, and that ratio times its own score as gradient.

    `sg(ratio) pi_t / sg(pi_t)`, GSPO's token form (Zheng et al. 2025, arXiv 2507.18071). With one
    advantage a row the sum over the row's tokens has the gradient of the ratio itself, up to the number of
    tokens in its mean; with one a token, each score still meets its own.
    """
    return (log_ratio.detach() + logprobs - logprobs.detach()).exp()


def clipped(
    ratio: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    *,
    low: float,
    high: float,
    dual: float | None = None,
) -> Float[Tensor, "N T"]:
    """Gain `min(rho A, clip(rho, low, high) A)` (PPO, eq. 7), for A < 0 not below `dual A`.

    At rho = 1 its gradient is that of `reinforce`. The second bound stops a token of negative advantage
    whose ratio has grown beyond `dual` (dual clip, Ye et al. 2020, arXiv 1912.09729).
    """
    gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if dual is None:
        return gain
    return torch.where(advantages < 0, torch.maximum(gain, dual * advantages), gain)


def squared_error(
    values: Float[Tensor, "N T"],
    returns: Float[Tensor, "N T"],
    weights: Float[Tensor, "N T"],
    *,
    old_values: Float[Tensor, "N T"] | None = None,
    clip: float | None = None,
) -> Float[Tensor, ""]:
    """Sum `w (V - G)^2 / 2`; where the weight is 0, values and returns may hold anything.

    With `clip`, the larger of this and the error of `V_old + clip(V - V_old, -clip, clip)`, as in PPO's code.
    """
    live = weights != 0
    values, goal = zero_outside(values, live), zero_outside(returns.detach(), live)
    error = (values - goal).square()
    if clip is not None:
        old = zero_outside(rules.given("old_values", old_values, "value_clip").detach(), live)
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - goal).square())
    return (zero_outside(weights, live) * error).sum() / 2
