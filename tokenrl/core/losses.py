"""Computes the loss: for each token a gain, the quantity to ascend, and the weight with which it counts.

sg(x) denotes x without its gradient (stop-gradient), rho the ratio pi / pi_old, A the advantage, and l the
log ratio `log pi - log ref` of a token that the policy sampled.

KL(pi || ref) is estimated from l; k1, k2 and k3 are Schulman's names (2020, Approximating KL divergence,
joschu.net/blog/kl-approx.html). The mean of k1 and of k3 is the KL, that of k2 is not. The bias of the
gradient is a separate question: it depends on whether the estimate is in the reward or in the loss, see
`choices`. No value is clamped, because a clamp sets the gradient to zero where the policies differ most.
Log-probabilities must be 0 where the position is not an action.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.choices import required
from tokenrl.core.importance import importance_weights
from tokenrl.core.returns import reward_to_go
from tokenrl.core.rows import zero_outside
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def token_weights(
    estimator: Estimator,
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
    *,
    max_length: int | None,
    valid: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, "N T"]:
    """Return the weight of every token of the whole step; the losses of slices add up to that of the step.

    With m the mask, L_i the number of actions of row i, and N the number of valid rows::

        sequence_sum  m / N                 sequence_mean  m / (N L_i)
        token_mean    m / sum_i L_i         fixed_length   m / (N max_length)

    N counts every valid row, also one without any action: it was sampled, and its gradient is zero. Rows that
    are not valid get weight 0 and count nowhere. 'fixed_length' (Dr. GRPO, arXiv 2503.20783) never divides by
    the padded width, which depends on what was sampled and would bias the gradient.

    Args:
        estimator: The estimator whose aggregation is used.
        mask: 1 where the token is an action of the policy [N, T].
        max_length: The largest number of actions that a row may have, for the aggregation 'fixed_length'.
        valid: False where a row counts nowhere [N]; None if all rows count.

    Raises:
        Refused: When the aggregation is 'fixed_length' and no length is given.
    """
    if estimator.aggregation == "fixed_length" and (max_length is None or max_length < 1):
        raise Refused(
            f"'fixed_length' divides by max_length, the most actions of a row; it is {max_length}."
        )
    valid = mask.new_ones(mask.shape[0]).bool() if valid is None else valid.bool()
    actions = mask.bool() & valid[:, None]
    lengths = actions.sum(-1, keepdim=True)
    rows = valid.sum().clamp(min=1)  # of the whole step: never divide a slice by its own rows
    divisors = {
        "sequence_sum": rows,
        "fixed_length": rows * (max_length or 1),
        "token_mean": lengths.sum().clamp(min=1),
        "sequence_mean": rows * lengths.clamp(min=1),
    }
    dtype = mask.dtype if mask.is_floating_point() else torch.get_default_dtype()
    return actions.to(dtype) / divisors[estimator.aggregation]


def loss(
    estimator: Estimator,
    logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N *T"],
    weights: Float[Tensor, "N T"],
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
    *,
    old_logprobs: Float[Tensor, "N T"] | None = None,
    sampling_logprobs: Float[Tensor, "N T"] | None = None,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    entropy: Float[Tensor, "N T"] | None = None,
    centres: Float[Tensor, "N T"] | None = None,
) -> Float[Tensor, ""]:
    """Return the loss, `-sum w (gain - beta KL + entropy_coef H)`, over a step or any slice of its rows.

    The weights already divide by the whole step, so the losses of slices add up to that of the step. A
    row must not be split, because some terms sum over it. Where the mask or the weight is 0, the other
    inputs may hold anything, also nan, and so may inputs that the chosen axes do not need. Only
    `logprobs`, `entropy` and `centres` carry a gradient.

    Args:
        estimator: The estimator whose axes are used.
        logprobs: Log-probabilities of the tokens under the policy being trained [N, T].
        advantages: `Advantages.policy` of these rows [N] or [N, T].
        weights: `token_weights` of these rows [N, T].
        mask: 1 where the token is an action that is learnt from [N, T].
        old_logprobs: Log-probabilities under the policy that sampled, computed by the trainer [N, T]; for
            a ratio.
        sampling_logprobs: The same, as the sampler reported them [N, T]; for importance weights.
        ref_logprobs: Log-probabilities under the reference policy [N, T]; for a KL in the loss.
        entropy: Entropy of the policy at each token, in nats [N, T]; for the entropy bonus.
        centres: `importance.score_centres` at the prefix of each token [N, T]; for importance_centre.

    Raises:
        ValueError: When the shapes of logprobs, weights and mask differ.
        Refused: When the estimator needs an input that is missing.
    """
    if not logprobs.shape == weights.shape == mask.shape:
        raise ValueError(f"shapes differ: {logprobs.shape=}, {weights.shape=}, {mask.shape=}")
    live = mask.bool() & (weights != 0)

    def inside(name: str, x: Tensor | None, purpose: str) -> Tensor:
        return zero_outside(required(name, x, purpose), live)

    # Tokens that do not count may hold anything, also nan, so they are set to 0 before any arithmetic.
    logprobs = zero_outside(logprobs, live)
    advantages = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None]
    advantages = zero_outside(advantages.expand(live.shape), live)
    old = logprobs.detach()  # on-policy: the ratio is 1, and its gradient is the score
    if estimator.needs_old_logprobs or (
        estimator.needs_sampling_logprobs and old_logprobs is not None
    ):
        old = inside("old_logprobs", old_logprobs, f"the ratio {estimator.ratio!r}").detach()
    gain = policy_gain(estimator, logprobs, logprobs - old, advantages, live)
    if estimator.needs_sampling_logprobs:
        sampled = inside(
            "sampling_logprobs", sampling_logprobs, f"importance {estimator.importance!r}"
        )
        gain = gain * importance_weights(estimator, old - sampled, live)
    if estimator.needs_centres:
        gain = gain - advantages * inside("centres", centres, "importance_centre")
    if estimator.needs_kl and estimator.kl_placement == "loss":
        reference = inside("ref_logprobs", ref_logprobs, "a KL in the loss").detach()
        # After the importance weight, which corrects the policy's gain and does not apply to the KL.
        gain = gain - estimator.beta * PER_TOKEN[estimator.kl_estimator](logprobs, reference)
    if estimator.needs_entropy:
        bonus = inside("entropy", entropy, "an entropy bonus")
        gain = gain + estimator.entropy_coef * bonus
    return -(zero_outside(weights, live) * gain).sum()  # minus: optimisers descend


def policy_gain(
    estimator: Estimator,
    logprobs: Float[Tensor, "N T"],
    log_ratio: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    live: Bool[Tensor, "N T"],
) -> Float[Tensor, "N T"]:
    """Return the gain of each token by the ratio of the estimator.

    ::

        none              A log pi, whose gradient is the advantage times the score (Williams 1992)
        token             PPO's gain, clipped token by token (Schulman et al. 2017, arXiv 1707.06347, eq. 7)
        sequence_mean     GSPO's, with the clipped geometric mean of the row's ratios (arXiv 2507.18071)
        sequence_product  with the ratio of the whole sequence, unclipped, hence exact off-policy too
        geometric_clip    GMPO's, with the geometric mean of the row's ratios, each of them clipped on the
                          side of the advantage as PPO clips it (Zhao et al. 2025, arXiv 2507.20673)
        cispo             sg(clip(rho)) A log pi: clipped tokens keep a gradient (arXiv 2506.13585)
        trust             sg(min(rho, trust_cap)) A log pi, and 0 for the tokens of `beyond_bounds`

    Args:
        estimator: The estimator whose ratio and bounds are used.
        logprobs: log pi, with a gradient; 0 outside `live`, as all that follow.
        log_ratio: log rho = log pi - log pi_old, where pi_old is the policy that sampled.
        advantages: A, without a gradient.
        live: True where the token is an action and its weight is not 0.
    """
    if estimator.ratio == "none":
        return advantages * logprobs
    if estimator.ratio == "cispo":
        return advantages * log_ratio.detach().exp().clamp(*estimator.clip_range) * logprobs
    if estimator.ratio == "trust":
        weight = log_ratio.detach().exp().clamp(max=estimator.trust_cap)
        dropped = beyond_bounds(estimator, logprobs, logprobs - log_ratio, advantages)
        return advantages * zero_outside(weight, ~dropped) * logprobs
    if estimator.ratio == "token":
        return clipped(estimator, log_ratio.exp(), advantages)
    if estimator.ratio == "geometric_clip":
        low, high = log_ratio.new_tensor(estimator.clip_range).log()
        log_ratio = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
        logprobs = (
            log_ratio  # a token beyond the clip has no gradient, and the bound stays in the mean
        )
    of_sequence = log_ratio.sum(-1, keepdim=True)
    if estimator.ratio != "sequence_product":
        of_sequence = of_sequence / live.sum(-1, keepdim=True).clamp(min=1)
    # The ratio of the sequence for each token, sg(ratio) pi_t / sg(pi_t): its gradient is the ratio times the
    # token's score. With one advantage per row, the sum over the row's tokens has the gradient of the ratio
    # itself, up to the number of tokens over which the two means average; with one advantage per token, each
    # score meets its own. logprobs - sg(logprobs) is 0 in value.
    ratio = (of_sequence.detach() + logprobs - logprobs.detach()).exp()
    if estimator.ratio == "sequence_mean":
        return clipped(estimator, ratio, advantages)
    return advantages * ratio


def beyond_bounds(
    estimator: Estimator,
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N *T"],
) -> Bool[Tensor, "N T"]:
    """Return True for the tokens that the ratio 'trust' drops, or whose ratio is outside its clip range.

    'trust' compares pi, the probability of the token, with mu, that under the policy that sampled, as the
    trainer computed it. With one side a token is dropped where pi - mu is beyond `trust_bound` in the
    direction of its advantage: above for A > 0, below for A < 0 (DPPO, arXiv 2602.04879). With two sides it
    is dropped where |pi - mu| is.
    """
    new, old = logprobs.detach(), old_logprobs.detach()
    if estimator.ratio != "trust":
        low, high = estimator.clip_range
        ratio = (new - old).exp()
        return (ratio > high) | (ratio < low)
    moved = new.exp() - old.exp()
    signs = advantages.sign() if advantages.ndim == 2 else advantages.sign()[:, None]
    return (moved.abs() if estimator.trust_sides == 2 else moved * signs) > estimator.trust_bound


def clipped(
    estimator: Estimator, ratio: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """Return `min(rho A, clip(rho, low, high) A)` (PPO, eq. 7), and for A < 0 no less than `dual_clip A`.

    At rho = 1 its gradient is that of REINFORCE. The second bound removes the gradient of a token of negative
    advantage whose ratio exceeds `dual_clip` (dual clip, Ye et al. 2020, arXiv 1912.09729).
    """
    # The minimum is clipped only where the ratio has already moved in the direction of the advantage. A token
    # that moved in the other direction keeps its gradient, which brings it back.
    gain = torch.minimum(ratio * advantages, ratio.clamp(*estimator.clip_range) * advantages)
    if estimator.dual_clip is None:
        return gain
    return torch.where(advantages < 0, torch.maximum(gain, estimator.dual_clip * advantages), gain)


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


PER_TOKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    formula.__name__: formula for formula in (k1, k2, k3, k2_sequence, full_path)
}


def token_entropy(logits: Float[Tensor, "*N V"]) -> Float[Tensor, " *N"]:
    """Return `H = -sum_v p_v log p_v` in nats; a token whose logit is -inf is impossible and adds 0."""
    logprobs = logits.log_softmax(-1)
    return entropy_of(logprobs, logprobs.exp())


def entropy_of(
    logprobs: Float[Tensor, "*N V"], probabilities: Float[Tensor, "*N V"]
) -> Float[Tensor, " *N"]:
    """Return the entropy in nats of distributions, given both as log-probabilities and as probabilities.

    Both are arguments because sampling and scoring have both already, and the exponential over the whole
    vocabulary is the expensive part.
    """
    # 0 log 0 is 0 in the entropy; without the bound, whose exponential is 0, it would be 0 * -inf = nan.
    return -(probabilities * logprobs.clamp(min=-1e4)).sum(-1)


def score_norm_of(
    chosen: Float[Tensor, " *N"], probabilities: Float[Tensor, "*N V"]
) -> Float[Tensor, " *N"]:
    """Return the squared norm of the score of an action, the gradient of `log p(a)` in the logits.

    That gradient is `onehot(a) - p`, so its squared norm is `1 - 2 p(a) + sum_v p(v)^2`.

    Args:
        chosen: Log-probability `log p(a)` of each action.
        probabilities: Probabilities of all actions.
    """
    return 1 - 2 * chosen.exp() + probabilities.square().sum(-1)


def critic_loss(
    estimator: Estimator,
    values: Float[Tensor, "N T"],
    returns: Float[Tensor, "N T"],
    weights: Float[Tensor, "N T"],
    *,
    old_values: Float[Tensor, "N T"] | None = None,
) -> Float[Tensor, ""]:
    """Return the critic's loss, `sum w (V - G)^2 / 2`, over some rows.

    Where the weight is 0, values and returns may hold anything. With `value_clip`, each token's error is the
    larger of this and that of `V_old + clip(V - V_old, -value_clip, value_clip)`, as in the published code of
    PPO (Schulman et al. 2017).

    Args:
        estimator: The estimator whose value_clip is used.
        values: The critic's values V [N, T]; they carry the gradient.
        returns: `Advantages.returns`, the targets G [N, T].
        weights: `token_weights` [N, T].
        old_values: The values before the update [N, T], for value_clip.
    """
    clip = estimator.value_clip
    live = weights != 0
    values, goal = zero_outside(values, live), zero_outside(returns.detach(), live)
    error = (values - goal).square()
    if clip is not None:
        old = zero_outside(required("old_values", old_values, "value_clip").detach(), live)
        # The larger error: clipping may remove a gradient, but never makes the error look smaller.
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - goal).square())
    return (zero_outside(weights, live) * error).sum() / 2


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
