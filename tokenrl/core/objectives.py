"""Computes the advantages of other objectives than the mean reward: the best of k rows, the log of success.

Multiplied by the scores and averaged over the rows of a group, the advantages give the gradient of the
objective; their statuses are in `targets.OBJECTIVES`. The formulas take sets of rows [S, n], the groups of a
step. Equal rewards are measured from the first one, as in `baselines`, so that a form in which they cancel
gives exactly 0.

`max_at_k` draws k of the m valid rows of a group without replacement and ascends the mean of their maximum
(PKPO, Walder and Karkhanis 2025, arXiv 2505.15201). With the rewards in ascending order, the j-th of m
(counted from 0) is the largest of k drawn with probability `C(j, k-1)/C(m, k)`, so sorting replaces the sum
over all subsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.core.baselines import mean, rloo, sum_of_others
from tokenrl.core.rows import from_first, zero_outside
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.advantages import Step
    from tokenrl.core.estimator import Estimator


def objective_advantages(step: Step) -> tuple[Float[Tensor, "S n"], Bool[Tensor, "S n"]]:
    """Return the advantages of the estimator's objective, and the mask of the rows that have one.

    A group with too few valid rows has none.
    """
    estimator, totals, valid = step.estimator, step.totals, step.valid
    check_group(estimator, valid.shape[-1])
    if estimator.objective == "log_success":
        advantages = log_success(totals, valid, estimator.form)
    elif estimator.objective_order == 1 and estimator.form == "leave_one_out":
        advantages = totals - rloo(totals, valid)  # the best of one row is its reward
    else:
        advantages = max_at_k(totals, valid, estimator.objective_order or 1, estimator.form)
    return advantages, valid & (valid.sum(-1, keepdim=True) >= estimator.fewest_rows)


def log_success(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], form: str
) -> Float[Tensor, "S n"]:
    """Return the difference from a mean, divided by that mean, for rewards of 0 or more.

    - `maxrl`: `(R_i - mean)/mean` with the mean of the group, 0 if that is 0 (MaxRL, arXiv 2602.02710).
    - `keep_failures`: the same, and -1 for all rows of a group whose mean is 0.
    - `leave_one_out`: `(R_i - b_i)/b_i` with the mean b_i of the other rows, 0 if that is 0.
    """
    rewards, rows = zero_outside(totals, valid), valid.sum(-1, keepdim=True)
    if form == "leave_one_out":
        difference, divisor = (
            totals - rloo(totals, valid),
            sum_of_others(rewards) / (rows - 1).clamp(min=1),
        )
    else:
        difference, divisor = (
            totals - mean(totals, valid),
            rewards.mean(-1, keepdim=True).expand_as(totals),
        )
        divisor = divisor * (rewards.shape[-1] / rows.clamp(min=1))
    defined = divisor > 0
    without = -1.0 if form == "keep_failures" else 0.0
    return torch.where(defined, difference / torch.where(defined, divisor, 1.0), without)


def max_at_k(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], order: int, form: str
) -> Float[Tensor, "S n"]:
    """Return k times the mean maximum of the row and k - 1 others, minus what the form subtracts from that.

    With m valid rows, `s_i` of the paper's eq. 19 is k/m times that mean maximum, and every form here is m
    times the paper's, because the loss averages over rows. The forms subtract:

    - `leave_one_out`: the mean maximum of k others, so that k = 1 is RLOO.
    - `sloo_minus_one`: the mean maximum of k - 1 others (eq. 33).
    - `sloo`: m/(m - 1) times the mean maximum of k others (eq. 29).
    - `no_baseline`: nothing (eq. 19).
    """
    differences, first = from_first(totals, valid)
    ranked, indices = torch.where(valid, differences, torch.inf).sort(-1)
    rows = valid.sum(-1, keepdim=True).to(totals.dtype)
    ranked = zero_outside(ranked, torch.arange(ranked.shape[-1], device=ranked.device) < rows)
    larger, smaller = (
        ranked[..., 1:],
        ranked[..., :-1],
    )  # each other row, by its place among the others
    chance = largest_of_drawn(order - 1, rows - 1, larger.shape[-1])
    best = ranked + sum_above(chance * larger) - ranked * sum_above(chance)
    chance = largest_of_drawn(order - (form == "sloo_minus_one"), rows - 1, larger.shape[-1])
    best_of_others = pad((chance * smaller).cumsum(-1), (1, 0)) + sum_above(chance * larger)
    weight = {"no_baseline": torch.zeros_like(rows), "sloo": rows / (rows - 1).clamp(min=1)}
    subtracted = weight.get(form, torch.ones_like(rows))
    advantages = order * (best - subtracted * best_of_others + (1 - subtracted) * first)
    return torch.zeros_like(totals).scatter(-1, indices, advantages)


def largest_of_drawn(
    drawn: int, rows: Float[Tensor, "S 1"], width: int
) -> Float[Tensor, "S {width}"]:
    """Return the probability that each place, in ascending order, holds the largest of the rows drawn.

    It is `C(j, drawn-1)/C(rows, drawn)` at place j, as a product of ratios that are at most 1, so that no
    binomial overflows; 0 beyond the last row, and 0 everywhere if none is drawn.
    """
    rank = torch.arange(width, dtype=rows.dtype, device=rows.device)
    ratios = torch.where(rank < rows - 1, ((rank - drawn + 2) / (rank + 1)).clamp(min=0), 1.0)
    product = ratios.flip(-1).cumprod(-1).flip(-1)
    return torch.where(rank < rows, drawn / rows.clamp(min=1) * product, 0.0)


def sum_above(x: Float[Tensor, "S m"]) -> Float[Tensor, "S n"]:
    """Return for each row the sum over the other rows above it; x has one place less than there are rows."""
    return pad(x.flip(-1).cumsum(-1).flip(-1), (0, 1))


def check_group(estimator: Estimator, group_size: int) -> None:
    """Refuse groups that are too small for the objective.

    Raises:
        Refused: When no group could have an advantage.
    """
    if estimator.objective != "reward" and group_size < estimator.fewest_rows:
        raise Refused(
            f"objective {estimator.objective!r} of order {estimator.objective_order} in the form "
            f"{estimator.form!r} needs groups of at least {estimator.fewest_rows} rows, and they have "
            f"{group_size}. Give more completions per prompt (num_generations; in control num_envs) "
            "or a smaller objective_order."
        )


def check_rewards(estimator: Estimator, rewards: Tensor, valid: Bool[Tensor, " N"]) -> None:
    """Refuse negative rewards under `log_success`, whose logarithm they do not have.

    This looks at values, so it is called beside `Estimator.advantages` and not within.

    Args:
        estimator: The estimator.
        rewards: Rewards [N] or [N, T].
        valid: False where a row abstains, [N].

    Raises:
        Refused: When a row has a negative total.
    """
    if estimator.objective != "log_success":
        return
    totals = zero_outside(
        rewards if rewards.shape == valid.shape else rewards.sum(-1), valid.bool()
    )
    if (totals < 0).any():
        raise Refused(
            "objective 'log_success' takes the logarithm of the mean reward, and a completion has the reward "
            f"{float(totals.min()):.4g}. Give rewards of 0 or more (best 0 and 1), or take another objective."
        )
