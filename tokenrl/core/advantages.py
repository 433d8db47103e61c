"""Composes the formulas of rewards, returns, baselines and scales into the advantages of a step.

`A = (G - b) / (std + eps)`, where G is the return, b the baseline and std the scale. `Estimator.advantages`
calls these functions; each asks the axes which formula to use, and the formulas take numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.core import baselines, scales
from tokenrl.core.axes import Axes
from tokenrl.core.divergences import PER_TOKEN
from tokenrl.core.memories import failures_of_baseline
from tokenrl.core.objectives import log_success, max_at_k
from tokenrl.core.returns import (
    Turns,
    in_window,
    lambda_return,
    normalised,
    reward_to_go,
    token_rewards,
)
from tokenrl.core.rows import Advantages, overlong_penalty, required, zero_outside
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction


class Step(NamedTuple):
    """The rows of a step. An instant is a token, or a turn; inputs that were not given are None."""

    rewards: Float[Tensor, " N *T"]
    """The reward at each instant; once it is complete, with what is added to it."""
    mask: Bool[Tensor, "N T"]
    valid: Bool[Tensor, " N"]
    group_size: int | None
    values: Float[Tensor, "N T"] | None
    score_norms: Float[Tensor, "N T"] | None
    greedy_rewards: Float[Tensor, " N"] | None
    baseline_value: float | Float[Tensor, " *N"] | None

    def in_turns(self, turns: Turns) -> Step:
        """Return the step whose instants are turns.

        What is added to the rewards was computed for tokens; the rewards of each turn are summed. Returns,
        baseline and scale are those of rewards and mask [N, K], the mask 1 where a row reaches the turn. Every
        token of a turn gets the turn's advantage and target.
        """
        values = self.values
        if values is not None:
            values = turns.sums(zero_outside(values, turns.begins))
        score_norms = self.score_norms
        if score_norms is not None:
            score_norms = turns.sums(zero_outside(score_norms, self.mask))
        return self._replace(
            rewards=turns.sums(self.rewards),
            mask=turns.sums(turns.begins.long()) > 0,
            values=values,
            score_norms=score_norms,
        )


class Rows(NamedTuple):
    """What baselines and scales are computed from, side by side [N, ...] or in sets [S, n, ...]."""

    totals: Float[Tensor, "*S n"]
    """Return of each row: the sum of its rewards, discounted by gamma."""
    valid: Bool[Tensor, "*S n"]
    actions: Bool[Tensor, "*S n T"]
    """The actions of valid rows."""
    returns: Float[Tensor, "*S n #T"]
    """Return of each action, or [..., 1] where all actions of a row share the row's."""
    needed: Float[Tensor, ...]
    """The input that the baseline requires: a number, or one per row or per action; 0 if it requires none."""

    def in_sets(self, axes: Axes, axis: str, group_size: int | None) -> Rows:
        """Return the rows [S, n, ...] in the sets that the baseline or the scale compares."""
        rows = len(self.totals)
        sizes = {"step": rows, "group": group_size or rows}
        size = sizes.get(axes.chosen(axis).compares or "", 1)
        return Rows(*(x.reshape(-1, size, *x.shape[1:]) if x.ndim else x for x in self))


def rewards_in_time(
    axes: Axes,
    step: Step,
    bootstrap: Float[Tensor, " N"] | None,
    max_length: int | None,
    logprobs: Float[Tensor, "N T"] | None,
    ref_logprobs: Float[Tensor, "N T"] | None,
) -> Float[Tensor, "N T"]:
    """Return the reward of each position, with the overlong penalty, the bootstrap value and the KL penalty."""
    mask, valid = step.mask, step.valid
    rewards = step.rewards.detach()
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    rewards = token_rewards(rewards, mask, valid)
    if axes.overlong_buffer:
        length = required("max_length", max_length, "overlong_buffer")
        penalty = overlong_penalty(mask.sum(-1), length, axes.overlong_buffer)
        rewards = rewards + token_rewards(penalty.to(rewards.dtype), mask, valid)
    if bootstrap is not None:
        # The state after the last action is one step later, hence one more gamma: r_T + gamma V(s_{T+1}).
        beyond = axes.gamma * bootstrap.detach().to(rewards.dtype)
        rewards = rewards + token_rewards(beyond, mask, valid)
    if axes.kl_in_reward:
        # Before the baseline, so that the baseline also subtracts the mean KL of the rows it averages.
        actions = mask & valid[:, None]
        policy = required("logprobs", logprobs, "a KL in the reward").detach()
        reference = required("ref_logprobs", ref_logprobs, "a KL in the reward").detach()
        penalty = PER_TOKEN[axes.kl_estimator](
            zero_outside(policy, actions), zero_outside(reference, actions)
        )
        rewards = rewards - axes.beta * penalty
    return rewards


def advantages_of(axes: Axes, step: Step, turns: Int[Tensor, "N T"] | None = None) -> Advantages:
    """Return the advantages from rewards that are complete; with `turns` an instant is a turn."""
    one_return = axes.shares_return and axes.gamma == 1 and not callable(axes.baseline)
    if turns is None or one_return:
        return advantages_by_time(axes, step)
    clock = Turns.read(turns, step.mask)
    policy, targets = advantages_by_time(axes, step.in_turns(clock))
    if policy.ndim == 2:
        policy = zero_outside(clock.spread(policy), step.mask)
    return Advantages(policy, clock.spread(targets))


def advantages_by_time(axes: Axes, step: Step) -> Advantages:
    """Return the advantage of each row or instant: the return minus the baseline, divided by the scale."""
    actions = step.mask & step.valid[:, None]
    targets = credited(axes, step)  # [N, T]
    to_go = targets
    if not axes.chosen("returns").to_go:
        to_go = reward_to_go(step.rewards, axes.gamma)
    totals = to_go[:, 0]
    returns = totals[:, None] if axes.shares_return else targets
    name = "baseline_value" if axes.needs_memory else axes.chosen("baseline").needs
    needed: float | Tensor = 0.0
    if name:
        needed = required(name, getattr(step, name), f"the baseline {axes.baseline!r}")
    needed = torch.as_tensor(needed, dtype=totals.dtype, device=totals.device).detach()
    rows = Rows(totals, step.valid, actions, returns, needed)
    if axes.other_objective:
        sets = rows.in_sets(axes, "baseline", step.group_size)
        if axes.objective_order is None:
            policy = log_success(sets.totals, sets.valid, axes.form)
        else:
            policy = max_at_k(sets.totals, sets.valid, axes.objective_order, axes.form)
        # a group with too few valid rows has no advantages
        usable = sets.valid & (sets.valid.sum(-1, keepdim=True) >= axes.fewest_rows)
        return Advantages(zero_outside(policy, usable).flatten(), targets)
    baseline, compared = baseline_of(axes, rows, step)
    sets = rows.in_sets(axes, "scale", step.group_size)
    differences = (returns - baseline).reshape(*sets.valid.shape, -1)
    divided, scaled = scaled_by(axes, sets, differences)
    divided = divided.flatten(0, 1)  # [N, 1] or [N, T]
    # A row that can be compared with no other row gets the advantage 0. Its return without a baseline would
    # be far larger than the advantages of all other rows.
    usable = compared & scaled.flatten()
    if axes.shares_return and divided.shape[1] == 1:
        return Advantages(zero_outside(divided[:, 0], usable), targets)
    return Advantages(zero_outside(divided.expand_as(actions), usable[:, None] & actions), targets)


def credited(axes: Axes, step: Step) -> Float[Tensor, "N T"]:
    """Return what each action is credited with, by the returns; also a critic's targets.

    With 'total' every action is credited with the first column; the others are only targets of a critic.

    Raises:
        Refused: When values are needed and missing.
    """
    rewards = step.rewards
    gamma = axes.gamma
    actions = step.mask & step.valid[:, None]
    match axes.returns:
        case "blame_window":
            return in_window(rewards, axes.window, gamma)
        case "gae":
            values = required("values", step.values, "returns 'gae'").detach().to(rewards.dtype)
            return lambda_return(rewards, values, actions, gamma=gamma, lam=axes.lam)
        case "episode_normalized":
            to_go = reward_to_go(rewards, gamma)
            return normalised(to_go, actions, ddof=axes.scale_ddof, eps=axes.scale_eps)
        case _:
            return reward_to_go(rewards, gamma)


def baseline_of(
    axes: Axes, rows: Rows, step: Step
) -> tuple[Float[Tensor, "N _"], Bool[Tensor, " N"]]:
    """Return the baseline, [N, 1] or [N, T], and the mask [N] of the rows that have one."""
    sets = rows.in_sets(axes, "baseline", step.group_size)
    usable = sets.valid
    if axes.needs_memory:
        baseline = sets.needed.expand_as(sets.totals)
    elif callable(axes.baseline):
        return from_function(axes.baseline, rows, step), rows.valid
    else:
        baseline = named_baseline(axes, sets)
    if axes.chosen("baseline").compares in ("group", "step"):
        usable = usable & (usable.sum(-1, keepdim=True) > 1)  # a row and another one of its set
    baseline = baseline.flatten(0, 1)
    return (baseline[:, None] if baseline.ndim == 1 else baseline), usable.flatten()


def named_baseline(axes: Axes, sets: Rows) -> Float[Tensor, "S n *T"]:
    """Return the baseline of each row, or of each action, by the formula of its name."""
    totals = sets.totals
    valid = sets.valid
    actions = sets.actions
    one_out = axes.leave_one_out
    match axes.baseline:
        case "none":
            return torch.zeros_like(totals)
        case "constant":
            return torch.full_like(totals, axes.baseline_constant)
        case "rloo":
            return baselines.rloo(totals, valid)
        case "quantile":
            return baselines.quantile(totals, valid, axes.baseline_quantile)
        case "group_mean" | "batch_mean":
            return baselines.mean(totals, valid)
        case "remax":  # the greedy completion of the prompt (Li et al. 2024, arXiv 2310.10505)
            return zero_outside(sets.needed, valid)
        case "opo":
            lengths = actions.sum(-1)
            return baselines.weighted_by_row(totals, valid, lengths, leave_one_out=one_out)
        case "shrinkage":
            return baselines.shrinkage(totals, valid, axes.shrinkage_weight)
        case "value":
            return zero_outside(sets.needed, actions)
        case "episode_mean":
            # The mean over the row's own steps depends on the row's own actions, hence is biased.
            return baselines.mean(sets.returns.expand_as(actions), actions)
        case "timestep_mean":
            weights = actions.to(totals.dtype)
        case "optimal":
            weights = zero_outside(sets.needed, actions)
            if axes.optimal_form == "sequence":
                by_row = weights.sum(-1)
                return baselines.weighted_by_row(totals, valid, by_row, leave_one_out=one_out)
            if axes.optimal_form == "cumulative":
                weights = weights.cumsum(-1)
    returns = sets.returns.expand_as(actions)
    return baselines.weighted_by_time(returns, actions, weights, leave_one_out=one_out)


def scaled_by(
    axes: Axes, sets: Rows, advantages: Float[Tensor, "S n #T"]
) -> tuple[Float[Tensor, "S n #T"], Bool[Tensor, "S n"]]:
    """Return the advantages divided by the scale, and the mask of the rows that have one."""
    totals = sets.totals
    valid = sets.valid
    actions = sets.actions
    ddof = axes.scale_ddof
    eps = axes.scale_eps
    usable = valid
    match axes.scale:
        case "none":
            return advantages, valid
        case "token_whiten":
            return scales.token_whiten(advantages, actions, ddof=ddof, eps=eps), valid
        case "loo_std":
            deviation, usable = scales.std_of_others(totals, valid, ddof)
        case "other_groups_std":
            deviation, usable = scales.std_of_other_sets(totals, valid, ddof)
        case "episode_std":
            deviation = baselines.std(sets.returns.expand_as(actions), actions, ddof)[..., 0]
        case _:  # of the group, or of the step
            deviation = baselines.std(totals, valid, ddof)
            usable = valid.sum(-1, keepdim=True) > 1
    return scales.divide(advantages, deviation[..., None], eps), valid & usable


def from_function(function: Callable[..., Tensor], rows: Rows, step: Step) -> Float[Tensor, "N _"]:
    """Call a user's function for the baseline and check what it returns.

    If it takes an argument `rewards`, it also gets the reward of each position, or of each turn [N, K] where
    instants are turns; the mask then has that shape. The function is given copies, so that changing them in
    place changes nothing else.

    Raises:
        Stopped: When it raises an error.
        Refused: When it returns anything but a tensor [N] or one of the shape of the mask.
    """
    totals = rows.totals
    mask = rows.actions
    name = getattr(function, "__name__", type(function).__name__)
    options = {"group_size": step.group_size, "mask": mask.clone(), "valid": rows.valid.clone()}
    with failures_of_baseline(name):
        loaded = function.load() if isinstance(function, NamedFunction) else function
        parameters = signature(loaded).parameters.values()
        if any(x.name == "rewards" or x.kind is x.VAR_KEYWORD for x in parameters):
            options["rewards"] = step.rewards.clone()
        baseline = function(totals.clone(), **options)
    if not isinstance(baseline, Tensor) or baseline.shape not in (mask.shape[:1], mask.shape):
        result = type(baseline).__name__
        if isinstance(baseline, Tensor):
            result = f"shape {tuple(baseline.shape)}"
        raise Refused(
            f"The baseline {name!r} returned {result}; it must return a tensor of one number per row "
            f"({len(mask)}), or one per token or turn, {tuple(mask.shape)}."
        )
    baseline = baseline.detach().to(totals.dtype)
    return baseline[:, None] if baseline.ndim == 1 else zero_outside(baseline, mask)


def weighted_sum(parts: Sequence[Advantages], weights: Float[Tensor, " K"] | None) -> Advantages:
    """Return the weighted sum of the advantages and of the targets of K reward functions.

    A weight on the rewards would be divided away again by the scale, so it is on the advantages.
    """
    weights = torch.ones(len(parts)) if weights is None else weights
    columns = (torch.stack(x, -1) for x in zip(*parts, strict=True))
    return Advantages(*(x @ weights.to(x) for x in columns))
