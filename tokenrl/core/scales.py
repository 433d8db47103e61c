"""Computes what advantages are divided by, or what else is made of them: one formula for each scale in `choices`.

A divisor made of the row's own return biases the gradient; the reasons are in `choices`. The formulas take
sets of rows [S, n], as those of `baselines` do.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.baselines import each_itself, mean, std
from tokenrl.core.rows import required, zero_outside


def divide(
    advantages: Float[Tensor, "*N T"], deviation: Float[Tensor, "*N #T"], eps: float
) -> Float[Tensor, "*N T"]:
    """Divide by `deviation + eps`, with eps outside the root; the result is 0 where that sum is 0."""
    divisor = deviation + eps
    positive = divisor > 0  # False only for equal returns with eps 0
    divided = advantages / torch.where(positive, divisor, 1.0)
    return zero_outside(divided, positive.expand_as(advantages))


def by_std(
    advantages: Float[Tensor, "S n #T"],
    totals: Float[Tensor, "S n"],
    valid: Bool[Tensor, "S n"],
    scale_ddof: int,
    scale_eps: float,
) -> Float[Tensor, "S n #T"]:
    """Divide by the standard deviation of the returns of the set: of a group, of the step, or of a row's own steps."""
    return divide(advantages, std(totals, valid, scale_ddof)[..., None], scale_eps)


def loo_std(
    advantages: Float[Tensor, "S n #T"],
    totals: Float[Tensor, "S n"],
    valid: Bool[Tensor, "S n"],
    scale_ddof: int,
    scale_eps: float,
) -> Float[Tensor, "S n #T"]:
    """Divide by the standard deviation of the returns of the OTHER rows of the set."""
    peers = valid[:, None] & ~each_itself(valid.shape[1], valid)  # [S, n, n]
    compared = totals[:, None].expand_as(peers)
    return divide(advantages, std(compared, peers, scale_ddof)[..., :1], scale_eps)


def token_whiten(
    advantages: Float[Tensor, "S n #T"],
    actions: Bool[Tensor, "S n T"],
    scale_ddof: int,
    scale_eps: float,
) -> Float[Tensor, "S n #T"]:
    """Return `(A - mean)/(std + eps)`, with mean and standard deviation over all tokens of the step.

    A row counts once for each of its tokens (REINFORCE++, Hu et al. 2025, arXiv 2501.03262).
    """
    tokens = advantages.expand_as(actions).reshape(1, -1)
    inside = actions.reshape(1, -1)
    centre = mean(tokens, inside)[0, 0]
    return divide(advantages - centre, std(tokens, inside, scale_ddof)[0, 0], scale_eps)


def target(
    totals: Float[Tensor, "S n"],
    valid: Bool[Tensor, "S n"],
    actions: Bool[Tensor, "S n T"],
    logprobs: Float[Tensor, "S n T"] | None,
    present_logprobs: Float[Tensor, "S n T"] | None,
    scale_ddof: int,
    scale_eps: float,
    eta: float,
) -> Float[Tensor, "S n"]:
    """Return n (q - p), with which the log-probabilities of n rows ascend to the target q of their set (TPO).

    p are the probabilities of the rows of the set, divided by their sum, and `q ~ p exp(u / eta)` of the policy that
    sampled, with u the standardised returns (Kaddour 2026, arXiv 2604.06159). p - q is the gradient of the
    cross-entropy `-sum_i q_i log p_i`; n is there because the loss is a mean over rows. In a later update q stays, and
    p is of `present_logprobs`. Before that equal returns give exactly 0.

    Raises:
        Refused: There are no log-probabilities.
    """
    columns = (required("logprobs", x, "scale 'target'") for x in (logprobs, present_logprobs))
    before, now = (zero_outside(x, actions).sum(-1) for x in columns)
    centred = totals - mean(totals, valid)
    tilt = divide(centred, std(totals, valid, scale_ddof), scale_eps) / eta
    p, q = (x.masked_fill(~valid, -torch.inf).softmax(-1) for x in (now, before + tilt))
    return valid.sum(-1, keepdim=True) * (q - p)
