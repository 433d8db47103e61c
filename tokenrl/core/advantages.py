"""Computes advantages from rewards: first what is added to the rewards, then returns, baseline and scale.

`A = (G - b) / (std + eps)`, where G is the return, b the baseline and std the scale of the estimator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.core.baselines import BASELINES, set_size
from tokenrl.core.choices import choice_of, required
from tokenrl.core.estimator import Advantages, Estimator
from tokenrl.core.losses import PER_TOKEN
from tokenrl.core.memories import failures_of
from tokenrl.core.objectives import objective_advantages
from tokenrl.core.returns import Turns, credited, reward_to_go, token_rewards
from tokenrl.core.rows import overlong_penalty, zero_outside
from tokenrl.core.scales import SCALES
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction


class Step(NamedTuple):
    """What baselines and scales are computed from, its rows in S sets of n that are compared.

    `advantages` makes it with rows side by side [N, ...], and `in_sets` puts them into sets [S, n, ...].
    """

    estimator: Estimator
    group_size: int | None
    totals: Float[Tensor, "S n"]
    """Return of each row: the sum of its rewards, discounted by gamma."""
    valid: Bool[Tensor, "S n"]
    actions: Bool[Tensor, "S n T"]
    """The actions of valid rows."""
    rewards: Float[Tensor, "S n T"]
    """The reward of each position, with what is added to it."""
    returns: Float[Tensor, "S n #T"]
    """Return of each action [S, n, T], or [S, n, 1] where all actions of a row share the row's."""
    needed: Float[Tensor, ...]
    """The input that the baseline requires: a single number, [S, n] or [S, n, T]; 0 if it requires none."""

    def in_sets(self, axis: str) -> Step:
        """Return the step with its rows in the sets that the baseline or the scale compares.

        Raises:
            Refused: When rows do not fall into such sets.
        """
        size = set_size(self.estimator, axis, len(self.totals), self.group_size) or 1
        columns = (x.reshape(-1, size, *x.shape[1:]) if x.ndim else x for x in self[2:])
        return Step(self.estimator, self.group_size, *columns)


def advantages(
    estimator: Estimator,
    rewards: Float[Tensor, " N *T"],
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
    *,
    group_size: int | None,
    valid: Bool[Tensor, " N"] | None = None,
    logprobs: Float[Tensor, "N T"] | None = None,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    values: Float[Tensor, "N T"] | None = None,
    bootstrap: Float[Tensor, " N"] | None = None,
    greedy_rewards: Float[Tensor, " N"] | None = None,
    score_norms: Float[Tensor, "N T"] | None = None,
    baseline_value: float | Float[Tensor, " *N"] | None = None,
    components: Float[Tensor, "N K"] | None = None,
    component_weights: Float[Tensor, " K"] | None = None,
    turns: Int[Tensor, "N T"] | None = None,
    max_length: int | None = None,
) -> Advantages:
    """Compute the advantages of a whole step, `A = (G - b) / (std + eps)`.

    What is added to the rewards comes first (the overlong penalty, `bootstrap`, a KL in the reward), then
    returns, baseline and scale. Means and standard deviations over rows use the rows' total returns, also
    with the returns 'reward_to_go'. Inputs that the chosen axes do not need are ignored.

    With `turns`, one step in time is a turn instead of a token. What is added to the rewards is computed for
    tokens as ever; then the rewards of each turn are summed, and returns, baseline and scale are those of
    rewards and mask [N, K], with the mask 1 where a row reaches the turn. Every token of a turn gets the
    turn's advantage and target. gamma, lam, `window`, the length of a row and 'token_whiten' then count
    turns. With returns 'total', gamma 1 and a named baseline the actions of a row share its return, and
    turns are ignored.

    Args:
        estimator: The estimator whose axes are used.
        rewards: One per row [N], or one per position [N, T], which counts also where the mask is 0.
        mask: 1 where the token is an action of the policy [N, T].
        group_size: Number of consecutive rows per prompt; None if rows do not share prompts.
        valid: False where a row abstains [N]: it counts in no mean, std or divisor, its advantage is 0,
            and its reward may be nan. A valid row without another valid row to compare with gets 0 too.
        logprobs: Log-probabilities under the policy that sampled [N, T], for a KL in the reward.
        ref_logprobs: Log-probabilities under the reference [N, T], for a KL in the reward.
        values: Value of the state before each action [N, T], for the baseline 'value' and for 'gae'.
        bootstrap: Value of the state after the last action [N], 0 where the row terminated. It replaces
            the rewards that were cut off, so an error in it biases the gradient.
        greedy_rewards: Reward of the greedy completion of each row's prompt [N], for 'remax'.
        score_norms: |grad log pi|^2 of each token [N, T], for the baseline 'optimal'.
        baseline_value: What the baseline's memory holds before this step, for 'running_mean', 'tracker' and
            a memory of your own: one number, or one for each row [N].
        components: The reward of each of K functions, without its weight, nan where it abstained [N, K]. With
            components 'separate' each column has a baseline and a scale of its own, and `rewards` is ignored.
        component_weights: Weights by which the advantages of the functions are added [K]; None for 1. GDPO
            (arXiv 2601.05242) whitens the sum over the step as well, which is a second scale.
        turns: Number of the turn of each action, from 0 and in order [N, T]; off the mask it may hold
            anything. A reward off the mask belongs to the last turn that began before it, and to the first
            turn if none did. The value of a turn is that of its first token.
        max_length: The largest number of actions that a row may have, for overlong_buffer.

    Raises:
        Refused: When the estimator needs an input that is missing, or rows do not fall into groups.
        ValueError: When rewards and mask do not fit together.
    """
    if rewards.shape not in (mask.shape[:1], mask.shape):
        raise ValueError(f"rewards {tuple(rewards.shape)} do not fit the mask {tuple(mask.shape)}")
    mask = mask.bool()
    valid = mask.new_ones(mask.shape[0]) if valid is None else valid.bool()
    if estimator.components == "separate":
        columns = required("components", components, "'separate'")
        alone = partial(advantages, replace(estimator, components="summed"), mask=mask, turns=turns)
        alone = partial(alone, group_size=group_size, score_norms=score_norms)
        return of_components(alone, columns, component_weights, valid)
    actions = mask & valid[:, None]
    rewards = rewards_in_time(
        estimator, rewards.detach(), mask, valid, logprobs, ref_logprobs, bootstrap, max_length
    )
    inputs: dict[str, Any] = {
        "values": values,
        "greedy_rewards": greedy_rewards,
        "score_norms": score_norms,
    }
    inputs |= {"baseline_value": baseline_value}
    together = (
        estimator.returns == "total" and estimator.gamma == 1 and not callable(estimator.baseline)
    )
    if turns is not None and not together:
        inputs |= {"group_size": group_size, "valid": valid}
        return of_turns(estimator, rewards, mask, Turns.read(turns, mask), **inputs)
    targets = credited(estimator, rewards, actions, values)  # [N, T]
    to_go = estimator.returns in (
        "total",
        "reward_to_go",
    )  # a slow loop over steps, so it runs once
    totals = (targets if to_go else reward_to_go(rewards, estimator.gamma))[:, 0].clone()
    returns = totals[:, None] if estimator.returns == "total" else targets
    name = (
        "baseline_value"
        if estimator.needs_memory
        else choice_of("baseline", estimator.baseline).needs
    )
    needed = required(name, inputs[name], f"the baseline {estimator.baseline!r}") if name else 0.0
    needed = torch.as_tensor(needed, dtype=totals.dtype, device=totals.device).detach()
    step = Step(estimator, group_size, totals, valid, actions, rewards, returns, needed)

    if estimator.objective != "reward":
        policy, usable = objective_advantages(step.in_sets("baseline"))
        return Advantages(zero_outside(policy, usable).flatten(), targets)
    baseline, compared = baseline_of(step)
    sets = step.in_sets("scale")
    divided, scaled = SCALES[estimator.scale](
        sets, (returns - baseline).reshape(*sets.valid.shape, -1)
    )
    divided = divided.flatten(0, 1)  # [N, 1] or [N, T]
    # A row that can be compared with no other row gets the advantage 0. Its return without a baseline would
    # be far larger than the advantages of all other rows.
    usable = compared & scaled.flatten()
    if estimator.returns == "total" and divided.shape[1] == 1:
        return Advantages(zero_outside(divided[:, 0], usable), targets)
    return Advantages(zero_outside(divided.expand_as(actions), usable[:, None] & actions), targets)


def of_components(
    alone: Callable[..., Advantages],
    columns: Float[Tensor, "N K"],
    weights: Float[Tensor, " K"] | None,
    valid: Bool[Tensor, " N"],
) -> Advantages:
    """Return the weighted sum of the advantages that each column of rewards has by itself."""
    parts = [alone(x.nan_to_num(), valid=valid & ~x.isnan()) for x in columns.unbind(1)]
    # A weight on the rewards would be divided away again by the scale, so it is on the advantages.
    weights = torch.ones(len(parts)) if weights is None else weights
    return Advantages(*(torch.stack(x, -1) @ weights.to(columns) for x in zip(*parts, strict=True)))


def of_turns(
    estimator: Estimator,
    rewards: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    turns: Turns,
    **more: Any,
) -> Advantages:
    """Compute the advantages of turns from rewards that are complete, and give each token those of its turn.

    Args:
        estimator: The estimator.
        rewards: The reward of each position [N, T], with what is added to it.
        mask: True where the token is an action of the policy [N, T].
        turns: The turn of each position.
        **more: Further arguments of `advantages`.
    """
    for name, inside in (("values", turns.begins), ("score_norms", mask)):
        if more[name] is not None:
            more[name] = turns.sums(zero_outside(more[name], inside))
    reached = turns.sums(turns.begins.long()) > 0
    plain = replace(
        estimator, beta=0.0, overlong_buffer=0
    )  # what these add is in the rewards already
    policy, targets = advantages(plain, turns.sums(rewards), reached, **more)
    if policy.ndim == 2:
        policy = zero_outside(turns.spread(policy), mask)
    return Advantages(policy, turns.spread(targets))


def rewards_in_time(
    estimator: Estimator,
    rewards: Float[Tensor, " N *T"],
    mask: Bool[Tensor, "N T"],
    valid: Bool[Tensor, " N"],
    logprobs: Float[Tensor, "N T"] | None,
    ref_logprobs: Float[Tensor, "N T"] | None,
    bootstrap: Float[Tensor, " N"] | None,
    max_length: int | None,
) -> Float[Tensor, "N T"]:
    """Place the rewards in time and add the overlong penalty, the bootstrap value and the KL penalty.

    Returns:
        The reward of each position [N, T], which the returns are then made of.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    rewards = token_rewards(rewards, mask, valid)
    if estimator.overlong_buffer:
        length = required("max_length", max_length, "overlong_buffer")
        penalty = overlong_penalty(mask.sum(-1), length, estimator.overlong_buffer)
        rewards = rewards + token_rewards(penalty.to(rewards.dtype), mask, valid)
    if bootstrap is not None:
        # The state after the last action is one step later, hence one more gamma: r_T + gamma V(s_{T+1}).
        beyond = estimator.gamma * bootstrap.detach().to(rewards.dtype)
        rewards = rewards + token_rewards(beyond, mask, valid)
    if estimator.needs_kl and estimator.kl_placement == "reward":
        # Before the baseline, so that the baseline also subtracts the mean KL of the rows it averages.
        policy, reference = (
            zero_outside(required(name, x, "a KL in the reward").detach(), mask & valid[:, None])
            for name, x in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs))
        )
        rewards = rewards - estimator.beta * PER_TOKEN[estimator.kl_estimator](policy, reference)
    return rewards


def baseline_of(step: Step) -> tuple[Float[Tensor, "N _"], Bool[Tensor, " N"]]:
    """Return the baseline, [N, 1] or [N, T], and the mask [N] of the rows that have one."""
    chosen = step.estimator.baseline
    if step.estimator.needs_memory:
        chosen = "tracker"  # the same formula for every memory
    if callable(chosen):
        return from_function(chosen, step), step.valid
    sets = step.in_sets("baseline")
    baseline = BASELINES[chosen](sets).flatten(0, 1)
    usable = sets.valid
    if choice_of("baseline", chosen).compares in ("group", "step"):
        usable = usable & (usable.sum(-1, keepdim=True) > 1)  # a row and another one of its set
    return (baseline[:, None] if baseline.ndim == 1 else baseline), usable.flatten()


def from_function(function: Callable[..., Tensor], step: Step) -> Float[Tensor, "N _"]:
    """Call a user's function for the baseline and check what it returns.

    If it takes an argument `rewards`, it also gets the reward of each position, or of each turn [N, K] where
    steps in time are turns; the mask then has that shape. The function is given copies, so that changing them
    in place changes nothing else.

    Raises:
        Stopped: When it raises an error.
        Refused: When it returns anything but a tensor [N] or one of the shape of the mask.
    """
    totals, mask, valid = step.totals, step.actions, step.valid
    name = getattr(function, "__name__", type(function).__name__)
    rows = {"group_size": step.group_size, "mask": mask.clone(), "valid": valid.clone()}
    with failures_of(name):
        own = function.load() if isinstance(function, NamedFunction) else function
        parameters = signature(own).parameters.values()
        if any(x.name == "rewards" or x.kind is x.VAR_KEYWORD for x in parameters):
            rows["rewards"] = step.rewards.clone()
        baseline = function(totals.clone(), **rows)
    if not isinstance(baseline, Tensor) or baseline.shape not in (mask.shape[:1], mask.shape):
        result = (
            f"shape {tuple(baseline.shape)}"
            if isinstance(baseline, Tensor)
            else type(baseline).__name__
        )
        raise Refused(
            f"The baseline {name!r} returned {result}; it must return a tensor of one number per row "
            f"({len(mask)}), or one per token or turn, {tuple(mask.shape)}."
        )
    baseline = baseline.detach().to(totals.dtype)
    return baseline[:, None] if baseline.ndim == 1 else zero_outside(baseline, mask)
