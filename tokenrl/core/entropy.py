"""The entropy of the next token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def token_entropy(logits: Float[Tensor, "*N V"]) -> Float[Tensor, " *N"]:
    """Return `H = -sum_v p_v log p_v` in nats; a logit of -inf is an impossible token and adds nothing."""
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    # 0 * log 0 is 0 here, not nan, in the gradient too
    return -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(-1)
