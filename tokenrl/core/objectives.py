"""Computes the advantages of other objectives than the mean reward: the best of k rows, the best share, log success.

Multiplied by the scores and averaged over the rows of a group, the advantages give the gradient of the
objective; their statuses are in `choices.OBJECTIVES`. The formulas take sets of rows [S, n], the groups of a
step. Equal rewards are measured from the first one, as in `baselines`, so that a form in which they cancel
gives exactly 0.

`max_at_k` draws k of the m valid rows of a group without replacement and ascends the mean of their maximum
(PKPO, Walder and Karkhanis 2025, arXiv 2505.15201). With the rewards in ascending order, the j-th of m
(counted from 0) is the largest of k drawn with probability `C(j, k-1)/C(m, k)`, so sorting replaces the sum
over all subsets.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.core.baselines import mean, rloo, sum_of_others
from tokenrl.core.rows import from_first, sums_from, zero_outside
from tokenrl.errors import Refused


def log_success(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], form: str
) -> Float[Tensor, "S n"]:
    """Return the difference from a mean, divided by that mean, for rewards of 0 or more.

    - `maxrl`: `(R_i - mean)/mean` with the mean of the group, 0 if that is 0 (MaxRL, arXiv 2602.02710).
    - `keep_failures`: the same, and -1 for all rows of a group whose mean is 0.
    - `leave_one_out`: `(R_i - b_i)/b_i` with the mean b_i of the other rows, 0 if that is 0.
    """
    rewards = zero_outside(totals, valid)
    rows = valid.sum(-1, keepdim=True)
    if form == "leave_one_out":
        centre = rloo(totals, valid)
        divisor = sum_of_others(rewards) / (rows - 1).clamp(min=1)
    else:
        centre = mean(totals, valid)
        divisor = rewards.mean(-1, keepdim=True).expand_as(totals)
        divisor = divisor * (rewards.shape[-1] / rows.clamp(min=1))
    defined = divisor > 0
    relative = (totals - centre) / torch.where(defined, divisor, 1.0)
    without = -1.0 if form == "keep_failures" else 0.0
    return torch.where(defined, relative, without)


def max_at_k(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], objective_order: int, form: str
) -> Float[Tensor, "S n"]:
    """Return k times the mean maximum of the row and k - 1 others, minus what the form subtracts from that.

    With m valid rows, `s_i` of the paper's eq. 19 is k/m times that mean maximum, and every form here is m
    times the paper's, because the loss averages over rows. The forms subtract:

    - `leave_one_out`: the mean maximum of k others, so that k = 1 is RLOO.
    - `sloo_minus_one`: the mean maximum of k - 1 others (eq. 33).
    - `sloo`: m/(m - 1) times the mean maximum of k others (eq. 29).
    - `no_baseline`: nothing (eq. 19).
    """
    order = objective_order
    if order == 1 and form == "leave_one_out":
        return totals - rloo(totals, valid)  # the best of one row is its reward
    differences, first = from_first(totals, valid)
    ranked, indices = torch.where(valid, differences, torch.inf).sort(-1)
    rows = valid.sum(-1, keepdim=True).to(totals.dtype)
    ranks = torch.arange(ranked.shape[-1], device=ranked.device)
    ranked = zero_outside(ranked, ranks < rows)
    # Each other row, by its rank among the others: those above a row, and those below it.
    larger = ranked[..., 1:]
    smaller = ranked[..., :-1]
    width = larger.shape[-1]
    chance = largest_of_drawn(order - 1, rows - 1, width)
    best = ranked + sum_above(chance * larger) - ranked * sum_above(chance)
    drawn = order - 1 if form == "sloo_minus_one" else order
    chance = largest_of_drawn(drawn, rows - 1, width)
    from_below = (chance * smaller).cumsum(-1)
    best_of_others = pad(from_below, (1, 0)) + sum_above(chance * larger)
    weight: Tensor | float = 1.0
    if form == "no_baseline":
        weight = 0.0
    elif form == "sloo":
        weight = rows / (rows - 1).clamp(min=1)
    advantages = order * (best - weight * best_of_others + (1 - weight) * first)
    return torch.zeros_like(totals).scatter(-1, indices, advantages)


def quantile(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], objective_share: float
) -> Float[Tensor, "S n"]:
    """Return n/m times what a row exceeds the largest return beyond the best m of the n valid rows by, or 0.

    This is the risk-seeking gradient of deep symbolic regression (Petersen et al. 2021, arXiv 1912.04871). m is the
    share of the rows, rounded down, and at least 1; that largest return is their quantile. It contains the row itself,
    and so is biased. As n grows, it tends to the gradient of the mean of the best share of all returns.
    """
    rows = valid.sum(-1, keepdim=True)
    # 1e-6: the product may be rounded down, as 0.29 * 100
    best = (objective_share * rows + 1e-6).long().clamp(min=1).minimum(rows - 1)
    ranked = totals.masked_fill(~valid, torch.inf).sort(-1).values
    threshold = ranked.gather(-1, rows - best - 1)
    return (totals - threshold).clamp(min=0) * rows / best


def largest_of_drawn(
    drawn: int, rows: Float[Tensor, "S 1"], width: int
) -> Float[Tensor, "S {width}"]:
    """Return the probability that each place, in ascending order, holds the largest of the rows drawn.

    It is `C(j, drawn-1)/C(rows, drawn)` at place j, as a product of ratios that are at most 1, so that no
    binomial overflows; 0 beyond the last row, and 0 everywhere if none is drawn.
    """
    rank = torch.arange(width, dtype=rows.dtype, device=rows.device)
    ratios = ((rank - drawn + 2) / (rank + 1)).clamp(min=0)
    ratios = torch.where(rank < rows - 1, ratios, 1.0)
    product = ratios.flip(-1).cumprod(-1).flip(-1)
    chance = drawn / rows.clamp(min=1) * product
    return torch.where(rank < rows, chance, 0.0)


def sum_above(x: Float[Tensor, "S m"]) -> Float[Tensor, "S n"]:
    """Return for each row the sum over the other rows above it; x has one place less than there are rows."""
    return pad(sums_from(x), (0, 1))


def check_rewards(objective: str, rewards: Tensor, valid: Bool[Tensor, " N"]) -> None:
    """Refuse negative rewards under `log_success`, whose logarithm they do not have.

    This looks at values, so it is called beside `Estimator.advantages` and not within.

    Args:
        objective: The objective of the estimator.
        rewards: Rewards [N] or [N, T].
        valid: False where a row abstains, [N].

    Raises:
        Refused: When a row has a negative total.
    """
    if objective != "log_success":
        return
    totals = rewards if rewards.shape == valid.shape else rewards.sum(-1)
    totals = zero_outside(totals, valid.bool())
    if (totals < 0).any():
        raise Refused(
            "objective 'log_success' takes the logarithm of the mean reward, and a completion has the reward "
            f"{float(totals.min()):.4g}. Give rewards of 0 or more (best 0 and 1), or take another objective."
        )
