"""Exact curves: how a divisor weighs prompts by difficulty, and what a constant baseline costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tokenrl.core import Estimator
from tokenrl.lab.exact.enumeration import exact_moments
from tokenrl.lab.exact.problems import Problem


def weight_of_difficulty(
    estimator: Estimator, chances: Sequence[float], group_size: int
) -> Float[Tensor, " K"]:
    """With binary rewards, the w in `E[g] = w grad p` for a prompt that is solved with chance p.

    w does not depend on the policy otherwise: given its reward, a completion's score has mean `grad p / p`
    or `-grad p / (1 - p)`. It is 1 for RLOO, (G-1)/G for the group mean, and for GRPO's advantages
    `E[s_K^2 / (std_K + eps)] / (p (1 - p))`, `s_K^2 = K/G (1 - K/G)`, K ~ Binomial(G, p).

    Args:
        estimator: Its advantages, for one prompt in the step; how tokens are weighed plays no part.
        chances: The p, each strictly between 0 and 1.
        group_size: G; the work grows as G^2 only.

    Raises:
        Refused: When the advantages need more than rewards and groups.
    """
    p = torch.tensor(list(chances), dtype=torch.double)
    solved = torch.arange(group_size + 1)  # K
    rewards = (torch.arange(group_size) < solved[:, None]).double()  # [G + 1, G]
    mask = torch.ones(group_size, 1, dtype=torch.double)
    advantages = torch.vmap(lambda r: estimator.advantages(r, mask, group_size=group_size).policy)(rewards)
    ones = torch.ones((), dtype=torch.double)
    count = (
        torch.lgamma((group_size + 1) * ones)
        - torch.lgamma(solved + ones)
        - torch.lgamma(group_size - solved + ones)
    )
    chance = (count + solved * p[:, None].log() + (group_size - solved) * (1 - p[:, None]).log()).exp()
    right = (advantages.reshape(rewards.shape) * rewards).mean(-1)
    wrong = (advantages.reshape(rewards.shape) * (1 - rewards)).mean(-1)
    return (chance * (right / p[:, None] - wrong / (1 - p[:, None]))).sum(-1)


def variance_with_constant_baselines(problem: Problem, constants: Sequence[float]) -> Float[Tensor, " K"]:
    """Trace of the covariance of `(R - b) S`, averaged over prompts, one completion of each, for each b.

    A parabola with its lowest point at `best_constant_baseline`.
    """
    return torch.tensor(
        [
            exact_moments(Estimator(baseline="constant", baseline_constant=b), problem, group_size=1).variance
            for b in constants
        ],
        dtype=torch.double,
    )


def best_constant_baseline(problem: Problem) -> float:
    """The b of least variance: `E[|S|^2 R] / E[|S|^2]` (Greensmith et al. 2004; Weaver and Tao 2001)."""
    norms = problem.chances * problem.scores.sum(2).square().sum(-1)  # [P, M]
    return float((norms * problem.totals).sum() / norms.sum())
