"""Composes the formulas of rewards, returns, baselines and scales into the advantages of a step.

`A = (G - b) / (std + eps)`, where G is the return, b the baseline and std the scale. `choices` names the formula
of each choice, and `computed` calls it with numbers.

A step is a dictionary of columns: `rewards` [N, T], the `mask` of its actions [N, T], `valid` rows [N], the
`group_size`, and the inputs that the estimator needs. An instant is a token, or a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.core.axes import Axes
from tokenrl.core.divergences import PER_TOKEN
from tokenrl.core.effects import Choice
from tokenrl.core.memories import failures_of_baseline
from tokenrl.core.returns import Turns, reward_to_go, token_rewards
from tokenrl.core.rows import Advantages, overlong_penalty, required, zero_outside
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction

Columns = dict[str, Any]
INPUTS = ("values", "score_norms", "greedy_rewards", "baseline_value")
"""What some choices need, as numbers [N, T] or [N]; the value of a baseline may be a single one."""


def computed(axes: Axes, choice: Choice, columns: Columns) -> Tensor:
    """Return what the formula of a choice computes; its parameters are named as columns, or as fields of the axes."""
    module, _, name = str(choice.formula).partition(".")
    formula = getattr(import_module(f"tokenrl.core.{module}"), name)
    inputs = {}
    for parameter in signature(formula).parameters:
        is_column = parameter in columns
        inputs[parameter] = columns[parameter] if is_column else getattr(axes, parameter)
    result: Tensor = formula(**inputs)
    return result


def in_sets(choice: Choice, columns: Columns) -> Columns:
    """Return the columns in the sets [S, n, ...] that a choice compares: groups, the whole step, or single rows."""
    rows = len(columns["valid"])
    sizes = {"step": rows, "group": columns["group_size"] or rows}
    size = sizes.get(choice.compares or "", 1)
    return {
        name: x.reshape(-1, size, *x.shape[1:]) if isinstance(x, Tensor) and x.ndim else x
        for name, x in columns.items()
    }


def comparable(valid: Bool[Tensor, "S n"], fewest: int) -> Bool[Tensor, " N"]:
    """Return the mask of the valid rows whose set has enough of them."""
    return (valid & (valid.sum(-1, keepdim=True) >= fewest)).flatten()


def rewards_in_time(
    axes: Axes, rewards: Float[Tensor, " N *T"], columns: Columns
) -> Float[Tensor, "N T"]:
    """Return the reward of each position, with the overlong penalty, the bootstrap value and the KL penalty."""
    mask = columns["mask"]
    valid = columns["valid"]
    rewards = rewards.detach()
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    in_time = token_rewards(rewards, mask, valid)
    dtype = in_time.dtype
    if axes.overlong_buffer:
        length = required("max_length", columns["max_length"], "overlong_buffer")
        penalty = overlong_penalty(mask.sum(-1), length, axes.overlong_buffer)
        in_time = in_time + token_rewards(penalty.to(dtype), mask, valid)
    if columns["bootstrap"] is not None:
        # The state after the last action is one step later, hence one more gamma: r_T + gamma V(s_{T+1}).
        beyond = axes.gamma * columns["bootstrap"].detach().to(dtype)
        in_time = in_time + token_rewards(beyond, mask, valid)
    if axes.kl_in_reward:
        # Before the baseline, so that the baseline also subtracts the mean KL of the rows it averages.
        actions = mask & valid[:, None]
        logprobs = (
            zero_outside(required(name, columns[name], "a KL in the reward").detach(), actions)
            for name in ("logprobs", "ref_logprobs")
        )
        in_time = in_time - axes.beta * PER_TOKEN[axes.kl_estimator](*logprobs)
    return in_time


def advantages_of(
    axes: Axes, columns: Columns, turns: Int[Tensor, "N T"] | None = None
) -> Advantages:
    """Return the advantages from rewards that are complete.

    With `turns` an instant is a turn. What is added to the rewards was computed for tokens; the rewards of each
    turn are summed. Returns, baseline and scale are those of rewards and mask [N, K], the mask True where a row
    reaches the turn. Every token of a turn gets the turn's advantage and target.
    """
    one_return = axes.shares_return and axes.gamma == 1 and not callable(axes.baseline)
    if turns is None or one_return:
        return advantages_by_time(axes, columns)
    mask = columns["mask"]
    clock = Turns.read(turns, mask)
    reached = clock.sums(clock.begins.long()) > 0
    in_turns = columns | {"rewards": clock.sums(columns["rewards"]), "mask": reached}
    for name, counted in {"values": clock.begins, "score_norms": mask}.items():
        if name in columns:
            in_turns[name] = clock.sums(zero_outside(columns[name], counted))
    policy, targets = advantages_by_time(axes, in_turns)
    if policy.ndim == 2:
        policy = zero_outside(clock.spread(policy), mask)
    return Advantages(policy, clock.spread(targets))


def advantages_by_time(axes: Axes, columns: Columns) -> Advantages:
    """Return the advantage of each row or instant: the return minus the baseline, divided by the scale.

    With the returns 'total' every action is credited with the first column of the targets; the others are only
    targets of a critic.
    """
    rewards = columns["rewards"]
    valid = columns["valid"]
    actions = columns["mask"] & valid[:, None]
    like: Any = {"dtype": rewards.dtype, "device": rewards.device}
    inputs = {x: torch.as_tensor(columns[x], **like).detach() for x in INPUTS if x in columns}
    columns = columns | inputs | {"actions": actions}
    returns = axes.chosen("returns")
    targets = computed(axes, returns, columns)  # [N, T]
    totals = (targets if returns.to_go else reward_to_go(rewards, axes.gamma))[:, 0]
    credit = totals[:, None] if axes.shares_return else targets
    columns |= {"totals": totals, "returns": credit.expand_as(actions)}
    choice = axes.baseline_entry
    sets = in_sets(choice, columns)
    usable = comparable(sets["valid"], axes.fewest_rows)
    if callable(choice.formula):
        baseline = from_function(choice.formula, columns)
    elif choice.formula:
        baseline = computed(axes, choice, sets).flatten(0, 1)
    else:
        baseline = columns.get(choice.needs, torch.zeros_like(totals))
    baseline = baseline[:, None] if baseline.ndim == 1 else baseline  # [N, 1] or [N, T]
    advantages = baseline if axes.other_objective else credit - baseline
    scale = axes.chosen("scale")
    if scale.formula:
        sets = in_sets(scale, columns | {"advantages": advantages})
        usable = usable & comparable(sets["valid"], scale.rows)
        advantages = computed(axes, scale, sets).flatten(0, 1)
    # A row that can be compared with no other row gets the advantage 0. Its return without a baseline would
    # be far larger than the advantages of all other rows.
    if axes.shares_return and advantages.shape[1] == 1:
        return Advantages(zero_outside(advantages[:, 0], usable), targets)
    counted = usable[:, None] & actions
    return Advantages(zero_outside(advantages.expand_as(actions), counted), targets)


def from_function(function: Callable[..., Any], columns: Columns) -> Float[Tensor, " N *T"]:
    """Call a user's function for the baseline and check what it returns.

    If it takes an argument `rewards`, it also gets the reward of each position, or of each turn [N, K] where
    instants are turns; the mask then has that shape. The function is given copies, so that changing them in
    place changes nothing else.

    Raises:
        Stopped: When it raises an error.
        Refused: When it returns anything but a tensor [N] or one of the shape of the mask.
    """
    totals = columns["totals"]
    mask = columns["actions"]
    name = getattr(function, "__name__", type(function).__name__)
    options = {
        "group_size": columns["group_size"],
        "mask": mask.clone(),
        "valid": columns["valid"].clone(),
    }
    with failures_of_baseline(name):
        loaded = function.load() if isinstance(function, NamedFunction) else function
        parameters = signature(loaded).parameters.values()
        if any(x.name == "rewards" or x.kind is x.VAR_KEYWORD for x in parameters):
            options["rewards"] = columns["rewards"].clone()
        baseline = function(totals.clone(), **options)
    if not isinstance(baseline, Tensor) or baseline.shape not in (mask.shape[:1], mask.shape):
        result = type(baseline).__name__
        if isinstance(baseline, Tensor):
            result = f"shape {tuple(baseline.shape)}"
        raise Refused(
            f"The baseline {name!r} returned {result}; it must return a tensor of one number per row "
            f"({len(mask)}), or one per token or turn, {tuple(mask.shape)}."
        )
    return baseline.detach().to(totals.dtype)


def weighted_sum(parts: Sequence[Advantages], weights: Float[Tensor, " K"] | None) -> Advantages:
    """Return the weighted sum of the advantages and of the targets of K reward functions.

    A weight on the rewards would be divided away again by the scale, so it is on the advantages.
    """
    weights = torch.ones(len(parts)) if weights is None else weights
    columns = (torch.stack(x, -1) for x in zip(*parts, strict=True))
    return Advantages(*(x @ weights.to(x) for x in columns))
