"""The entropy of the next token, and of the whole sequence."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tokenrl.core.returns import reward_to_go


def token_entropy(logits: Float[Tensor, "*N V"]) -> Float[Tensor, " *N"]:
    """Return `H = -sum_v p_v log p_v` in nats; a logit of -inf is an impossible token and adds nothing."""
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    # 0 * log 0 is 0 here, not nan, in the gradient too
    return -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(-1)


def along_path(entropy: Float[Tensor, "N T"], logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Have the value H_t of each step and the gradient `grad H_t + (sum_{u > t} H_u) grad log pi_t`.

    In the mean this is the gradient of the sequence's entropy, `-E[grad log pi(y) log pi(y)]`, with the
    entropy of each step known and not sampled. Both arguments are 0 where the position is no action.
    """
    later = entropy.detach()
    later = reward_to_go(later) - later
    return entropy + later * (logprobs - logprobs.detach())
