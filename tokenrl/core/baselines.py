"""Computes the baseline, which is subtracted from the return: one formula for each baseline in `choices`.

A baseline b that does not depend on the row's own actions leaves the expected gradient unchanged, because
`E[b grad log pi] = b E[grad log pi] = 0` (Williams 1992).

The formulas take sets of rows [S, n]: the groups of a step, or the whole step as a single set. They average
the differences from the first valid row of the set. So the mean of equal returns is exactly that return, and
the advantage exactly 0, in any precision; the plain mean of equal float32 numbers may be rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.choices import choice_of
from tokenrl.core.rows import ALONE, check_groups, from_first, zero_outside
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.advantages import Step
    from tokenrl.core.estimator import Estimator

LONGEST_WITHOUT_BASELINE = 500
"""Most steps of an episode without a baseline; in longer ones noise hides the effect of one action."""


def rloo(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"]) -> Float[Tensor, "S n"]:
    """Return the mean over the OTHER valid rows: `(1/(n - 1)) sum_{j != i} R_j` (Kool et al. 2019).

    With this baseline b, `R_i - b_i = n/(n - 1) (R_i - mean)`. A row without another valid row has no such
    mean; it gets the first total, and `Estimator.advantages` sets its advantage to 0.
    """
    differences, first = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True) - valid.long()
    return first + (differences.sum(-1, keepdim=True) - differences) / count.clamp(min=1)


def quantile(step: Step) -> Float[Tensor, "S n"]:
    """Return the quantile of the OTHER valid rows: the least R_j that a share q of them do not exceed.

    It is one of their returns, never a number between two: with q = 0.5 the median of an odd number of rows,
    and the lower one of the two middle returns of an even number. A row without another gets its own return.
    """
    n, q = step.totals.shape[1], step.estimator.baseline_quantile
    itself = torch.eye(n, dtype=torch.bool, device=step.totals.device)
    others = step.valid[:, None] & ~itself  # [S, n, n]
    ordered = step.totals[:, None].masked_fill(~others, torch.inf).sort(-1).values
    count = others.sum(-1, keepdim=True)
    place = (q * count - 1e-6).ceil().long().clamp(
        min=1
    ) - 1  # 1e-6: q n may be rounded up, as 0.07 * 100
    return torch.where(count[..., 0] > 0, ordered.gather(-1, place)[..., 0], step.totals)


def mean(totals: Float[Tensor, "*S n"], valid: Bool[Tensor, "*S n"]) -> Float[Tensor, "*S n"]:
    """Return the mean over the valid rows of the set, the row itself included: `(1/n) sum_j R_j`.

    Because the row's own return is in it, the expected gradient is (n - 1)/n of the true one.
    """
    differences, first = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True).clamp(min=1)  # the mean of no valid rows is not used
    return (first + differences.sum(-1, keepdim=True) / count).expand_as(totals)


def std(
    totals: Float[Tensor, "*S n"], valid: Bool[Tensor, "*S n"], ddof: int
) -> Float[Tensor, "*S n"]:
    """Return the standard deviation of the valid rows of each set: `sqrt(sum (R - mean)^2 / (n - ddof))`.

    It is exactly 0 for equal totals, because they are measured from the first one, and for a set of one row.
    """
    differences, _ = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True)
    centred = zero_outside(
        differences - differences.sum(-1, keepdim=True) / count.clamp(min=1), valid
    )
    # Two passes: E[R^2] - E[R]^2 would lose all digits where the spread is small compared with the mean.
    variance = centred.square().sum(-1, keepdim=True) / (count - ddof).clamp(min=1)
    return variance.sqrt().expand_as(totals)


def weighted_mean(
    totals: Float[Tensor, "*S n"],
    valid: Bool[Tensor, "*S n"],
    weights: Float[Tensor, "*S n"],
    *,
    leave_one_out: bool,
) -> tuple[Float[Tensor, "*S n"], Bool[Tensor, "*S n"]]:
    """Return `sum_j w_j R_j / sum_j w_j`, for weights of 0 or more; over j != i if `leave_one_out`.

    With the row itself in the mean, the baseline depends on the row's own actions. The papers of 'opo' and
    'optimal' define it so, and it biases the gradient.

    Returns:
        The mean, and the mask of the rows that have one: those whose weights do not sum to 0.
    """
    differences, first = from_first(totals, valid)
    weights = zero_outside(weights.to(totals.dtype), valid)
    mass, moment = (
        sum_of_others(x) if leave_one_out else x.sum(-1, keepdim=True).expand_as(x)
        for x in (weights, weights * differences)
    )
    defined = mass > 0
    # Divide by 1 where there is no mean: a later `where` would not remove the nan of 0/0 from a gradient.
    return first + moment / torch.where(defined, mass, 1.0), defined


def sum_of_others(x: Float[Tensor, "*S n"]) -> Float[Tensor, "*S n"]:
    """Return `sum_{j != i} x_j`.

    It is summed from both sides: sum - x_i would lose the digits of the other x_j where x_i is much larger.
    """
    before = torch.nn.functional.pad(x[..., :-1].cumsum(-1), (1, 0))
    after = torch.nn.functional.pad(x[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    return before + after


def weighted_by_row(step: Step, weights: Float[Tensor, "S n"]) -> Float[Tensor, "S n"]:
    """Return the weighted mean of the returns of the group, or the plain mean where all weights are 0."""
    one_out = step.estimator.leave_one_out
    weighted, defined = weighted_mean(step.totals, step.valid, weights, leave_one_out=one_out)
    return torch.where(defined, weighted, (rloo if one_out else mean)(step.totals, step.valid))


def weighted_by_time(step: Step, weights: Float[Tensor, "S n T"]) -> Float[Tensor, "S n T"]:
    """Return the weighted mean of the returns at each timestep, over the rows of the set that act at it.

    At a timestep where no (other) row acts, the mean of the latest timestep that has one is used instead; it
    does not contain the row itself either. Before the first mean the result is 0.
    """
    by_time = (
        x.transpose(1, 2) for x in (step.returns.expand_as(step.actions), step.actions, weights)
    )
    weighted, defined = weighted_mean(
        *by_time, leave_one_out=step.estimator.leave_one_out
    )  # [S, T, n]
    weighted, defined = weighted.transpose(1, 2), defined.transpose(1, 2)
    positions = torch.arange(defined.shape[-1], device=defined.device)
    latest = (
        torch.where(defined, positions, 0).cummax(-1).values
    )  # the latest timestep that has a mean
    return zero_outside(weighted, defined).gather(-1, latest)


def opo(step: Step) -> Float[Tensor, "S n"]:
    """Return the mean weighted by length: `sum_j L_j R_j / sum_j L_j` (OPO, arXiv 2505.23585).

    Hao et al. 2025 derive it from the baseline of least variance by assuming that the squared norm |S|^2 of a
    row's score is proportional to the length of the row.
    """
    return weighted_by_row(step, step.actions.sum(-1))


def optimal(step: Step) -> Float[Tensor, "S n *T"]:
    """Return the mean weighted by squared score norms, an estimate of `E[|S|^2 R]/E[|S|^2]`.

    That ratio is the constant baseline of least variance (Greensmith et al. 2004; Weaver and Tao 2001). S is
    the sum of the scores of a row's tokens. The sum of the tokens' squared norms is used in place of |S|^2:
    the two are equal in expectation, and equal in every row when tokens share no parameters.
    """
    weights = zero_outside(step.needed, step.actions)
    if step.estimator.optimal_form == "sequence":
        return weighted_by_row(step, weights.sum(-1))
    if step.estimator.optimal_form == "cumulative":
        weights = weights.cumsum(-1)  # the optimal token baseline, arXiv 2602.07078
    return weighted_by_time(step, weights)


def shrinkage(step: Step) -> Float[Tensor, "S n"]:
    """Return `lam * mean of the prompt's other rows + (1 - lam) * mean elsewhere`.

    The mean elsewhere is the mean of the other prompts' means. Neither mean nor weight depends on row i, so
    the gradient stays exact (after the James-Stein shrinkage of arXiv 2511.03710). lam is shrinkage_weight
    or, where that is None, estimated for each prompt by `estimated_weight`. In a step of one prompt the
    result is the leave-one-out mean of the prompt.
    """
    totals, valid, weight = step.totals, step.valid, step.estimator.shrinkage_weight
    prompt_mean = rloo(totals, valid)
    means = mean(totals, valid)[..., 0]  # [S]
    present = valid.any(-1)
    different = present & ~torch.eye(len(means), dtype=torch.bool, device=means.device)  # [S, S]
    count = different.sum(-1)
    # Average differences from one of the means, so that the mean of equal means is exactly that number.
    first = means.gather(-1, present.long().argmax(-1, keepdim=True))
    elsewhere = first + (different * (means - first)).sum(-1) / count.clamp(min=1)  # [S]
    lam = estimated_weight(step, means, elsewhere, different) if weight is None else weight
    lam = torch.where(count > 0, lam, 1.0).to(totals.dtype)
    # lam own + (1 - lam) elsewhere, written as a difference so that it is exact where both are equal
    return prompt_mean + (1 - lam[:, None]) * (elsewhere[:, None] - prompt_mean)


def estimated_weight(
    step: Step,
    means: Float[Tensor, " S"],
    elsewhere: Float[Tensor, " S"],
    different: Bool[Tensor, "S S"],
) -> Float[Tensor, " S"]:
    """Estimate the best weight of a prompt's own mean, `tau^2 / (tau^2 + sigma^2/(n - 1))`, from the others.

    sigma^2 is the mean variance within the other prompts. tau^2 is the variance of their means minus what
    sampling adds to it, and at least 0. With fewer than two other prompts there is no tau^2, and the weight
    is 1.
    """
    totals, count = step.totals, step.valid.sum(-1)  # count: [S]
    enough = different & (count >= 2)
    within = (enough * std(totals, step.valid, ddof=1)[..., 0].square()).sum(-1) / enough.sum(
        -1
    ).clamp(min=1)
    number = different.sum(-1)
    spread = (different * (means - elsewhere[:, None]).square()).sum(-1) / (number - 1).clamp(min=1)
    shares = (different / count.clamp(min=1).to(totals.dtype)).sum(-1) / number.clamp(min=1)
    # The variance of the means is tau^2 plus the sampling noise sigma^2/n; a negative difference is set to 0.
    between = (spread - within * shares).clamp(min=0.0)
    noise = within / (count - 1).clamp(min=1)
    defined = (number >= 2) & (between + noise > 0)
    return torch.where(defined, between / torch.where(defined, between + noise, 1.0), 1.0)


BASELINES: dict[str, Callable[[Step], Tensor]] = {
    "none": lambda step: torch.zeros_like(step.totals),
    "constant": lambda step: torch.full_like(step.totals, step.estimator.baseline_constant),
    "running_mean": lambda step: step.needed.expand_as(step.totals),
    "tracker": lambda step: step.needed.expand_as(step.totals),
    "rloo": lambda step: rloo(step.totals, step.valid),
    "quantile": quantile,
    "group_mean": lambda step: mean(step.totals, step.valid),
    "batch_mean": lambda step: mean(step.totals, step.valid),
    # The greedy completion of the prompt (ReMax, Li et al. 2024, arXiv 2310.10505).
    "remax": lambda step: zero_outside(step.needed, step.valid),
    "opo": opo,
    "optimal": optimal,
    "shrinkage": shrinkage,
    "value": lambda step: zero_outside(step.needed, step.actions),
    # The mean over the row's own steps depends on the row's own actions, hence is biased.
    "episode_mean": lambda step: mean(step.returns.expand_as(step.actions), step.actions),
    "timestep_mean": lambda step: weighted_by_time(step, step.actions.to(step.totals.dtype)),
}
"""The formula of each name in `choices.CHOICES["baseline"]`, which returns [S, n] or [S, n, T]."""


def set_size(estimator: Estimator, axis: str, rows: int, group_size: int | None) -> int | None:
    """Return how many consecutive rows the baseline or the scale compares; None if it compares none.

    Args:
        estimator: The estimator whose baseline or scale is meant.
        axis: `baseline` or `scale`.
        rows: Rows in the step.
        group_size: Consecutive rows per prompt; None if there are no groups.

    Raises:
        Refused: When rows do not fall into such sets.
    """
    name = getattr(estimator, axis)
    compares = choice_of(axis, name).compares
    if compares == "step":
        if rows < 2:
            raise Refused(
                f"{name!r} compares the rows of a step, but the step has {rows}. Collect more, or {ALONE}."
            )
        return rows
    if compares != "group":
        return None
    size = check_groups(name, rows, group_size)
    if name == "loo_std" and size < 3:
        raise Refused(
            "'loo_std' is the spread of the other rows of a group, but group_size 2 leaves only one. Take "
            "three or more (num_generations), or the scale 'none' or 'other_groups_std'."
        )
    if name == "other_groups_std" and rows == size:
        raise Refused(
            "'other_groups_std' is the spread over other prompts, but the step has one. Take more prompts "
            "per step, or the scale 'none' or 'loo_std'."
        )
    return size


def check_horizon(
    estimator: Estimator, horizon: int | None, allow_no_baseline: bool = False
) -> None:
    """Refuse REINFORCE without a baseline where an episode may last more than 500 steps.

    With rewards of similar size at every step, R grows as the length T and the variance of `sum_t score_t R`
    as T^3. A baseline would remove most of it.

    Args:
        estimator: The estimator.
        horizon: Most steps of an episode (tokens of a completion); None if there is no limit.
        allow_no_baseline: Accept the estimator nevertheless.

    Raises:
        Refused: With the baselines to choose from, and the flag that allows none.
    """
    short = horizon is not None and horizon <= LONGEST_WITHOUT_BASELINE
    if short or allow_no_baseline or estimator.subtracts_baseline:
        return
    length = "without limit" if horizon is None else f"up to {horizon:,} steps"
    raise Refused(
        f"Episodes last {length}, but the estimator subtracts no baseline; beyond "
        f"{LONGEST_WITHOUT_BASELINE} steps noise hides the effect of one action. Choose the baseline "
        "'value', 'running_mean', 'timestep_mean' with returns 'reward_to_go', or 'rloo'; or make "
        "episodes shorter, or pass --allow-no-baseline."
    )
