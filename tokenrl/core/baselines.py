"""What is subtracted from a return before it multiplies the score: one formula for each row of `choices`.

A baseline leaves the expected gradient alone if it does not depend on the row's own actions: then `E[b grad
log pi] = b E[grad log pi] = 0`. A formula is a function of the step, which
knows its estimator, and returns one number per row [N] or per token [N, T].
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


def known_before(value: Any, step: Step) -> Float[Tensor, " N"]:
    """Spread a number that was known before the step over its rows."""
    totals = step.totals
    return torch.as_tensor(value, dtype=totals.dtype, device=totals.device).expand_as(totals)


def running_mean(step: Step) -> Float[Tensor, " N"]:
    """Return the running mean as it was before the step; `RunningMean` keeps it."""
    return known_before(step.needed(), step)


def over_sets(f: Callable[..., Tensor], step: Step) -> Float[Tensor, " N"]:
    """Apply a function of totals and valid rows to each set of rows that the baseline compares."""
    return in_sets(f, step.set_size("baseline") or 1, step.totals, step.valid)


def remax(step: Step) -> Float[Tensor, " N"]:
    """Take the reward of the prompt's greedy completion (ReMax, Li et al. 2024, arXiv 2310.10505)."""
    return zero_outside(step.needed().detach().to(step.totals.dtype), step.valid)


def weighted_rows(step: Step, weights: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Weighted mean of the group; the plain mean where the weights are all 0."""
    # with the row inside, the baseline depends on the row's own action: the papers' form, and biased
    plain = leave_one_out if step.estimator.leave_one_out else set_mean

    def mean(totals: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
        found, known = weighted_mean(totals, valid, weights, leave_one_out=step.estimator.leave_one_out)
        return torch.where(known, found, plain(totals, valid))

    return in_sets(mean, step.set_size("baseline") or 1, step.totals, step.valid, weights)


def opo(step: Step) -> Float[Tensor, " N"]:
    """Weigh by length, for |S|^2 proportional to it (OPO, Hao et al. 2025, arXiv 2505.23585)."""
    return weighted_rows(step, step.actions.sum(-1))


def optimal(step: Step) -> Float[Tensor, " N *T"]:
    """Weigh by squared score norms, the baseline of least variance: `E[|S|^2 R]/E[|S|^2]`.

    The sum of the tokens' squared norms stands for |S|^2; they are equal in expectation, and for every row
    when tokens share no parameters.
    """
    weights = zero_outside(step.needed().detach().to(step.totals.dtype), step.actions)
    if step.estimator.optimal_form == "sequence":
        return weighted_rows(step, weights.sum(-1))
    if step.estimator.optimal_form == "cumulative":
        weights = weights.cumsum(-1)  # the optimal token baseline, arXiv 2602.07078
    return timewise(step, weights)


def value(step: Step) -> Float[Tensor, "N T"]:
    """Return the critic's value of each state."""
    return zero_outside(step.needed().detach().to(step.totals.dtype), step.actions)


def episode_mean(step: Step) -> Float[Tensor, "N T"]:
    """Mean over the row's own steps, which depends on its own actions: a bias."""
    return set_mean(step.returns.expand_as(step.actions), step.actions)


def timewise(step: Step, weights: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Weighted mean of the returns at the same timestep, over the rows that the baseline compares."""
    return at_each_timestep(
        step.returns.expand_as(step.actions),
        step.actions,
        weights,
        size=step.set_size("baseline") or 1,
        leave_one_out=step.estimator.leave_one_out,
    )


BASELINES: dict[str, Callable[[Step], Tensor]] = {
    "none": lambda step: known_before(0.0, step),
    "constant": lambda step: known_before(step.estimator.baseline_constant, step),
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
    """A mean of past returns, to be read before a rollout is used and updated once after it.

    In that order no return enters its own baseline, so the gradient stays exact given the past.

    Attributes:
        value: The baseline to use now; `initial` until the first update.
    """

    def __init__(self, decay: float | None = None, initial: float = 0.0) -> None:
        """Start at `initial`.

        Args:
            decay: Of `value <- decay * value + (1 - decay) * mean of the step`, which forgets `initial` step
                by step and is not corrected for it; None for the plain mean of every return seen so far.
            initial: The value before any update.
        """
        self.decay = decay
        self.value = float(initial)
        self.count = 0.0

    def update(self, rewards: Float[Tensor, " N *T"], valid: Bool[Tensor, " N"] | None = None) -> None:
        """Take in the rewards of one step, [N] or [N, T] (summed over time), leaving out rows not valid."""
        totals = rewards.detach().cpu().double()  # a mean over many steps: float32 would drift
        totals = totals.sum(-1) if totals.ndim == 2 else totals
        if valid is not None:
            totals = totals[valid.cpu()]
        rows = totals.numel()
        if rows == 0:
            return
        step = float(totals.mean())
        self.count += rows
        share = rows / self.count if self.decay is None else 1.0 - self.decay
        self.value += share * (step - self.value)  # without a decay share is n/count, the plain mean

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint needs, as plain floats."""
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a `state_dict` again."""
        self.value, self.count = float(state["value"]), float(state["count"])
