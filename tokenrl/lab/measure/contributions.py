"""Computes what each group, or each step, contributes to an estimator's gradient, in random projections.

The loss depends on the weights only through logprobs. Its derivatives in those, on-policy, times the projected
scores are the projected gradient, so all estimators are computed from the same projections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.lab.exact.enumeration import ascent_slopes
from tokenrl.language import Samples


class Contributions(NamedTuple):
    """Projected gradients of M independent units.

    Attributes:
        values: Gradients in K projections [M, K].
        groups: Number of prompt groups per unit.
        coupled: Whether the units are steps because the estimator couples the prompts of a step.
    """

    values: Tensor  # [M, K]
    groups: int
    coupled: bool


def contributions(
    estimator: Estimator, samples: Samples, projections: Tensor, *, prompts_per_step: int
) -> Contributions:
    """Compute an estimator's projected gradient for every independent unit.

    A unit is a prompt's group, or a whole step if the estimator couples the prompts of a step. It is never a
    row, because the rows of a group share a baseline. Prompts are coupled if the slopes of a step differ from
    those of its groups alone.

    Args:
        estimator: Any estimator without a critic.
        samples: The rows.
        projections: The projections of the scores of their tokens [N, T, K].
        prompts_per_step: Groups per step. Steps are disjoint; for coupled estimators, groups that do not fill
            a step are left out.

    Raises:
        Refused: When the estimator needs a critic, or cannot be used with such groups.
    """
    if "values" in estimator.needs:
        raise Refused("A measurement has no critic: no baseline 'value' and no returns 'gae'.")
    if estimator.entropy_coef:
        raise Refused(
            "A measurement has no entropies. Set entropy_coef to 0, or use `tokenrl lab exact`."
        )
    if "token_kl" in estimator.needs:
        raise Refused(
            "A measurement has no KL in closed form. Take kl_estimator 'full_path' with kl_baseline 'none', or "
            "`tokenrl lab exact`, which enumerates the closed forms on small problems."
        )
    row_numbers = torch.arange(len(samples.rewards))
    groups = row_numbers.reshape(-1, samples.group_size)  # [B, G]
    step_of = row_numbers // (samples.group_size * prompts_per_step)
    norms = projections.double().square().sum(-1) if "score_norms" in estimator.needs else None

    def slopes(rows: Tensor) -> Tensor:
        """Return minus the derivatives of one step's loss in logprobs, by `Estimator`'s own methods."""
        mean = 0.0
        if estimator.needs_memory:  # the running mean of the other steps
            elsewhere = (step_of != step_of[rows[0]]) & samples.valid
            mean = float(samples.rewards[elsewhere].mean())
        logprobs = samples.logprobs[rows]
        ref_logprobs = samples.ref_logprobs[rows]
        terms = estimator.loss_terms(
            samples.rewards[rows],
            samples.mask[rows],
            group_size=samples.group_size,
            max_length=samples.mask.shape[1],
            valid=samples.valid[rows],
            truncated=samples.truncated[rows],
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            greedy_rewards=samples.greedy_rewards[rows],
            score_norms=None if norms is None else norms[rows],
            baseline_value=mean,
        )
        entropy = torch.zeros_like(logprobs)  # without a weight in the loss
        return ascent_slopes(estimator, terms, logprobs, ref_logprobs, entropy).logprobs

    def gradient(rows: Tensor) -> Tensor:
        return slopes(rows).flatten() @ projections[rows].flatten(0, 1).double()  # [K]

    whole = len(groups) // prompts_per_step * prompts_per_step
    steps = groups[:whole].reshape(-1, prompts_per_step, samples.group_size)  # [M, P, G]
    coupled = prompts_per_step > 1 and any(_couples(slopes, step) for step in steps)
    units = steps.flatten(1) if coupled else groups
    values = torch.stack([gradient(rows) for rows in units])
    return Contributions(values, prompts_per_step if coupled else 1, coupled)


def _couples(slopes: Callable[[Tensor], Tensor], step: Tensor) -> bool:
    """Whether the slopes of a step differ from those of its groups, each as a step by itself."""
    try:
        alone = torch.cat([slopes(rows) for rows in step]) / len(step)
    except Refused:  # the estimator compares prompts, and a group has only one
        return True
    together = slopes(step.flatten())
    return not torch.allclose(together, alone, rtol=1e-6, atol=1e-9)
