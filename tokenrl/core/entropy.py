"""The entropy of the next token and of the whole sequence, and when a policy has too little left of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from tokenrl.core.returns import reward_to_go

LEAST_ENTROPY = 0.1
"""Nats: below it a policy over discrete actions all but repeats itself, and no longer explores."""


def token_entropy(logits: Float[Tensor, "*N V"]) -> Float[Tensor, " *N"]:
    """Return `H = -sum_v p_v log p_v` in nats; a logit of -inf is an impossible token and adds nothing."""
    logprobs = logits.log_softmax(-1)
    return entropy_of(logprobs, logprobs.exp())


def entropy_of(logprobs: Float[Tensor, "*N V"], probabilities: Float[Tensor, "*N V"]) -> Float[Tensor, " *N"]:
    """Return the entropy in nats of distributions given as log-probabilities and as probabilities.

    Both are asked for because whoever samples or scores has both, and the exponential of a whole vocabulary
    is the dear part.
    """
    # 0 * log 0 is 0 here, not 0 * -inf = nan, in the gradient too
    return -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(-1)


def along_path(entropy: Float[Tensor, "N T"], logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Have the value H_t of each step and the gradient `grad H_t + (sum_{u > t} H_u) grad log pi_t`.

    In the mean this is the gradient of the sequence's entropy, `-E[grad log pi(y) log pi(y)]`, with the
    entropy of each step known and not sampled. Both arguments are 0 where the position is no action.
    """
    later = entropy.detach()
    later = reward_to_go(later) - later  # sum_{u > t} H_u, the step's own entropy left out
    return entropy + later * (logprobs - logprobs.detach())


def entropy_collapsed(entropy_coef: float, entropy: float) -> bool:
    """Say whether a policy over discrete actions has collapsed with nothing to hold it: below 0.1 nats.

    A density's entropy may be negative without harm, so this does not apply to a Gaussian head.

    Args:
        entropy_coef: Weight of the entropy bonus; above 0 nothing is flagged.
        entropy: Measured mean entropy of the policy, in nats an action; nan is not flagged.
    """
    return entropy_coef == 0 and entropy < LEAST_ENTROPY


def final_entropy(entropies: Sequence[float]) -> float:
    """Mean over the last tenth of a run's steps, which is what `entropy_collapsed` judges; nan before any."""
    last = entropies[-max(1, len(entropies) // 10) :]
    return sum(last) / len(last) if last else math.nan


def entropy_collapse_message(entropy: float) -> str:
    """Say what a collapsed policy means and how to hold it open."""
    return (
        f"entropy-collapsed: the policy ended with an entropy of {entropy:.3g} nats an action (below "
        f"{LEAST_ENTROPY:g}) and the estimator has no entropy bonus (entropy_coef 0). It all but repeats "
        "one choice, so it no longer finds anything better, and its gradient vanishes. Where each prompt or "
        "state has one right answer and the reward is good, that may be wanted; otherwise set "
        "--estimator.entropy-coef (0.01 is a start), or lower the learning rate."
    )
