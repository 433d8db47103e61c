"""Computes the baseline, which is subtracted from the return: one formula for each baseline in `choices`.

A baseline b that does not depend on the row's own actions leaves the expected gradient unchanged, because
`E[b grad log pi] = b E[grad log pi] = 0` (Williams 1992). Each formula is a function of the `Step`, which
holds the estimator and its inputs, and returns one number per row [N] or per token [N, T].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.inputs import Step
from tokenrl.core.masking import zero_outside
from tokenrl.core.sets import at_each_timestep, in_sets, leave_one_out, set_mean, weighted_mean
from tokenrl.core.shrinkage import shrunk


def same_for_all_rows(value: Any, step: Step) -> Float[Tensor, " N"]:
    """Give every row the same number, one that was known before the step."""
    totals = step.totals
    return torch.as_tensor(value, dtype=totals.dtype, device=totals.device).expand_as(totals)


def running_mean(step: Step) -> Float[Tensor, " N"]:
    """Return the running mean as it was before this step; `RunningMean` computes it."""
    return same_for_all_rows(step.needed(), step)


def over_sets(f: Callable[..., Tensor], step: Step, *others: Tensor) -> Float[Tensor, " N"]:
    """Apply a function of totals, valid rows and `others` to each set of rows that the baseline compares."""
    return in_sets(f, step.set_size("baseline") or 1, step.totals, step.valid, *others)


def remax(step: Step) -> Float[Tensor, " N"]:
    """Return the reward of the prompt's greedy completion (ReMax, Li et al. 2024, arXiv 2310.10505)."""
    return zero_outside(step.needed().detach().to(step.totals.dtype), step.valid)


def weighted_rows(step: Step, weights: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the weighted mean of the returns of the group, or the plain mean where all weights are 0."""
    # With the row itself in the mean, the baseline depends on the row's own actions. The papers define it so,
    # and it biases the gradient.
    plain = leave_one_out if step.estimator.leave_one_out else set_mean

    def mean(totals: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
        found, known = weighted_mean(totals, valid, weights, leave_one_out=step.estimator.leave_one_out)
        return torch.where(known, found, plain(totals, valid))

    return over_sets(mean, step, weights)


def opo(step: Step) -> Float[Tensor, " N"]:
    """Return the mean weighted by length: `sum_j L_j R_j / sum_j L_j` (OPO, arXiv 2505.23585).

    Hao et al. 2025 derive it from the baseline of least variance by assuming that the squared norm |S|^2 of a
    row's score is proportional to the length of the row.
    """
    return weighted_rows(step, step.actions.sum(-1))


def optimal(step: Step) -> Float[Tensor, " N *T"]:
    """Return the mean weighted by squared score norms, an estimate of `E[|S|^2 R]/E[|S|^2]`.

    That ratio is the constant baseline of least variance (Greensmith et al. 2004; Weaver and Tao 2001). S is
    the sum of the scores of a row's tokens. The sum of the tokens' squared norms is used in place of |S|^2:
    the two are equal in expectation, and equal in every row when tokens share no parameters.
    """
    weights = zero_outside(step.needed().detach().to(step.totals.dtype), step.actions)
    if step.estimator.optimal_form == "sequence":
        return weighted_rows(step, weights.sum(-1))
    if step.estimator.optimal_form == "cumulative":
        weights = weights.cumsum(-1)  # the optimal token baseline, arXiv 2602.07078
    return timewise(step, weights)


def value(step: Step) -> Float[Tensor, "N T"]:
    """Return the critic's value of the state before each action."""
    return zero_outside(step.needed().detach().to(step.totals.dtype), step.actions)


def episode_mean(step: Step) -> Float[Tensor, "N T"]:
    """Return the mean over the row's own steps. It depends on the row's own actions, hence is biased."""
    return set_mean(step.returns.expand_as(step.actions), step.actions)


def timewise(step: Step, weights: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return the weighted mean of the returns at the same timestep, over the rows that are compared."""
    return at_each_timestep(
        step.returns.expand_as(step.actions),
        step.actions,
        weights,
        size=step.set_size("baseline") or 1,
        leave_one_out=step.estimator.leave_one_out,
    )


BASELINES: dict[str, Callable[[Step], Tensor]] = {
    "none": lambda step: same_for_all_rows(0.0, step),
    "constant": lambda step: same_for_all_rows(step.estimator.baseline_constant, step),
    "running_mean": running_mean,
    "rloo": partial(over_sets, leave_one_out),
    "group_mean": partial(over_sets, set_mean),
    "batch_mean": partial(over_sets, set_mean),
    "remax": remax,
    "opo": opo,
    "optimal": optimal,
    "shrinkage": lambda step: over_sets(partial(shrunk, weight=step.estimator.shrinkage_weight), step),
    "value": value,
    "episode_mean": episode_mean,
    "timestep_mean": lambda step: timewise(step, step.actions.to(step.totals.dtype)),
}
"""The formula of each name in `choices.CHOICES["baseline"]`."""


class RunningMean:
    """The mean of past returns: read `value` before a step is used, and call `update` once after it.

    In that order no return enters its own baseline, so the expected gradient stays exact. `state_dict` and
    `load_state_dict` carry it through a checkpoint.

    Attributes:
        value: The baseline to use now; `initial` until the first update.
    """

    def __init__(self, decay: float | None = None, initial: float = 0.0) -> None:
        """Start at `initial`.

        Args:
            decay: The decay d, from 0 to below 1, of `value <- d value + (1 - d) mean of the step`. The
                influence of `initial` shrinks by d per step; no correction is made for it. None takes the
                plain mean of all returns seen so far.
            initial: The value before any update.
        """
        self.decay = decay
        self.value = float(initial)
        self.count = 0.0

    def update(self, rewards: Float[Tensor, " N *T"], valid: Bool[Tensor, " N"] | None = None) -> None:
        """Include the rewards of one step.

        Args:
            rewards: One number per row [N], or one per position [N, T], which is summed over time.
            valid: False where a row abstains and is left out [N]; None if all rows are valid.
        """
        totals = rewards.detach().cpu().double()  # in float32 a mean over many steps would drift
        totals = totals.sum(-1) if totals.ndim == 2 else totals
        if valid is not None:
            totals = totals[valid.cpu()]
        rows = totals.numel()
        if rows == 0:
            return
        step = float(totals.mean())
        self.count += rows
        share = rows / self.count if self.decay is None else 1.0 - self.decay
        self.value += share * (step - self.value)  # rows / count gives the plain mean

    def state_dict(self) -> dict[str, float]:
        """Return the state that a checkpoint saves, as plain floats."""
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from what `state_dict` returned."""
        self.value, self.count = float(state["value"]), float(state["count"])
