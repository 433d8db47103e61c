"""Computes the parts of the loss: gains by a ratio, importance weights, entropies, the loss of a critic.

sg(x) denotes x without its gradient (stop-gradient), rho the ratio pi / pi_old, and A the advantage.
Log-probabilities must be 0 where the position is not an action.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.rows import required, zero_outside


def policy_gain(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    live: Bool[Tensor, "N T"],
    *,
    ratio: str,
    clip_range: tuple[float, float],
    dual_clip: float | None,
    trust_bound: float,
    trust_cap: float,
    eta: float,
) -> Float[Tensor, "N T"]:
    """Return the gain of each token by the ratio.

    ::

        none              A log pi, whose gradient is the advantage times the score (Williams 1992)
        token             PPO's gain, clipped token by token (Schulman et al. 2017, arXiv 1707.06347, eq. 7)
        sequence_mean     GSPO's, with the clipped geometric mean of the row's ratios (arXiv 2507.18071)
        sequence_product  with the ratio of the whole sequence, unclipped, hence exact off-policy too
        geometric_clip    GMPO's, with the geometric mean of the row's clipped ratios (arXiv 2507.20673)
        cispo             sg(clip(rho)) A log pi: clipped tokens keep a gradient (arXiv 2506.13585)
        trust             sg(min(rho, trust_cap)) A log pi, and 0 for the tokens of `beyond_trust`
        delight           sg(sigmoid(-A log pi / eta)) A log pi, without any ratio (arXiv 2603.14608)

    Args:
        logprobs: log pi, with a gradient; 0 outside `live`, as all that follow.
        old_logprobs: log pi_old, of the policy that sampled.
        advantages: A, without a gradient.
        live: True where the token is an action and its weight is not 0.
        ratio: One of the eight.
        clip_range: The bounds of a clipped ratio.
        dual_clip: The bound of the ratio where A < 0, for 'token' and 'sequence_mean'; None for none.
        trust_bound: The bound of `beyond_trust`.
        trust_cap: The bound of the ratio 'trust'.
        eta: The temperature of 'delight', whose gate is near 1 for rare tokens of A > 0, and near 0 for those of A < 0.
    """
    log_ratio = logprobs - old_logprobs
    match ratio:
        case "token":
            return clipped(log_ratio.exp(), advantages, clip_range, dual_clip)
        case "cispo":
            return advantages * log_ratio.detach().exp().clamp(*clip_range) * logprobs
        case "trust":
            weight = log_ratio.detach().exp().clamp(max=trust_cap)
            dropped = beyond_trust(logprobs, old_logprobs, advantages, trust_bound=trust_bound)
            return advantages * zero_outside(weight, ~dropped) * logprobs
        case "delight":
            return advantages * (-advantages * logprobs.detach() / eta).sigmoid() * logprobs
        case "geometric_clip":
            # Each log ratio is clipped on the side of its advantage, as PPO clips it: a token beyond the clip
            # has no gradient, and the bound stays in the mean of the row.
            low, high = log_ratio.new_tensor(clip_range).log()
            above, below = log_ratio.clamp(max=high), log_ratio.clamp(min=low)
            log_ratio = torch.where(advantages > 0, above, below)
            return advantages * of_sequence(log_ratio, log_ratio, live)
        case "sequence_mean":
            of_row = of_sequence(log_ratio, logprobs, live)
            return clipped(of_row, advantages, clip_range, dual_clip)
        case "sequence_product":
            return advantages * of_sequence(log_ratio, logprobs)
        case _:
            return advantages * logprobs


def clipped(
    ratio: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    clip_range: tuple[float, float],
    dual_clip: float | None = None,
) -> Float[Tensor, "N T"]:
    """Return `min(rho A, clip(rho, low, high) A)` (PPO, eq. 7), and for A < 0 no less than `dual_clip A`.

    At rho = 1 its gradient is that of REINFORCE. The second bound removes the gradient of a token of negative
    advantage whose ratio exceeds `dual_clip` (dual clip, Ye et al. 2020, arXiv 1912.09729).
    """
    # The minimum is clipped only where the ratio has already moved in the direction of the advantage. A token
    # that moved in the other direction keeps its gradient, which brings it back.
    gain = torch.minimum(ratio * advantages, ratio.clamp(*clip_range) * advantages)
    if dual_clip is None:
        return gain
    return torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)


def of_sequence(
    log_ratio: Float[Tensor, "N T"],
    logprobs: Float[Tensor, "N T"],
    live: Bool[Tensor, "N T"] | None = None,
) -> Float[Tensor, "N T"]:
    """Return the ratio of the row for each of its tokens, `sg(ratio) pi_t / sg(pi_t)`.

    Its gradient is the ratio times the token's score. With one advantage per row, the sum over the row's tokens
    has the gradient of the ratio itself, up to the number of tokens over which the two means average; with one
    advantage per token, each score meets its own.

    Args:
        log_ratio: The log ratio of each token, 0 outside `live`.
        logprobs: What the gradient goes to: log pi, or the log ratio itself.
        live: True where the token counts, for the geometric mean of the ratios; None for their product.
    """
    total = log_ratio.sum(-1, keepdim=True)
    if live is not None:
        total = total / live.sum(-1, keepdim=True).clamp(min=1)
    return (total.detach() + logprobs - logprobs.detach()).exp()  # the last two are 0 in value


def beyond_trust(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    *,
    trust_bound: float,
) -> Bool[Tensor, "N T"]:
    """Return True for the tokens that the ratio 'trust' drops (DPPO, arXiv 2602.04879).

    It compares pi, the probability of the token, with mu, its probability under the policy that sampled, as the
    trainer computed it. A token is dropped where pi - mu is beyond the bound in the direction of its advantage:
    above for A > 0, below for A < 0.
    """
    moved = logprobs.detach().exp() - old_logprobs.detach().exp()
    return moved * advantages.sign() > trust_bound


def bounded(
    weights: Float[Tensor, "*N"], bounds: tuple[float, float], *, masks: bool
) -> Float[Tensor, "*N"]:
    """Return the weights, those outside of the bounds moved to the bound, or set to 0 if `masks`."""
    low, high = bounds
    if masks:
        return zero_outside(weights, (weights >= low) & (weights <= high))
    return weights.clamp(low, high)


def importance_weights(
    log_weights: Float[Tensor, "N T"],
    live: Bool[Tensor, "N T"],
    *,
    importance: str,
    importance_clip: float | None,
    importance_range: tuple[float, float],
    importance_bound: str,
) -> Float[Tensor, "N _"]:
    """Return the weight of each token, or one for each row [N, 1], within its bounds and without a gradient.

    The sampler may be another engine, another precision, an older policy, or the policy at another temperature
    or cut to its most probable tokens. With l the log-probability of a token under the trainer's policy minus
    that under the sampler::

        token      exp(l_t)
        prefix     exp(sum_(s<=t) l_s), the sum clipped at +-c sqrt(t) (CTPO, Zhang et al. 2026, arXiv 2605.07331)
        sequence   exp(sum_t l_t), the ratio of the two probabilities of the completion
        geometric  exp(mean_t l_t)

    Args:
        log_weights: l, 0 outside `live`.
        live: True where the token is an action and its weight in the loss is not 0.
        importance: One of the four.
        importance_clip: c, for 'prefix'; t counts the actions of the row. None for no clip.
        importance_range: The smallest and the largest weight.
        importance_bound: 'mask' if weights outside of the range are 0, 'truncate' if they are moved to its ends.
    """
    log_weights = log_weights.detach()
    if importance == "prefix":
        log_weights = log_weights.cumsum(-1)
        if importance_clip is not None:
            width = importance_clip * live.cumsum(-1).to(log_weights.dtype).sqrt()
            log_weights = log_weights.clamp(-width, width)
    elif importance != "token":
        log_weights = log_weights.sum(-1, keepdim=True)
        if importance == "geometric":
            log_weights = log_weights / live.sum(-1, keepdim=True).clamp(min=1)
    masks = importance_bound == "mask"
    return bounded(log_weights.exp(), importance_range, masks=masks)


def score_centres(
    logprobs: Float[Tensor, "*N V"],
    sampling_logprobs: Float[Tensor, "*N V"],
    bounds: tuple[float, float] | None = None,
    *,
    masks: bool = False,
) -> Float[Tensor, " *N"]:
    """Return `sum_v mu(v) w(v) log pi(v)`, whose gradient is the mean score of a token of the sampler.

    mu are the sampler's probabilities and w the weights of tokens, 1 without importance weights; both without
    a gradient. `Estimator.loss` subtracts the advantage times this number (`importance_centre`), as Marek &
    Ryabinin 2026 do (Score centering stabilizes off-policy reinforcement learning, arXiv 2609.20807).

    Args:
        logprobs: log pi of every token of the vocabulary, under the policy being trained; a token of -inf adds
            nothing.
        sampling_logprobs: log mu of the same tokens; -inf, or any very low number, for those never sampled.
        bounds: The smallest and the largest importance weight; None for weights of 1.
        masks: Whether weights beyond these bounds are set to 0.
    """
    chances = sampling_logprobs.detach().exp()
    # Others are left out before any product, which would be 0 * inf = nan.
    possible = (chances > 0) & (logprobs > -torch.inf)
    logprobs = zero_outside(logprobs, possible)
    if bounds is not None:
        log_mu = zero_outside(sampling_logprobs.detach(), possible)
        weights = (logprobs.detach() - log_mu).exp()
        chances = chances * bounded(weights, bounds, masks=masks)
    return (chances * logprobs).sum(-1)


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
    values: Float[Tensor, "N T"],
    returns: Float[Tensor, "N T"],
    weights: Float[Tensor, "N T"],
    *,
    value_clip: float | None = None,
    old_values: Float[Tensor, "N T"] | None = None,
) -> Float[Tensor, ""]:
    """Return the critic's loss, `sum w (V - G)^2 / 2`, over some rows.

    Where the weight is 0, values and returns may hold anything. With `value_clip`, each token's error is the
    larger of this and that of `V_old + clip(V - V_old, -value_clip, value_clip)`, as in the published code of
    PPO (Schulman et al. 2017).

    Args:
        values: The critic's values V [N, T]; they carry the gradient.
        returns: `Advantages.returns`, the targets G [N, T].
        weights: `token_weights` [N, T].
        value_clip: How far a value may move before the loss is clipped; None for no clip.
        old_values: The values before the update [N, T], for value_clip.
    """
    live = weights != 0
    values = zero_outside(values, live)
    goal = zero_outside(returns.detach(), live)
    error = (values - goal).square()
    if value_clip is not None:
        old = zero_outside(required("old_values", old_values, "value_clip").detach(), live)
        moved = old + (values - old).clamp(-value_clip, value_clip)
        # The larger error: clipping may remove a gradient, but never makes the error look smaller.
        error = torch.maximum(error, (moved - goal).square())
    return (zero_outside(weights, live) * error).sum() / 2
