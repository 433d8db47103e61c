"""What is summed into the loss: a gain for each token, and the weight with which it counts."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.masking import zero_outside


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


def reinforce(logprobs: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Gain `A log pi`, whose gradient is the score times the advantage (Williams 1992)."""
    return advantages * logprobs


def clipped(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    *,
    epsilon: float,
    epsilon_high: float,
) -> Float[Tensor, "N T"]:
    """Gain `min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)`, rho = pi/old of the token (PPO, eq. 7).

    At rho = 1 its gradient is that of `reinforce`.
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)


def squared_error(
    values: Float[Tensor, "N T"], returns: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]
) -> Float[Tensor, ""]:
    """Sum `w (V - G)^2 / 2`; where the weight is 0, values and returns may hold anything."""
    live = weights != 0
    error = zero_outside(values, live) - zero_outside(returns.detach(), live)
    return (weights * error.square()).sum() / 2
