"""Computes exact curves: how a scale weights prompts by difficulty, and variance by constant baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tokenrl.core.estimator import Estimator
from tokenrl.lab.exact.enumeration import exact_moments
from tokenrl.lab.exact.problems import Problem


def weight_of_difficulty(
    estimator: Estimator, chances: Sequence[float], group_size: int
) -> Float[Tensor, " K"]:
    """Return the weight w in `E[g] = w grad p` for a prompt with binary rewards, solved with probability p.

    w depends on the policy through p only: given its reward, the mean score of a completion is `grad p / p`
    or `-grad p / (1 - p)`. It is 1 for RLOO, (G-1)/G for the group mean, and for GRPO's advantages `E[s_K^2 /
    (std_K + eps)] / (p (1 - p))` with `s_K^2 = K/G (1 - K/G)` and K ~ Binomial(G, p).

    Args:
        estimator: The estimator whose advantages are used, with one prompt per step; the aggregation over
            tokens plays no part.
        chances: The K probabilities p, each strictly between 0 and 1.
        group_size: G, completions per prompt; the cost grows as G^2.

    Returns:
        The weight w for each p [K].

    Raises:
        Refused: When the advantages need more than rewards and groups.
    """
    p = torch.tensor(list(chances), dtype=torch.double)
    solved = torch.arange(group_size + 1)  # K
    rewards = (torch.arange(group_size) < solved[:, None]).double()  # [G + 1, G]
    mask = torch.ones(group_size, 1, dtype=torch.double)
    advantages = torch.vmap(lambda r: estimator.advantages(r, mask, group_size=group_size).policy)(rewards)
    binomial = torch.distributions.Binomial(group_size, p[:, None])
    chance: Tensor = binomial.log_prob(solved.double()).exp()  # type: ignore[no-untyped-call]  # [K, G + 1]
    right = (advantages.reshape(rewards.shape) * rewards).mean(-1)
    wrong = (advantages.reshape(rewards.shape) * (1 - rewards)).mean(-1)
    return (chance * (right / p[:, None] - wrong / (1 - p[:, None]))).sum(-1)


def variance_with_constant_baselines(problem: Problem, constants: Sequence[float]) -> Float[Tensor, " K"]:
    """Return the trace of the covariance of the gradient with one completion per prompt, for each constant b.

    The gradient is `(R - b) S`, averaged over prompts, with S the sum of the scores of a completion. The
    curve [K] is a parabola with its minimum at `best_constant_baseline`.

    Args:
        problem: The problem to enumerate.
        constants: The K values of b.
    """
    return torch.tensor(
        [
            exact_moments(Estimator(baseline="constant", baseline_constant=b), problem, group_size=1).variance
            for b in constants
        ],
        dtype=torch.double,
    )


def best_constant_baseline(problem: Problem) -> float:
    """Return the b of least variance, `E[|S|^2 R]/E[|S|^2]` (Greensmith et al. 2004; Weaver and Tao 2001)."""
    norms = problem.chances * problem.scores.sum(2).square().sum(-1)  # [P, M]
    return float((norms * problem.totals).sum() / norms.sum())
