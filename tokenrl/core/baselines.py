"""Computes the baseline, which is subtracted from the return: one formula for each baseline in `choices`.

A baseline b that does not depend on the row's own actions leaves the expected gradient unchanged, because
`E[b grad log pi] = b E[grad log pi] = 0` (Williams 1992).

The formulas take sets of rows [S, n]: the groups of a step, or the whole step as a single set. They average
the differences from the first valid row of the set. So the mean of equal returns is exactly that return, and
the advantage exactly 0, in any precision; the plain mean of equal float32 numbers may be rounded.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.core.rows import from_first, sums_from, zero_outside


def rloo(totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"]) -> Float[Tensor, "S n"]:
    """Return the mean over the OTHER valid rows: `(1/(n - 1)) sum_{j != i} R_j` (Kool et al. 2019).

    With this baseline b, `R_i - b_i = n/(n - 1) (R_i - mean)`. A row without another valid row has no such
    mean; it gets the first total, and `Estimator.advantages` sets its advantage to 0.
    """
    differences, first = from_first(totals, valid)
    sum_of_rest = differences.sum(-1, keepdim=True) - differences
    count = valid.sum(-1, keepdim=True) - valid.long()
    return first + sum_of_rest / count.clamp(min=1)


def constant(totals: Float[Tensor, "S n"], baseline_constant: float) -> Float[Tensor, "S n"]:
    """Return the same number for every row."""
    return torch.full_like(totals, baseline_constant)


def quantile(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], baseline_quantile: float
) -> Float[Tensor, "S n"]:
    """Return the quantile of the OTHER valid rows: the least R_j that a share of them do not exceed.

    It is one of their returns, never a number between two: with a share of 0.5 the median of an odd number of
    rows, and the lower one of the two middle returns of an even number. A row without another gets its own
    return.
    """
    peers = valid[:, None] & ~each_itself(totals.shape[1], totals)  # [S, n, n]
    candidates = totals[:, None].masked_fill(~peers, torch.inf)
    ordered = candidates.sort(-1).values
    count = peers.sum(-1, keepdim=True)
    # 1e-6: the product may be rounded up, as 0.07 * 100
    rank = (baseline_quantile * count - 1e-6).ceil().long()
    index = rank.clamp(min=1) - 1
    least = ordered.gather(-1, index)[..., 0]
    return torch.where(peers.any(-1), least, totals)


def each_itself(n: int, like: Tensor) -> Bool[Tensor, "n n"]:
    """Return the mask of the pairs of n things in which a thing meets itself."""
    return torch.eye(n, dtype=torch.bool, device=like.device)


def mean(totals: Float[Tensor, "*S n"], valid: Bool[Tensor, "*S n"]) -> Float[Tensor, "*S n"]:
    """Return the mean over the valid members of the set, the row itself included: `(1/n) sum_j R_j`.

    Because the row's own return is in it, the expected gradient is (n - 1)/n of the true one. Over the steps of one
    row it depends on all actions of the row.
    """
    differences, first = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True).clamp(min=1)  # the mean of no valid rows is not used
    centre = first + differences.sum(-1, keepdim=True) / count
    return centre.expand_as(totals)


def std(
    totals: Float[Tensor, "*S n"], valid: Bool[Tensor, "*S n"], ddof: int
) -> Float[Tensor, "*S n"]:
    """Return the standard deviation of the valid rows of each set: `sqrt(sum (R - mean)^2 / (n - ddof))`.

    It is exactly 0 for equal totals, because they are measured from the first one, and for a set of one row.
    """
    differences, _ = from_first(totals, valid)
    count = valid.sum(-1, keepdim=True)
    centre = differences.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = zero_outside(differences - centre, valid)
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
    sum_of = sum_of_others if leave_one_out else sum_of_all
    differences, first = from_first(totals, valid)
    weights = zero_outside(weights.to(totals.dtype), valid)
    mass = sum_of(weights)
    defined = mass > 0
    # Divide by 1 where there is no mean: a later `where` would not remove the nan of 0/0 from a gradient.
    return first + sum_of(weights * differences) / torch.where(defined, mass, 1.0), defined


def sum_of_all(x: Float[Tensor, "*S n"]) -> Float[Tensor, "*S n"]:
    """Return `sum_j x_j`, for each of the n rows."""
    return x.sum(-1, keepdim=True).expand_as(x)


def sum_of_others(x: Float[Tensor, "*S n"]) -> Float[Tensor, "*S n"]:
    """Return `sum_{j != i} x_j`.

    It is summed from both sides: sum - x_i would lose the digits of the other x_j where x_i is much larger.
    """
    from_below = x[..., :-1].cumsum(-1)
    from_above = sums_from(x[..., 1:])
    return pad(from_below, (1, 0)) + pad(from_above, (0, 1))


def weighted_by_row(
    totals: Float[Tensor, "S n"],
    valid: Bool[Tensor, "S n"],
    weights: Float[Tensor, "S n"],
    *,
    leave_one_out: bool,
) -> Float[Tensor, "S n"]:
    """Return the weighted mean of the returns of the set, or the plain mean where all weights are 0."""
    weighted, defined = weighted_mean(totals, valid, weights, leave_one_out=leave_one_out)
    plain = rloo if leave_one_out else mean
    return torch.where(defined, weighted, plain(totals, valid))


def weighted_by_time(
    returns: Float[Tensor, "S n T"],
    actions: Bool[Tensor, "S n T"],
    weights: Float[Tensor, "S n T"],
    *,
    leave_one_out: bool,
) -> Float[Tensor, "S n T"]:
    """Return the weighted mean of the returns at each timestep, over the rows of the set that act at it.

    At a timestep where no (other) row acts, the mean of the latest timestep that has one is used instead; it
    does not contain the row itself either. Before the first mean the result is 0.
    """
    by_time = (x.transpose(1, 2) for x in (returns, actions, weights))
    weighted, defined = weighted_mean(*by_time, leave_one_out=leave_one_out)  # [S, T, n]
    weighted = weighted.transpose(1, 2)
    defined = defined.transpose(1, 2)
    positions = torch.arange(defined.shape[-1], device=defined.device)
    latest = torch.where(defined, positions, 0).cummax(-1).values  # the latest that has a mean
    return zero_outside(weighted, defined).gather(-1, latest)


def opo(
    totals: Float[Tensor, "S n"],
    valid: Bool[Tensor, "S n"],
    actions: Bool[Tensor, "S n T"],
    leave_one_out: bool,
) -> Float[Tensor, "S n"]:
    """Return the mean of the returns, weighted by the lengths of the rows (arXiv 2505.23585).

    Hao et al. 2025 derive it from the baseline of least variance by assuming that the squared norm |S|^2 of a
    row's score is proportional to the length of the row.
    """
    return weighted_by_row(totals, valid, actions.sum(-1), leave_one_out=leave_one_out)


def optimal(
    totals: Float[Tensor, "S n"],
    valid: Bool[Tensor, "S n"],
    actions: Bool[Tensor, "S n T"],
    returns: Float[Tensor, "S n T"],
    score_norms: Float[Tensor, "S n T"],
    leave_one_out: bool,
    optimal_form: str,
) -> Float[Tensor, "S n *T"]:
    """Return an estimate of the baseline of least variance (Greensmith et al. 2004).

    - `sequence`: of the constant `E[|S|^2 R]/E[|S|^2]`. S is the sum of the scores s_t of a row's tokens. The
      sum of the |s_t|^2 stands for |S|^2: it equals it in expectation, and in every row when tokens share no
      parameters. With importance weights w the rows of the gradient are w S, so that the constant is
      `E[w^2 |S|^2 R]/E[w^2 |S|^2]`.
    - `cumulative`: of one number at each timestep, with the sums of |s_u|^2 up to t as weights: the optimal
      token baseline (arXiv 2602.07078).
    """
    weights = zero_outside(score_norms, actions)
    if optimal_form == "sequence":
        return weighted_by_row(totals, valid, weights.sum(-1), leave_one_out=leave_one_out)
    return weighted_by_time(returns, actions, weights.cumsum(-1), leave_one_out=leave_one_out)


def timestep_mean(
    returns: Float[Tensor, "S n T"], actions: Bool[Tensor, "S n T"], leave_one_out: bool
) -> Float[Tensor, "S n T"]:
    """Return the mean of the returns at each timestep, over the rows that act at it."""
    return weighted_by_time(
        returns, actions, actions.to(returns.dtype), leave_one_out=leave_one_out
    )


def shrinkage(
    totals: Float[Tensor, "S n"], valid: Bool[Tensor, "S n"], shrinkage_weight: float | None
) -> Float[Tensor, "S n"]:
    """Return `lam * mean of the prompt's other rows + (1 - lam) * mean elsewhere`.

    The mean elsewhere is the mean of the other prompts' means. Neither mean nor weight depends on row i, so
    the gradient stays exact (after the James-Stein shrinkage of arXiv 2511.03710). lam is the weight or,
    where that is None, estimated for each prompt by `estimated_weight`. In a step of one prompt the result is
    the leave-one-out mean of the prompt.
    """
    prompt_mean = rloo(totals, valid)
    means = mean(totals, valid)[..., 0]  # [S]
    present = valid.any(-1)
    different = present & ~each_itself(len(means), means)  # [S, S]
    count = different.sum(-1)
    # Average differences from one of the means, so that the mean of equal means is exactly that number.
    index = present.long().argmax(-1, keepdim=True)
    first = means.gather(-1, index)
    from_one = (different * (means - first)).sum(-1)
    elsewhere = first + from_one / count.clamp(min=1)  # [S]
    variances = std(totals, valid, ddof=1)[..., 0].square()
    estimate = estimated_weight(means, variances, valid.sum(-1), elsewhere, different)
    weight = estimate if shrinkage_weight is None else shrinkage_weight
    lam = torch.where(count > 0, weight, 1.0)
    lam = lam.to(totals.dtype)[:, None]
    # lam own + (1 - lam) elsewhere, written as a difference so that it is exact where both are equal
    return prompt_mean + (1 - lam) * (elsewhere[:, None] - prompt_mean)


def estimated_weight(
    means: Float[Tensor, " S"],
    variances: Float[Tensor, " S"],
    count: Int[Tensor, " S"],
    elsewhere: Float[Tensor, " S"],
    different: Bool[Tensor, "S S"],
) -> Float[Tensor, " S"]:
    """Estimate the best weight of a prompt's own mean, `tau^2 / (tau^2 + sigma^2/(n - 1))`, from the others.

    sigma^2 is the mean variance within the other prompts. tau^2 is the variance of their means minus what
    sampling adds to it, and at least 0. With fewer than two other prompts there is no tau^2, and the weight
    is 1.

    Args:
        means: The mean return of each of S prompts.
        variances: The variance of the returns of each prompt.
        count: The number n of valid rows of each prompt.
        elsewhere: The mean of the means of the other prompts.
        different: True where two prompts differ, and the second has a valid row.
    """
    several = different & (count >= 2)
    within = (several * variances).sum(-1) / several.sum(-1).clamp(min=1)
    number = different.sum(-1)
    squares = (means - elsewhere[:, None]).square()
    spread = (different * squares).sum(-1) / (number - 1).clamp(min=1)
    reciprocals = different / count.clamp(min=1).to(means.dtype)
    shares = reciprocals.sum(-1) / number.clamp(min=1)
    # The variance of the means is tau^2 plus the sampling noise sigma^2/n; a negative difference is set to 0.
    between = (spread - within * shares).clamp(min=0.0)
    noise = within / (count - 1).clamp(min=1)
    whole = between + noise
    defined = (number >= 2) & (whole > 0)
    return torch.where(defined, between / torch.where(defined, whole, 1.0), 1.0)
