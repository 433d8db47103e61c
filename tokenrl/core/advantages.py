"""From rewards to advantages, in order: penalties in the reward, returns, baseline, scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core import baselines, kl, returns, rows, rules, scales
from tokenrl.core.masking import zero_outside
from tokenrl.core.shrinkage import shrunk
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


class Inputs(NamedTuple):
    """The arguments of `Estimator.advantages`, which explains them."""

    rewards: Float[Tensor, " N *T"]
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"]
    group_size: int | None
    valid: Bool[Tensor, " N"] | None
    logprobs: Float[Tensor, "N T"] | None
    ref_logprobs: Float[Tensor, "N T"] | None
    values: Float[Tensor, "N T"] | None
    bootstrap: Float[Tensor, " N"] | None
    greedy_rewards: Float[Tensor, " N"] | None
    score_norms: Float[Tensor, "N T"] | None
    baseline_value: float | Tensor | None
    max_length: int | None


class Step(NamedTuple):
    """What baselines and scales are made of."""

    inputs: Inputs
    valid: Bool[Tensor, " N"]
    actions: Bool[Tensor, "N T"]
    """The actions of valid rows."""
    totals: Float[Tensor, " N"]
    paid: Float[Tensor, " N *T"]
    """What each action is paid, [N, 1] when all actions of a row are paid the same."""


def compute(estimator: Estimator, inputs: Inputs) -> tuple[Float[Tensor, " N *T"], Float[Tensor, "N T"]]:
    """Do the work of `Estimator.advantages`; returns the policy's advantages and a critic's targets."""
    mask, rewards = inputs.mask, inputs.rewards
    if rewards.shape not in (mask.shape[:1], mask.shape):
        raise ValueError(
            f"rewards {tuple(rewards.shape)} fit neither the rows nor the mask {tuple(mask.shape)}"
        )
    actions = mask.bool()
    valid = actions.new_ones(mask.shape[0]) if inputs.valid is None else inputs.valid.bool()
    actions = actions & valid[:, None]
    earned = earned_rewards(estimator, inputs, actions, valid)  # [N, T]
    totals = returns.reward_to_go(earned, estimator.gamma)[:, 0]
    targets = credit(estimator, inputs, earned, actions)  # [N, T]
    step = Step(inputs, valid, actions, totals, totals[:, None] if estimator.returns == "total" else targets)

    baseline, usable = baseline_of(estimator, step)
    policy, scalable = scaled(estimator, step, step.paid - baseline)
    usable = usable & scalable
    if estimator.returns == "total" and policy.shape[1] == 1:
        return zero_outside(policy[:, 0], usable), targets
    return zero_outside(policy.expand_as(actions), usable[:, None] & actions), targets


def earned_rewards(
    estimator: Estimator, inputs: Inputs, actions: Bool[Tensor, "N T"], valid: Bool[Tensor, " N"]
) -> Float[Tensor, "N T"]:
    """Lay the rewards out in time, with what is added to them: long rows, a truncation's value, a KL."""
    rewards = inputs.rewards.detach()
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    mask = inputs.mask.bool()
    earned = returns.token_rewards(rewards, mask, valid)
    if estimator.overlong_buffer:
        length = rules.given("max_length", inputs.max_length, "overlong_buffer")
        penalty = rows.overlong_penalty(mask.sum(-1), length, estimator.overlong_buffer)
        earned = earned + returns.token_rewards(penalty.to(earned.dtype), mask, valid)
    if inputs.bootstrap is not None:
        beyond = estimator.gamma * inputs.bootstrap.detach().to(earned.dtype)
        earned = earned + returns.token_rewards(beyond, mask, valid)
    if estimator.needs_kl and estimator.kl_placement == "reward":
        logprobs = rules.given("logprobs", inputs.logprobs, "a KL in the reward").detach()
        ref = rules.given("ref_logprobs", inputs.ref_logprobs, "a KL in the reward").detach()
        penalty = kl.PER_TOKEN[estimator.kl_estimator](
            zero_outside(logprobs, actions), zero_outside(ref, actions)
        )
        earned = earned - estimator.beta * penalty
    return earned


def credit(
    estimator: Estimator, inputs: Inputs, earned: Float[Tensor, "N T"], actions: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """Return what is paid from each position on, by the axis `returns`; for `total` the reward to go."""
    if estimator.returns == "gae":
        values = rules.given("values", inputs.values, "returns 'gae'").detach().to(earned.dtype)
        return returns.lambda_return(earned, values, actions, gamma=estimator.gamma, lam=estimator.lam)
    if estimator.returns == "blame_window":
        return returns.in_window(earned, estimator.window, estimator.gamma)
    return returns.reward_to_go(earned, estimator.gamma)


def baseline_of(estimator: Estimator, step: Step) -> tuple[Float[Tensor, " N *T"], Bool[Tensor, " N"]]:
    """Return the baseline, [N, 1] or [N, T], and which rows have one."""
    if callable(estimator.baseline):
        return from_function(estimator.baseline, step), step.valid
    baseline = BASELINES[estimator.baseline](estimator, step)
    usable = step.valid
    if size := set_size(estimator.baseline, step):
        usable = baselines.in_sets(baselines.has_company, size, step.totals, step.valid)
    return (baseline[:, None] if baseline.ndim == 1 else baseline), usable


def from_function(function: Callable[..., Tensor], step: Step) -> Float[Tensor, " N *T"]:
    """Ask a user's function for the baseline.

    Raises:
        Refused: When it returns anything but a tensor [N] or [N, T].
    """
    mask, size = step.actions, step.inputs.group_size
    found = function(step.totals, group_size=size, mask=mask, valid=step.valid)
    if not isinstance(found, Tensor) or found.shape not in (mask.shape[:1], mask.shape):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise Refused(
            f"The baseline {getattr(function, '__name__', function)!r} returned {what}; it must return a "
            f"tensor of one number a row, {tuple(mask.shape[:1])}, or one a token, {tuple(mask.shape)}."
        )
    found = found.detach().to(step.totals.dtype)
    return found[:, None] if found.ndim == 1 else zero_outside(found, mask)


def known_before(value: Any, step: Step) -> Float[Tensor, " N"]:
    """Spread a number that was known before the step over its rows."""
    totals = step.totals
    return torch.as_tensor(value, dtype=totals.dtype, device=totals.device).expand_as(totals)


def set_size(choice: str, step: Step) -> int | None:
    """Return how many consecutive rows a baseline or a scale compares; None when it compares none."""
    return rules.set_size(choice, step.inputs.mask.shape[0], step.inputs.group_size)


def over_sets(f: Callable[..., Tensor], estimator: Estimator, step: Step) -> Float[Tensor, " N"]:
    """Apply a function of totals and valid rows to the sets of the chosen baseline."""
    return baselines.in_sets(f, set_size(str(estimator.baseline), step) or 1, step.totals, step.valid)


def running(estimator: Estimator, step: Step) -> Float[Tensor, " N"]:
    """Return the running mean as it was before the step."""
    value = rules.given("baseline_value", step.inputs.baseline_value, "the baseline 'running_mean'")
    return known_before(value, step)


def greedy(estimator: Estimator, step: Step) -> Float[Tensor, " N"]:
    """ReMax: the reward of the greedy completion of the same prompt (Li et al. 2024, arXiv 2310.10505)."""
    rewards = rules.given("greedy_rewards", step.inputs.greedy_rewards, "the baseline 'remax'")
    return zero_outside(rewards.detach().to(step.totals.dtype), step.valid)


def learned(estimator: Estimator, step: Step) -> Float[Tensor, "N T"]:
    """Return the critic's value of each state."""
    values = rules.given("values", step.inputs.values, "the baseline 'value'")
    return zero_outside(values.detach().to(step.totals.dtype), step.actions)


def weighted_rows(estimator: Estimator, step: Step, weights: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Weighted mean of the group; the plain mean where the weights are all 0."""
    plain = baselines.leave_one_out if estimator.leave_one_out else baselines.set_mean

    def mean(totals: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
        found, known = baselines.weighted_mean(totals, valid, weights, leave_one_out=estimator.leave_one_out)
        return torch.where(known, found, plain(totals, valid))

    size = set_size(str(estimator.baseline), step) or 1
    return baselines.in_sets(mean, size, step.totals, step.valid, weights)


def by_length(estimator: Estimator, step: Step) -> Float[Tensor, " N"]:
    """OPO: the mean weighted by length, for |S|^2 proportional to it (Hao et al. 2025, arXiv 2505.23585)."""
    return weighted_rows(estimator, step, step.actions.sum(-1))


def by_score(estimator: Estimator, step: Step) -> Float[Tensor, " N *T"]:
    """Weigh by squared score norms, the baseline of least variance: `E[|S|^2 R]/E[|S|^2]`.

    The sum of the tokens' squared norms stands for |S|^2; they are equal in expectation, and for every row
    when tokens share no parameters.
    """
    norms = rules.given("score_norms", step.inputs.score_norms, "the baseline 'optimal'").detach()
    weights = zero_outside(norms.to(step.totals.dtype), step.actions)
    if estimator.optimal_form == "sequence":
        return weighted_rows(estimator, step, weights.sum(-1))
    if estimator.optimal_form == "cumulative":
        weights = weights.cumsum(-1)
    return timewise(estimator, step, weights)


def timewise(estimator: Estimator, step: Step, weights: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Weighted mean of what is paid at the same timestep, over the set of the chosen baseline."""
    return baselines.at_each_timestep(
        step.paid.expand_as(step.actions),
        step.actions,
        weights,
        size=set_size(str(estimator.baseline), step) or 1,
        leave_one_out=estimator.leave_one_out,
    )


BASELINES: dict[str, Callable[[Estimator, Step], Tensor]] = {
    "none": lambda e, step: known_before(0.0, step),
    "constant": lambda e, step: known_before(e.baseline_constant, step),
    "running_mean": running,
    "batch_mean": partial(over_sets, baselines.set_mean),
    "group_mean": partial(over_sets, baselines.set_mean),
    "rloo": partial(over_sets, baselines.leave_one_out),
    "remax": greedy,
    "opo": by_length,
    "optimal": by_score,
    "shrinkage": lambda e, step: over_sets(partial(shrunk, weight=e.shrinkage_weight), e, step),
    "value": learned,
    "episode_mean": lambda e, step: baselines.set_mean(step.paid.expand_as(step.actions), step.actions),
    "timestep_mean": lambda e, step: timewise(e, step, step.actions.to(step.totals.dtype)),
}

OVER_SETS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # std, and who has one
    "group_std": (scales.set_std, baselines.has_company),
    "batch_std": (scales.set_std, baselines.has_company),
    "loo_std": (scales.others_std, partial(baselines.has_company, others=2)),
    "other_groups_std": (scales.other_sets_std, scales.has_other_rows),
}


def scaled(
    estimator: Estimator, step: Step, policy: Float[Tensor, " N *T"]
) -> tuple[Float[Tensor, " N *T"], Bool[Tensor, " N"]]:
    """Divide by the chosen scale; returns the advantages and which rows have such a scale."""
    ddof, eps = estimator.scale_ddof, estimator.scale_eps
    if estimator.scale == "token_whiten":
        return scales.whiten(policy, step.actions, ddof=ddof, eps=eps), step.valid
    if estimator.scale == "episode_std":
        std = scales.set_std(step.paid.expand_as(step.actions), step.actions, ddof)[:, :1]
        return scales.divide(policy, std, eps), step.valid
    if size := set_size(estimator.scale, step):
        deviation, enough = OVER_SETS[estimator.scale]
        std = baselines.in_sets(partial(deviation, ddof=ddof), size, step.totals, step.valid)
        usable = baselines.in_sets(enough, size, step.totals, step.valid)
        return scales.divide(policy, std[:, None], eps), usable
    return policy, step.valid
