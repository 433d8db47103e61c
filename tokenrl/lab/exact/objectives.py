"""Differentiates objectives that depend on the distribution of rewards, and weighs prompts by success.

The gradient of such an objective is `sum_m p_m w_m S_m`, where p_m is the probability of completion m, S_m
its score and w_m the derivative of the objective in p_m; for the mean reward that is the reward.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tokenrl.core.estimator import Estimator
from tokenrl.settings import check_number


def slopes_in_probability(
    estimator: Estimator,
    returns: Tensor,  # [P, M]
    chances: Tensor,  # [P, M]
    group_size: int,
) -> Tensor:
    """Return the derivative of the estimator's objective in the probability of each completion [P, M].

    - `reward`: R.
    - `max_at_k`: `k E[max(R, the best of k - 1 others)]`.
    - `log_success`: `R (1 - (1 - J)^T)/J`, the derivative of `sum_(k<=T) (1 - (1 - J)^k)/k` at J = E[R], with
      T = G for the form `keep_failures` and T = G - 1 for the others.
    - `quantile`: what R exceeds the quantile of the distribution by, or 0, divided by the share.
    """
    if estimator.objective_share is not None:
        share = estimator.objective_share
        ranked, indices = returns.sort(-1)
        below = chances.gather(-1, indices).cumsum(-1)
        least = (below < 1 - share - 1e-9).sum(-1, keepdim=True)  # the place of the quantile
        return (returns - ranked.gather(-1, least)).clamp(min=0) / share
    if estimator.objective == "max_at_k":
        order = estimator.objective_order or 1
        ranked, indices = returns.sort(-1)
        shares = chances.gather(-1, indices)
        below = shares.cumsum(-1)  # probability that one row is at most as good
        powers = below ** (order - 1)
        steps = powers.diff(dim=-1) * ranked[:, 1:]  # the best of the others is this one
        later = torch.nn.functional.pad(steps.flip(-1).cumsum(-1).flip(-1), (0, 1))
        slopes = order * (ranked * powers + later)
        return torch.zeros_like(returns).scatter(-1, indices, slopes)
    if estimator.objective == "log_success":
        mean = (chances * returns).sum(-1, keepdim=True)
        terms = group_size if estimator.form == "keep_failures" else group_size - 1
        return returns * (1 - (1 - mean) ** terms) / mean
    return returns


def prompt_weight(
    estimator: Estimator | str, success_rate: float | Float[Tensor, ...], group_size: int
) -> Float[Tensor, ...]:
    """Return the weight w of a prompt's gradient by its success rate p, on rewards of 0 and 1: `w(p) grad p`.

    An advantage made of the rewards of the group is f(r, K), with K successes among the G - 1 other rows. The
    expected gradient is w(p) grad p with `w(p) = E[f(1, K) - f(0, K)]`, K ~ Binomial(G - 1, p). The objective
    is the integral of w. `Estimator.advantages` gives the advantages, for a step of this group alone, with
    one token per row.

    Args:
        estimator: The estimator, or the name of a preset.
        success_rate: p, a number or a tensor of numbers from 0 to 1.
        group_size: G, completions per prompt, from 2 to 1024.

    Returns:
        The weight for each success rate, float64: 1 everywhere if the gradient is the gradient of E[R].

    Raises:
        Refused: When the estimator needs more than rewards, or larger groups.

    Example:
        >>> prompt_weight("rloo", 0.25, 4).item(), round(prompt_weight("maxrl", 0.5, 4).item(), 3)
        (1.0, 1.75)
    """
    if isinstance(estimator, str):
        estimator = Estimator.preset(estimator)
    check_number("group_size", group_size, int, at_least=2, at_most=1024)
    mask = torch.ones(group_size, 1, dtype=torch.double)
    others = torch.arange(group_size)  # K, the successes among the other rows
    successes = (others < others[:, None] + 1).double()  # [K, G]: row 0 and K others are right
    failures = successes * (others > 0)

    def first(rewards: Tensor) -> Tensor:
        advantages = estimator.advantages(rewards, mask, group_size=group_size).policy
        return advantages.reshape(group_size, -1)[0, 0]

    slope = torch.vmap(first)(successes) - torch.vmap(first)(failures)
    counts = [math.comb(group_size - 1, k) for k in range(group_size)]
    rate = torch.as_tensor(success_rate, dtype=torch.double)[..., None]
    powers = rate**others * (1 - rate) ** (group_size - 1 - others)
    chance = torch.tensor(counts, dtype=torch.double) * powers
    return (chance * slope).sum(-1)
