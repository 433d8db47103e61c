"""Updates a policy from a rollout, with the same estimators as language models: actions stand for tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.policies import Policy
from tokenrl.control.rollouts import Rollout
from tokenrl.core.estimator import Estimator
from tokenrl.core.memories import Memory, read, update
from tokenrl.core.objectives import check_rewards
from tokenrl.core.rows import in_rows, unrounded
from tokenrl.core.schedules import policy_steps, share_of_rate
from tokenrl.core.statistics import explained
from tokenrl.errors import Stopped


@dataclass
class Agent:
    """The policy with everything else that updates change, and the settings of updates.

    Attributes:
        policy: the policy, with a critic if the estimator needs one.
        args: the settings.
        horizon: the largest number of steps of an episode.
        optimizer: has two groups of parameters, those of the policy and those of a separate critic.
        memory: what the baseline remembers of earlier rollouts, such as the mean of past returns.
        generator: random numbers that assign actions to minibatches.
        nonfinite: number of latest updates in a row whose gradient was not finite.
        skipped: number of all updates so far whose gradient was not finite.
    """

    policy: Policy
    args: ControlArguments
    horizon: int
    optimizer: torch.optim.Optimizer
    memory: Memory
    generator: torch.Generator
    nonfinite: int = 0
    skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue beside the weights; tensors are references, not copies."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "memory": self.memory.state_dict(),
            "generator": self.generator.get_state(),
            "failures": (self.nonfinite, self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the weights are loaded apart from this.

        Raises:
            Refused: the optimiser has other parameters than the one that was saved.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory.load_state_dict(state["memory"])
        self.generator.set_state(state["generator"])
        self.nonfinite, self.skipped = state["failures"]


class Units(NamedTuple):
    """What the loss sums over: M single actions [M, 1], or whole rows [N, T] if it compares their steps."""

    observations: Tensor
    actions: Tensor
    mask: Tensor
    advantages: Tensor
    weights: Tensor
    returns: Tensor
    old_logprobs: Tensor | None
    """None unless the estimator has a ratio."""
    old_values: Tensor | None
    """None without a critic."""

    def each(self, function: Callable[[Tensor], Tensor]) -> Units:
        """Return the units with every column changed by the function."""
        columns = self._asdict().items()
        return self._replace(**{name: function(x) for name, x in columns if x is not None})


def learn(agent: Agent, rollout: Rollout, step: int) -> dict[str, float]:
    """Do all updates of one rollout; then update the memory and the scale of observations with it.

    Returns:
        Metrics: those of the updates, averaged, and those of the rollout.

    Raises:
        Stopped: too many updates in a row had a gradient that was not finite.
    """
    args = agent.args
    policy = agent.policy
    estimator = scheduled(args, step)
    units, metrics = loss_units(agent, estimator, rollout)
    of_critic = not policy_steps(args, step)
    count = len(units.mask)
    updates: list[dict[str, float]] = []
    for _ in range(args.num_iterations):
        if args.num_minibatches == 1:
            updates.append(_update(agent, estimator, units, of_critic))
            continue
        order = torch.randperm(count, generator=agent.generator)
        for index in order.tensor_split(min(args.num_minibatches, count)):
            part = units.each(itemgetter(index))
            # With these weights a minibatch has the expected gradient of the whole rollout.
            weights = part.weights * (count / len(index))
            part = part._replace(weights=weights)
            updates.append(_update(agent, estimator, part, of_critic))
    # Only now, so that the rewards of this rollout do not enter their own baseline.
    if estimator.needs_memory:
        rewards = rollout.rewards * args.reward_scale
        metrics["baseline"] = update(agent.memory, keys_of(rollout), rewards)
    if policy.shape.normalize_observations:
        observations = rollout.observations[..., : policy.shape.observation_size]
        policy.scale.update(observations[rollout.mask])
    for name in updates[0]:
        metrics[name] = sum(values[name] for values in updates) / len(updates)
    return metrics


def scheduled(args: ControlArguments, step: int) -> Estimator:
    """Return the estimator of a step, counted from 1; its entropy bonus may fall to 0 over the run."""
    if args.entropy_schedule == "constant":
        return args.estimator
    share = share_of_rate(args.entropy_schedule, step - 1, args.max_steps)
    return replace(args.estimator, entropy_coef=args.estimator.entropy_coef * share)


@torch.no_grad()
def loss_units(
    agent: Agent, estimator: Estimator, rollout: Rollout
) -> tuple[Units, dict[str, float]]:
    """Return the units of a rollout that the loss sums over, and metrics of the policy that played it."""
    args = agent.args
    policy = agent.policy
    mask = rollout.mask
    observations = rollout.observations[mask]
    inputs: dict[str, Any] = {}
    old_logprobs = None
    if estimator.needs & {"old_logprobs", "sampling_logprobs", "score_norms"}:
        scored = policy.score(observations, rollout.actions[mask])
        old_logprobs = in_rows(scored.logprobs, mask)
        inputs["score_norms"] = in_rows(scored.score_norms, mask)
    if "values" in estimator.needs:
        inputs["values"] = in_rows(policy.values(observations), mask)
        # A terminal state has value 0. A truncated episode would have gone on, so the critic's value is added
        # in place of its later rewards; except with gamma 1, where the return of an episode is the sum of its
        # own rewards. A value of normalised returns is in other units than rewards, so it is not added.
        ends = rollout.terminated
        if estimator.gamma == 1 or args.time_limits == "end":
            ends = ends | rollout.truncated
        if "returns" not in estimator.within_rows:
            inputs["bootstrap"] = torch.where(ends, 0.0, policy.values(rollout.final_observations))
    if estimator.needs_memory:
        inputs["baseline_value"] = read(agent.memory, keys_of(rollout))
    check_rewards(estimator.objective, rollout.rewards, mask.any(-1))
    dtype = rollout.observations.dtype
    terms = estimator.loss_terms(
        unrounded(rollout.rewards * args.reward_scale, dtype),
        mask,
        group_size=len(mask) if estimator.needs_groups else None,
        max_length=agent.horizon,
        **inputs,
    ).to(dtype)
    advantages = terms.advantages
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(mask.shape)
    metrics = {"advantage_std": 0.0}
    if mask.sum() > 1:
        metrics["advantage_std"] = float(advantages[mask].std())
    values = inputs.get("values")
    if values is not None:
        metrics["explained_variance"] = explained(values[mask], terms.returns[mask])
    units = Units(
        observations=rollout.observations,
        actions=rollout.actions,
        mask=mask,
        advantages=advantages,
        weights=terms.weights,
        returns=terms.returns,
        old_logprobs=old_logprobs,
        old_values=values,
    )
    whole_rows = estimator.chosen("ratio").whole_row
    return (units if whole_rows else one_by_one(units)), metrics


def keys_of(rollout: Rollout) -> Tensor:
    """Return the keys of the episodes in a memory [N]: all are 0, as no prompts tell them apart."""
    return torch.zeros(len(rollout.mask), dtype=torch.long)


def one_by_one(rows: Units) -> Units:
    """Make every action a unit of its own, and leave out the padding."""
    return rows.each(lambda x: x[rows.mask][:, None])


def _update(agent: Agent, estimator: Estimator, units: Units, of_critic: bool) -> dict[str, float]:
    """Make an update of policy and critic, or `of_critic` alone; return its metrics."""
    args = agent.args
    policy = agent.policy
    mask = units.mask
    observations = units.observations[mask]
    scored = policy.score(
        observations, units.actions[mask], entropy_gradient=estimator.entropy_coef > 0
    )
    objective = estimator.loss(
        in_rows(scored.logprobs, mask),
        units.advantages,
        units.weights,
        mask,
        old_logprobs=units.old_logprobs,
        sampling_logprobs=units.old_logprobs,
        entropy=in_rows(scored.entropy, mask),
    )
    count = float(mask.sum())
    critic_loss = torch.zeros(())
    if policy.critic is not None:
        # The loss of a shared critic has the policy's weights times value_coef, since both move the same layers.
        # A separate critic has its own learning rate, and its loss is the mean over actions.
        is_shared = policy.shape.critic == "shared"
        weights = units.weights * args.value_coef if is_shared else mask / count
        values = in_rows(policy.values(observations), mask)
        critic_loss = estimator.critic_loss(
            values, units.returns, weights, old_values=units.old_values
        )
    agent.optimizer.zero_grad()
    (critic_loss if of_critic else objective + critic_loss).backward()
    norm = _apply(agent)
    metrics = {
        "loss": float(objective.detach()),
        "entropy": float(scored.entropy.detach().sum() / count),
        "grad_norm": norm,
        "grad_clipped": float(norm > (args.max_grad_norm or math.inf)),
    }
    if policy.critic is not None:
        metrics["value_loss"] = float(critic_loss.detach())
    return metrics


def _apply(agent: Agent) -> float:
    """Clip the gradient and make the optimiser's step; return the policy's gradient norm before clipping.

    An update whose gradient is not finite is skipped.
    """
    limit = agent.args.max_grad_norm or math.inf
    parts = agent.policy.policy_parameters(), agent.policy.value_parameters()
    norms = [float(nn.utils.clip_grad_norm_(part, limit)) for part in parts]
    if all(map(math.isfinite, norms)):
        agent.nonfinite = 0
        agent.optimizer.step()
        return norms[0]
    agent.skipped += 1
    agent.nonfinite += 1
    if agent.nonfinite >= agent.args.stop_after_nonfinite:
        raise Stopped(
            f"The gradient was not finite in {agent.nonfinite} updates in a row, which were skipped. Lower "
            "the learning rate, or set reward_scale so that returns are about 1."
        )
    return norms[0]
