"""Computes the loss: for each token a gain, the quantity to ascend, and the weight with which it counts.

sg(x) denotes x without its gradient (stop-gradient), rho the ratio pi / pi_old and A the advantage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core import entropy as entropies, kl
from tokenrl.core.guards import given
from tokenrl.core.masking import zero_outside
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def token_weights(
    mask: Float[Tensor, "N T"], valid: Bool[Tensor, " N"], *, aggregation: str, max_length: int | None
) -> Float[Tensor, "N T"]:
    """Return the weight of every token of the whole step; the losses of slices add up to that of the step.

    With m the mask, L_i the number of actions of row i, and N the number of valid rows::

        sequence_sum  m / N                 sequence_mean  m / (N L_i)
        token_mean    m / sum_i L_i         fixed_length   m / (N max_length)

    N counts every valid row, also one without any action: it was sampled, and its gradient is zero. Rows that
    are not valid get weight 0 and count nowhere.

    Args:
        mask: 1 where the token is an action of the policy [N, T].
        aggregation: One of the names above.
        max_length: The largest number of actions that a row may have, for the aggregation 'fixed_length'.
        valid: False where a row counts nowhere [N]; all True if all rows count.

    Raises:
        Refused: When the aggregation is 'fixed_length' and no length is given.
    """
    actions = mask.bool() & valid[:, None]
    dtype = mask.dtype if mask.is_floating_point() else torch.get_default_dtype()
    rows = valid.sum().clamp(min=1)  # of the whole step: never divide a slice by its own rows
    return actions.to(dtype) / DIVISORS[aggregation](actions, rows, max_length)


def fixed_length(actions: Bool[Tensor, "N T"], rows: Tensor, max_length: int | None) -> Tensor:
    """Return N times the longest length allowed (Dr. GRPO, arXiv 2503.20783).

    The padded width is never used: it depends on what was sampled, and would bias the gradient.
    """
    if max_length is None or max_length < 1:
        raise Refused(
            f"'fixed_length' divides by the maximum length, but max_length is {max_length}. Give the "
            "largest number of actions that a row may have, or choose the aggregation 'sequence_sum'."
        )
    return rows * max_length


DIVISORS: dict[str, Callable[[Tensor, Tensor, int | None], Tensor]] = {
    "sequence_sum": lambda actions, rows, max_length: rows,
    "fixed_length": fixed_length,
    "token_mean": lambda actions, rows, max_length: actions.sum().clamp(min=1),
    "sequence_mean": lambda actions, rows, max_length: rows * actions.sum(-1, keepdim=True).clamp(min=1),
}
"""The formula of each name in `choices.CHOICES["aggregation"]`, from actions [N, T] and the number N."""


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
    """Compute what `Estimator.loss` returns.

    Args:
        estimator: The estimator whose loss it is.
        logprobs: Log-probabilities of the tokens under the policy being trained [N, T].
        advantages: `Advantages.policy` of these rows [N] or [N, T].
        weights: `token_weights` of these rows [N, T].
        mask: 1 where the token is an action that is learnt from [N, T].
        old_logprobs: Log-probabilities under the policy that sampled, computed by the trainer [N, T]; for
            a ratio.
        sampling_logprobs: The same, as the sampler reported them [N, T]; for importance_cap.
        ref_logprobs: Log-probabilities under the reference policy [N, T]; for a KL in the loss.
        entropy: Entropy of the policy at each token, in nats [N, T]; for the entropy bonus.
    """
    if not logprobs.shape == weights.shape == mask.shape:
        raise ValueError(f"shapes differ: {logprobs.shape=}, {weights.shape=}, {mask.shape=}")
    live = mask.bool() & (weights != 0)

    def inside(name: str, x: Tensor | None, purpose: str) -> Tensor:
        return zero_outside(given(name, x, purpose).detach(), live)

    # Tokens that do not count may hold anything, also nan, so they are set to 0 before any arithmetic.
    logprobs = zero_outside(logprobs, live)
    advantages = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None]
    advantages = zero_outside(advantages.expand(live.shape), live)
    old = logprobs.detach()  # on-policy: the ratio is 1, and its gradient is the score
    if estimator.needs_old_logprobs:
        old = inside("old_logprobs", old_logprobs, f"the ratio {estimator.ratio!r}")
    elif estimator.importance_cap is not None and old_logprobs is not None:
        old = inside("old_logprobs", old_logprobs, "the importance weight")
    gain = RATIOS[estimator.ratio](Tokens(estimator, logprobs, logprobs - old, advantages, live))
    if estimator.importance_cap is not None:
        sampled = inside("sampling_logprobs", sampling_logprobs, "importance_cap")
        # Truncated importance weights: the cap bounds the variance, and biases tokens that exceed it.
        gain = gain * (old - sampled).exp().clamp(max=estimator.importance_cap)
    if estimator.needs_kl and estimator.kl_placement == "loss":
        ref = inside("ref_logprobs", ref_logprobs, "a KL in the loss")
        # After the importance weight, which corrects the policy's gain and does not apply to the KL.
        gain = gain - estimator.beta * kl.PER_TOKEN[estimator.kl_estimator](logprobs, ref)
    if estimator.needs_entropy:
        bonus = zero_outside(given("entropy", entropy, "an entropy bonus"), live)
        if estimator.entropy_form == "sequence":
            bonus = entropies.along_path(bonus, logprobs)
        gain = gain + estimator.entropy_coef * bonus
    return -(zero_outside(weights, live) * gain).sum()  # minus: optimisers descend


class Tokens(NamedTuple):
    """What the gain of a token is computed from; log-probabilities are 0 outside `live`."""

    estimator: Estimator
    logprobs: Float[Tensor, "N T"]
    log_ratio: Float[Tensor, "N T"]
    """log rho = log pi - log pi_old, where pi_old is the policy that sampled."""
    advantages: Float[Tensor, "N T"]
    live: Bool[Tensor, "N T"]
    """True where the token is an action and its weight is not 0."""


def reinforce(tokens: Tokens) -> Float[Tensor, "N T"]:
    """Return the gain `A log pi`; its gradient is the advantage times the score (Williams 1992)."""
    return tokens.advantages * tokens.logprobs


def token_ratio(tokens: Tokens) -> Float[Tensor, "N T"]:
    """Return PPO's gain, clipped token by token (Schulman et al. 2017, arXiv 1707.06347, eq. 7)."""
    return clipped(tokens, tokens.log_ratio.exp())


def sequence_mean(tokens: Tokens) -> Float[Tensor, "N T"]:
    """Return GSPO's gain, with the clipped geometric mean of the row's ratios (2025, arXiv 2507.18071)."""
    lengths = tokens.live.sum(-1, keepdim=True).clamp(min=1)
    mean = tokens.log_ratio.sum(-1, keepdim=True) / lengths
    return clipped(tokens, of_sequence(mean, tokens.logprobs))


def sequence_product(tokens: Tokens) -> Float[Tensor, "N T"]:
    """Return the gain with the ratio of the whole sequence, unclipped, hence exact off-policy too."""
    log_ratio = tokens.log_ratio.sum(-1, keepdim=True)
    return tokens.advantages * of_sequence(log_ratio, tokens.logprobs)


def cispo(tokens: Tokens) -> Float[Tensor, "N T"]:
    """Return `sg(clip(rho)) A log pi`: clipped tokens keep a gradient (MiniMax-M1, arXiv 2506.13585)."""
    ratio = tokens.log_ratio.detach().exp().clamp(*tokens.estimator.clip_range)
    return tokens.advantages * ratio * tokens.logprobs


RATIOS: dict[str, Callable[[Tokens], Tensor]] = {
    "none": reinforce,
    "token": token_ratio,
    "sequence_mean": sequence_mean,
    "sequence_product": sequence_product,
    "cispo": cispo,
}
"""The formula of each name in `choices.CHOICES["ratio"]`: the gain of each token."""


def of_sequence(log_ratio: Float[Tensor, "N 1"], logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return the ratio of the sequence for each token; its gradient is the ratio times the token's score.

    This is `sg(ratio) pi_t / sg(pi_t)`, the token form of GSPO (Zheng et al. 2025, arXiv 2507.18071). With
    one advantage per row, the sum over the row's tokens has the gradient of the ratio itself, up to the
    number of tokens over which `sequence_mean` averages. With one advantage per token, each score meets its
    own.
    """
    # logprobs - sg(logprobs) is 0 in value and has the token's score as its gradient.
    return (log_ratio.detach() + logprobs - logprobs.detach()).exp()


def clipped(tokens: Tokens, ratio: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return `min(rho A, clip(rho, low, high) A)` (PPO, eq. 7), and for A < 0 no less than `dual_clip A`.

    At rho = 1 its gradient is that of `reinforce`. The second bound removes the gradient of a token of
    negative advantage whose ratio exceeds `dual_clip` (dual clip, Ye et al. 2020, arXiv 1912.09729).
    """
    advantages, (low, high), dual = tokens.advantages, tokens.estimator.clip_range, tokens.estimator.dual_clip
    # The minimum is clipped only where the ratio has already moved in the direction of the advantage. A token
    # that moved in the other direction keeps its gradient, which brings it back.
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
    """Return `sum w (V - G)^2 / 2`; where the weight is 0, values and returns may hold anything.

    With `clip`, each token's error is the larger of this and that of `V_old + clip(V - V_old, -clip, clip)`,
    as in the published code of PPO (Schulman et al. 2017).

    Args:
        values: The critic's values V [N, T]; they carry the gradient.
        returns: `Advantages.returns`, the targets G [N, T].
        weights: `token_weights` [N, T].
        old_values: The values before the update [N, T], for value_clip.
        clip: The field value_clip; None for no clip.
    """
    live = weights != 0
    values, goal = zero_outside(values, live), zero_outside(returns.detach(), live)
    error = (values - goal).square()
    if clip is not None:
        old = zero_outside(given("old_values", old_values, "value_clip").detach(), live)
        # The larger error: clipping may remove a gradient, but never makes the error look smaller.
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - goal).square())
    return (zero_outside(weights, live) * error).sum() / 2
