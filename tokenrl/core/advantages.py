"""Composes the formulas of rewards, returns, baselines and scales into the advantages of a step.

`A = (G - b) / (std + eps)`, where G is the return, b the baseline and std the scale. `choices` names the formula
of each choice, and `Axes.computed` calls it with numbers.

A step is a dictionary of columns, the arguments of `Estimator.advantages` by their names. An instant is a token,
or a turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core.axes import Axes
from tokenrl.core.effects import Choice
from tokenrl.core.memories import failures_of_baseline
from tokenrl.core.returns import Turns, reward_to_go, token_rewards
from tokenrl.core.rows import Advantages, overlong_penalty, required, zero_outside
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction, accepted
from tokenrl.user_code import copied

Columns = dict[str, Any]
ALWAYS = ("rewards", "mask", "valid", "group_size", "logprobs", "present_logprobs")
"""The columns that every estimator uses."""
OF_TOKENS = ("logprobs", "sampling_logprobs", "ref_logprobs", "entropy")
"""Numbers of tokens, which are added up over a turn."""
SEEN = ("group_size", "valid", "rewards", "components", "lengths")
"""What a baseline of the user's may name, beside numbers of tokens, mask, turns and columns of the data."""


def in_sets(
    axes: Axes, choice: Choice, fewest: int, columns: Columns
) -> tuple[Float[Tensor, "N _"], Bool[Tensor, " N"]]:
    """Compute a formula in the sets that its choice compares.

    A set has the rows of a group, or of the step, and the columns are [S, n, ...]. Or it is one row, whose n
    members are its steps with their returns. Without sets the columns stay as they are.

    Returns:
        What the formula computes, [N, 1] or [N, T], and the mask [N] of the valid rows whose set has the fewest
        valid rows, or more.
    """
    rows = len(columns["valid"])
    usable = columns["valid"]
    size = {"step": rows, "group": columns["group_size"]}.get(choice.compares)
    if size is not None:
        columns = {
            name: x.reshape(-1, size, *x.shape[1:]) if isinstance(x, Tensor) else x
            for name, x in columns.items()
        }
        valid = columns["valid"]
        usable = (valid & (valid.sum(-1, keepdim=True) >= fewest)).flatten()
    elif choice.compares == "row":
        columns = columns | {
            "totals": columns["returns"],
            "valid": columns["actions"],
            "advantages": columns["advantages"][..., None],
        }
    return axes.computed(choice.formula, columns).reshape(rows, -1), usable


def advantages_of(axes: Axes, columns: Columns) -> Advantages:
    """Return the advantages of a step, by the sum of its rewards or by each reward function alone.

    Raises:
        Refused: When a column is missing that the estimator needs.
    """
    mask = columns["mask"]
    valid = columns["valid"]
    norms, logprobs, of_sampler = map(
        columns.__getitem__, ("score_norms", "logprobs", "sampling_logprobs")
    )
    has_both = logprobs is not None and of_sampler is not None
    if axes.importance != "none" and norms is not None and has_both:
        # else they are of the policy's own rows
        live = mask & valid[:, None]
        rows = {"log_weights": zero_outside(logprobs - of_sampler, live), "live": live}
        weights = axes.computed("losses.importance_weights", rows)
        columns = columns | {"score_norms": norms * weights**2}
    columns["lengths"] = (mask & valid[:, None]).sum(-1)
    if axes.components == "summed":
        return advantages_in_turns(axes, columns | {"rewards": rewards_in_time(axes, columns)})
    parts = []
    for column in required("components", columns["components"], "'separate'").unbind(1):
        present = valid & ~column.isnan()
        in_time = token_rewards(column.nan_to_num(), mask, present)
        parts.append(advantages_in_turns(axes, columns | {"rewards": in_time, "valid": present}))
    weights = columns["component_weights"]
    weights = torch.ones(len(parts)) if weights is None else weights
    # A weight on the rewards would be divided away again by the scale, so it is on the advantages.
    sums = (torch.stack(x, -1) for x in zip(*parts, strict=True))
    return Advantages(*(x @ weights.to(x) for x in sums))


def rewards_in_time(axes: Axes, columns: Columns) -> Float[Tensor, "N T"]:
    """Return the reward of each position, with the overlong penalty, the bootstrap value and the KL penalty."""
    mask = columns["mask"]
    valid = columns["valid"]
    rewards = columns["rewards"].detach()
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
        logprobs = {
            name: zero_outside(
                required(name, columns[name], "a KL in the reward").detach(), actions
            )
            for name in ("logprobs", "ref_logprobs")
        }
        in_time = in_time - axes.beta * axes.computed(axes.chosen("kl").formula, logprobs)
    return in_time


def advantages_in_turns(axes: Axes, columns: Columns) -> Advantages:
    """Return the advantages from rewards [N, T] that are complete.

    With `turns` an instant is a turn. What is added to the rewards was computed for tokens; the rewards of each
    turn are summed, and so are log-probabilities and entropies. Returns, baseline and scale are those of rewards and
    mask [N, K], the mask True where a row reaches the turn. Every token of a turn gets the turn's advantage and target.
    """
    one_return = axes.shares_return and axes.gamma == 1 and not callable(axes.baseline)
    if columns["turns"] is None or one_return:
        return advantages_by_time(axes, columns)
    mask = columns["mask"]
    clock = Turns.read(columns["turns"], mask)
    reached = clock.sums(clock.begins.long()) > 0
    in_turns = columns | {"rewards": clock.sums(columns["rewards"]), "mask": reached}
    summed: Columns = dict.fromkeys(("score_norms", "present_logprobs", *OF_TOKENS), mask)
    for name, counted in {"values": clock.begins, **summed}.items():
        if columns[name] is not None:
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
    returns = axes.chosen("returns")
    choice = axes.baseline_entry
    needed = {"actions": actions} | {name: columns[name] for name in ALWAYS}
    for name in filter(None, (returns.needs, choice.needs)):
        value = required(name, columns[name], f"{axes.baseline!r} with returns {axes.returns!r}")
        column = torch.as_tensor(value, dtype=rewards.dtype, device=rewards.device).detach()
        needed[name] = column if column.ndim else column.expand(len(valid))
    needed["step"] = columns
    columns = needed
    targets = learnt = axes.computed(returns.formula, columns)  # [N, T]
    if axes.value_lam is not None:
        of_critic = replace(axes, lam=axes.value_lam, length_lam=0.0)
        learnt = of_critic.computed(returns.formula, columns)
    is_to_go = returns.formula == "returns.reward_to_go"
    totals = (targets if is_to_go else reward_to_go(rewards, axes.gamma))[:, 0]
    credit = totals[:, None] if axes.shares_return else targets
    columns |= {"totals": totals, "returns": credit.expand_as(actions), "advantages": credit}
    usable = valid
    baseline = columns.get(choice.needs, torch.zeros_like(totals))
    if choice.formula:
        baseline, usable = in_sets(axes, choice, axes.fewest_rows, columns)
    baseline = baseline.reshape(len(valid), -1)  # [N, 1] or [N, T]
    advantages = baseline if axes.other_objective else credit - baseline
    scale = axes.chosen("scale")
    if scale.formula:
        columns["advantages"] = advantages
        advantages, scaled = in_sets(axes, scale, scale.rows, columns)
        usable = usable & scaled
    # A row that can be compared with no other row gets the advantage 0. Its return without a baseline would
    # be far larger than the advantages of all other rows.
    if axes.shares_return and advantages.shape[1] == 1:
        return Advantages(zero_outside(advantages[:, 0], usable), learnt)
    counted = usable[:, None] & actions
    return Advantages(zero_outside(advantages.expand_as(actions), counted), learnt)


def from_function(
    baseline: Callable[..., Any],
    totals: Float[Tensor, " N"],
    actions: Bool[Tensor, "N T"],
    step: Columns,
) -> Float[Tensor, " N *T"]:
    """Call a user's function for the baseline and check what it returns.

    It gets what it names among its parameters: columns of the step or of the data, those of tokens 0 outside the
    actions. Where instants are turns, rewards and mask have their shape [N, K], and numbers of tokens are added up. It
    gets copies, so that changing them in place changes nothing else.

    Raises:
        Stopped: When it raises an error.
        Refused: When a parameter is not there to be passed, or it returns anything but a tensor [N] or one of the
            shape of the mask.
    """
    name = getattr(baseline, "__name__", type(baseline).__name__)
    counts = step["lengths"].clamp(max=1) if step["turns"] is None else actions.sum(-1)
    columns = {x: step[x] for x in SEEN} | {"mask": actions, "turns": counts}
    for x in OF_TOKENS:
        if step[x] is not None:
            columns[x] = zero_outside(step[x], actions)
    there = {x: value for x, value in columns.items() if value is not None or x == "group_size"}
    there = {**(step["data"] or {}), **there}
    with failures_of_baseline(name):
        loaded = baseline.load() if isinstance(baseline, NamedFunction) else baseline
        own = partial(loaded, totals.clone())
        options = {x: there[x] for x in accepted(own, f"The baseline {name!r}", there)}
        for x, value in options.items():
            options[x] = value.clone() if isinstance(value, Tensor) else copied(value)
        result = own(**options)
    if isinstance(result, Tensor) and result.shape in (totals.shape, actions.shape):
        return result.detach().to(totals.dtype)
    kind = type(result).__name__
    if isinstance(result, Tensor):
        kind = f"shape {tuple(result.shape)}"
    raise Refused(
        f"The baseline {name!r} returned {kind}; it must return a tensor of one number per row "
        f"({len(totals)}), or one per token or turn, {tuple(actions.shape)}."
    )
