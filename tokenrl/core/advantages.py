"""Computes advantages from rewards: first what is added to the rewards, then returns, baseline and scale.

`A = (G - b) / (std + eps)`, where G is the return, b the baseline and std the scale of the estimator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.baselines import BASELINES
from tokenrl.core.guards import given
from tokenrl.core.inputs import Inputs, Step
from tokenrl.core.kl import PER_TOKEN
from tokenrl.core.masking import zero_outside
from tokenrl.core.returns import RETURNS, reward_to_go, token_rewards
from tokenrl.core.rows import overlong_penalty
from tokenrl.core.scales import SCALES
from tokenrl.core.sets import has_others_in_set, in_sets
from tokenrl.errors import Refused, Stopped, TokenrlError
from tokenrl.user_code import is_interrupt, raised

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def compute(estimator: Estimator, inputs: Inputs) -> tuple[Float[Tensor, " N *T"], Float[Tensor, "N T"]]:
    """Compute what `Estimator.advantages` returns.

    Returns:
        The advantages, [N] if all actions of a row share one and [N, T] otherwise, and the targets of a
        critic [N, T].

    Raises:
        Refused: When the estimator needs an input that is missing, or rows do not fall into groups.
        ValueError: When the rewards have neither the shape of the rows nor that of the mask.
    """
    mask, rewards = inputs.mask, inputs.rewards
    if rewards.shape not in (mask.shape[:1], mask.shape):
        raise ValueError(
            f"rewards {tuple(rewards.shape)} fit neither the rows nor the mask {tuple(mask.shape)}"
        )
    actions = mask.bool()
    valid = actions.new_ones(mask.shape[0]) if inputs.valid is None else inputs.valid.bool()
    actions = actions & valid[:, None]
    rewards = rewards_in_time(estimator, inputs, actions, valid)  # [N, T]
    targets = RETURNS[estimator.returns](estimator, rewards, actions, inputs.values)  # [N, T]
    to_go = estimator.returns in ("total", "reward_to_go")  # its recursion over steps is slow: done once
    totals = (targets if to_go else reward_to_go(rewards, estimator.gamma))[:, 0].clone()
    returns = totals[:, None] if estimator.returns == "total" else targets
    step = Step(estimator, inputs, valid, actions, totals, returns)

    baseline, compared = baseline_of(step)
    policy, scaled = SCALES[estimator.scale](step, returns - baseline)
    # A row without others to compare with gets the advantage 0. Its return minus nothing would be a gradient
    # without a baseline, of another scale than that of all other rows.
    usable = compared & scaled
    if estimator.returns == "total" and policy.shape[1] == 1:
        return zero_outside(policy[:, 0], usable), targets
    return zero_outside(policy.expand_as(actions), usable[:, None] & actions), targets


def rewards_in_time(
    estimator: Estimator, inputs: Inputs, actions: Bool[Tensor, "N T"], valid: Bool[Tensor, " N"]
) -> Float[Tensor, "N T"]:
    """Place the rewards in time and add the overlong penalty, the bootstrap value and the KL penalty.

    Returns:
        The reward of each position [N, T], which the returns are then made of.
    """
    rewards = inputs.rewards.detach()
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    mask = inputs.mask.bool()
    rewards = token_rewards(rewards, mask, valid)
    if estimator.overlong_buffer:
        length = given("max_length", inputs.max_length, "overlong_buffer")
        penalty = overlong_penalty(mask.sum(-1), length, estimator.overlong_buffer)
        rewards = rewards + token_rewards(penalty.to(rewards.dtype), mask, valid)
    if inputs.bootstrap is not None:
        # The state after the last action is one step later, hence one more gamma: r_T + gamma V(s_{T+1}).
        beyond = estimator.gamma * inputs.bootstrap.detach().to(rewards.dtype)
        rewards = rewards + token_rewards(beyond, mask, valid)
    if estimator.needs_kl and estimator.kl_placement == "reward":
        # Before the baseline, so that the baseline also subtracts the mean KL of the rows it averages.
        logprobs = given("logprobs", inputs.logprobs, "a KL in the reward").detach()
        ref = given("ref_logprobs", inputs.ref_logprobs, "a KL in the reward").detach()
        penalty = PER_TOKEN[estimator.kl_estimator](
            zero_outside(logprobs, actions), zero_outside(ref, actions)
        )
        rewards = rewards - estimator.beta * penalty
    return rewards


def baseline_of(step: Step) -> tuple[Float[Tensor, " N *T"], Bool[Tensor, " N"]]:
    """Return the baseline, [N, 1] or [N, T], and the mask [N] of the rows that have one."""
    chosen = step.estimator.baseline
    if callable(chosen):
        return from_function(chosen, step), step.valid
    baseline = BASELINES[chosen](step)
    usable = step.valid
    if size := step.set_size("baseline"):
        usable = in_sets(has_others_in_set, size, step.totals, step.valid)
    return (baseline[:, None] if baseline.ndim == 1 else baseline), usable


def from_function(function: Callable[..., Tensor], step: Step) -> Float[Tensor, " N *T"]:
    """Call a user's function for the baseline and check what it returns.

    Raises:
        Stopped: When it raises an error.
        Refused: When it returns anything but a tensor [N] or [N, T].
    """
    mask, size = step.actions, step.inputs.group_size
    try:
        found = function(step.totals, group_size=size, mask=mask, valid=step.valid)
    except BaseException as error:
        if is_interrupt(error) or isinstance(error, TokenrlError):
            raise
        name = getattr(function, "__name__", type(function).__name__)
        raise Stopped(f"The baseline {name!r} failed: {raised(error)}.") from error
    if not isinstance(found, Tensor) or found.shape not in (mask.shape[:1], mask.shape):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise Refused(
            f"The baseline {getattr(function, '__name__', function)!r} returned {what}; it must return a "
            f"tensor of one number per row, {tuple(mask.shape[:1])}, or one per token, {tuple(mask.shape)}."
        )
    found = found.detach().to(step.totals.dtype)
    return found[:, None] if found.ndim == 1 else zero_outside(found, mask)
