"""From rewards to advantages, in order: KL in the reward, returns, baseline, scale."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core import baselines, kl, returns, rules, scales
from tokenrl.core.axes import OVER_GROUP, OVER_STEP
from tokenrl.core.masking import zero_outside

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def compute(
    estimator: Estimator,
    rewards: Float[Tensor, " N *T"],
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
    group_size: int | None,
    valid: Bool[Tensor, " N"] | None,
    logprobs: Float[Tensor, "N T"] | None,
    ref_logprobs: Float[Tensor, "N T"] | None,
    baseline_value: float | Tensor | None,
) -> tuple[Float[Tensor, " N *T"], Float[Tensor, "N T"]]:
    """Do the work of `Estimator.advantages`, which explains the arguments."""
    rows = mask.shape[0]
    if rewards.shape not in (mask.shape[:1], mask.shape):
        raise ValueError(
            f"rewards {tuple(rewards.shape)} fit neither the rows nor the mask {tuple(mask.shape)}"
        )
    actions = mask.bool()
    valid = actions.new_ones(rows) if valid is None else valid.bool()
    to_go = rewards_to_go(estimator, rewards, actions, valid, logprobs, ref_logprobs)  # [N, T]
    totals = to_go[:, 0]
    usable = valid

    baseline = fixed_baseline(estimator, totals, baseline_value)  # [N]
    if size := set_size(estimator.baseline, rows, group_size):
        baseline = baselines.in_sets(baselines.OF_SETS[estimator.baseline], totals, valid, size)
        usable = usable & baselines.in_sets(baselines.has_company, totals, valid, size)
    policy = (totals[:, None] if estimator.returns == "total" else to_go) - baseline[:, None]  # [N, 1 or T]

    if size := set_size(estimator.scale, rows, group_size):
        std = baselines.in_sets(partial(scales.set_std, ddof=estimator.scale_ddof), totals, valid, size)
        usable = usable & baselines.in_sets(baselines.has_company, totals, valid, size)
        policy = scales.divide(policy, std[:, None], estimator.scale_eps)

    if estimator.returns == "total":
        return zero_outside(policy[:, 0], usable), to_go
    return zero_outside(policy, usable[:, None] & actions), to_go


def rewards_to_go(
    estimator: Estimator,
    rewards: Float[Tensor, " N *T"],
    actions: Bool[Tensor, "N T"],
    valid: Bool[Tensor, " N"],
    logprobs: Float[Tensor, "N T"] | None,
    ref_logprobs: Float[Tensor, "N T"] | None,
) -> Float[Tensor, "N T"]:
    """Lay the rewards out in time, subtract beta KL where it is placed there, and sum to the end."""
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    earned = returns.token_rewards(rewards.detach(), actions, valid)
    if estimator.needs_kl and estimator.kl_placement == "reward":
        inside = actions & valid[:, None]
        logprobs = zero_outside(rules.given("logprobs", logprobs, "a KL in the reward").detach(), inside)
        ref = zero_outside(rules.given("ref_logprobs", ref_logprobs, "a KL in the reward").detach(), inside)
        earned = earned - estimator.beta * kl.PER_TOKEN[estimator.kl_estimator](logprobs, ref)
    return returns.reward_to_go(earned, estimator.gamma)


def fixed_baseline(
    estimator: Estimator, totals: Float[Tensor, " N"], running: float | Tensor | None
) -> Float[Tensor, " N"]:
    """Return the baseline that is known before the step: a constant, the running mean, or 0."""
    value: Any = 0.0
    if estimator.baseline == "constant":
        value = estimator.baseline_constant
    elif estimator.baseline == "running_mean":
        value = rules.given("baseline_value", running, "the baseline 'running_mean'")
    return torch.as_tensor(value, dtype=totals.dtype, device=totals.device).expand_as(totals)


def set_size(choice: str, rows: int, group_size: int | None) -> int | None:
    """Return how many consecutive rows a baseline or a scale compares; None when it compares none."""
    if choice in OVER_GROUP:
        return rules.check_groups(choice, rows, group_size)
    return rules.check_step(choice, rows) if choice in OVER_STEP else None
