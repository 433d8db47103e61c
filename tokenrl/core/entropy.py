"""Says when a policy's entropy has collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_ENTROPY = 0.1
"""In nats per action; below it a policy over discrete actions nearly always chooses the same one."""


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
