"""Computes the entropy of tokens and of sequences, and says when a policy's entropy has collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from tokenrl.core.returns import reward_to_go

LEAST_ENTROPY = 0.1
"""In nats per action; below it a policy over discrete actions nearly always chooses the same one."""


def token_entropy(logits: Float[Tensor, "*N V"]) -> Float[Tensor, " *N"]:
    """Return `H = -sum_v p_v log p_v` in nats; a token whose logit is -inf is impossible and adds 0."""
    logprobs = logits.log_softmax(-1)
    return entropy_of(logprobs, logprobs.exp())


def entropy_of(logprobs: Float[Tensor, "*N V"], probabilities: Float[Tensor, "*N V"]) -> Float[Tensor, " *N"]:
    """Return the entropy in nats of distributions, given both as log-probabilities and as probabilities.

    Both are arguments because sampling and scoring have both already, and the exponential over the whole
    vocabulary is the expensive part.
    """
    # 0 log 0 is 0 in the entropy; without the fill it would be 0 * -inf = nan, in the gradient too.
    return -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(-1)


def along_path(entropy: Float[Tensor, "N T"], logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return the entropy of each step, with a gradient whose mean is that of the sequence's entropy.

    The value at step t is H_t and the gradient is `grad H_t + (sum_{u > t} H_u) grad log pi_t`. Its mean is
    `-E[grad log pi(y) log pi(y)]`, with the entropy of each step computed and not sampled. Both arguments
    must be 0 where the position is not an action.
    """
    later = entropy.detach()
    later = reward_to_go(later) - later  # sum_{u > t} H_u, without the step's own entropy
    # logprobs - sg(logprobs) is 0 in value and has the score as its gradient.
    return entropy + later * (logprobs - logprobs.detach())


def entropy_collapsed(entropy_coef: float, entropy: float) -> bool:
    """Whether a policy over discrete actions has less than 0.1 nats of entropy and no entropy bonus.

    It does not apply to a Gaussian head: the entropy of a density may be negative without harm.

    Args:
        entropy_coef: Weight of the entropy bonus; above 0 the answer is False.
        entropy: Measured mean entropy of the policy, in nats per action; for nan the answer is False.
    """
    return entropy_coef == 0 and entropy < LEAST_ENTROPY


def final_entropy(entropies: Sequence[float]) -> float:
    """Return the mean over the last tenth of a run's steps, for `entropy_collapsed`; nan without steps."""
    last = entropies[-max(1, len(entropies) // 10) :]
    return sum(last) / len(last) if last else math.nan


def entropy_collapse_message(entropy: float) -> str:
    """Return the warning for a collapsed policy: what it means, and what to change."""
    return (
        f"entropy-collapsed: the policy ended with an entropy of {entropy:.3g} nats per action (below "
        f"{LEAST_ENTROPY:g}) and the estimator has no entropy bonus (entropy_coef 0). It nearly always makes "
        "the same choice, so it no longer finds a better one, and its gradient vanishes. This may be what "
        "you want if each prompt or state has one right answer and the reward is good; otherwise set "
        "--estimator.entropy-coef (0.01 is a start; to leave a trap takes more), or lower the learning rate."
    )
