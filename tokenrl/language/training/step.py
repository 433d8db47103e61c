"""One training step as a straight line: sample, reward, advantages, loss, update, record."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenrl.core.baselines import RunningMean
from tokenrl.core.rows import keep
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.training.collect import Prompts, collect, inputs, score_in_parts
from tokenrl.language.training.kl_control import adapt_beta
from tokenrl.language.training.records import completion_rows, gather_rows, step_metrics
from tokenrl.language.training.update import Learner, Step, update


class Record(NamedTuple):
    """What a step leaves behind: metrics, rows for people (made when called), seconds by part."""

    metrics: dict[str, float]
    rows: Callable[[], list[dict[str, Any]]]
    timings: dict[str, float]


def training_step(
    learner: Learner,
    rewards: Rewards,
    running_mean: RunningMean,
    step: int,
    prompts: Prompts,
    more: Callable[[int], Prompts] = lambda count: (),
) -> Record:
    """Sample, reward, update and record once.

    Args:
        learner: the policy and what updates it.
        rewards: the reward functions.
        running_mean: mean reward of earlier steps; read before it is updated, or a reward would enter its own
            baseline.
        step: number of this step, from 1.
        prompts: the whole step's prompts, the same on every process.
        more: deals further prompts, for estimators that refill a step.
    """
    args, estimator, accelerator = learner.args, learner.estimator, learner.accelerator
    times = [time.perf_counter()]
    mine, rollout, result, refilled = collect(learner, rewards, step, prompts, more)
    times.append(time.perf_counter())

    needed = inputs(learner, rewards, step, mine, rollout)
    whole = gather_rows(accelerator, rollout, result, needed)  # N rows, the same on every process
    size = args.num_generations
    kept = keep(
        estimator,
        whole["rewards"],
        whole["mask"],
        group_size=size,
        valid=whole["valid"],
        truncated=whole["truncated"],
    )
    advantages = estimator.advantages(
        whole["rewards"],
        whole["mask"],
        group_size=size,
        valid=kept.compared,
        baseline_value=running_mean.value,
        max_length=args.max_completion_length,
        **{name: whole.get(name) for name in ("logprobs", *needed)},
    )
    known = Step(rollout, kept.mask, kept.counted, advantages, ref_logprobs=needed["ref_logprobs"])
    metrics = step_metrics(whole, rewards.names, size) | run_updates(learner, known, step)
    metrics |= update_baselines(learner, running_mean, known, whole)
    if estimator.needs_kl:
        metrics["kl_coef"] = adapt_beta(learner, metrics["kl"])
    if estimator.zero_spread == "refill":
        metrics["refilled"] = float(refilled)
    times.append(time.perf_counter())

    own = advantages.policy[accelerator.process_index * len(rollout.mask) :]
    rows = partial(completion_rows, learner.policy, mine, rollout, result, rewards.names, own)
    parts = zip(("collect", "update"), times, times[1:], strict=False)
    return Record(result.metrics | metrics, rows, {name: after - before for name, before, after in parts})


def update_baselines(
    learner: Learner, running_mean: RunningMean, step: Step, whole: dict[str, Tensor]
) -> dict[str, float]:
    """Teach the running mean and the critic what this step earned, once it has been used."""
    metrics = {}
    if learner.estimator.baseline == "running_mean":
        metrics["baseline"] = float(running_mean.value)
        running_mean.update(whole["rewards"], valid=whole["valid"])
    if learner.critic is not None and step.rollout.hidden is not None:
        n, width = step.rollout.mask.shape
        mask = (whole["mask"] & whole["valid"][:, None]).to(step.advantages.returns.dtype)
        rows = slice(learner.accelerator.process_index * n, (learner.accelerator.process_index + 1) * n)
        metrics["value_loss"] = learner.critic.update(
            learner.estimator,
            step.rollout.hidden,
            step.advantages.returns[rows, :width],
            (mask / mask.sum().clamp(min=1))[rows, :width],
            learner.accelerator,
        )
    return metrics


def run_updates(learner: Learner, step: Step, number: int) -> dict[str, float]:
    """All updates of a rollout: `num_iterations` passes in `num_minibatches` parts, groups kept whole.

    Returns:
        Means of the updates' metrics.
    """
    args = learner.args
    n, groups = len(step.mask), len(step.mask) // args.num_generations
    if learner.estimator.needs_old_logprobs and args.num_iterations * args.num_minibatches > 1:
        step = step._replace(old_logprobs=score_in_parts(learner, learner.policy.model, step.rollout))
    generator = torch.Generator().manual_seed(((args.seed << 32) + number) % 2**63)
    history: list[dict[str, float]] = []
    for _ in range(args.num_iterations):
        order = (
            torch.randperm(groups, generator=generator) if args.num_minibatches > 1 else torch.arange(groups)
        )
        for part in order.tensor_split(args.num_minibatches):
            chosen = torch.zeros(groups, dtype=torch.bool)
            chosen[part] = True
            rows = chosen.repeat_interleave(n // groups).to(step.mask.device)
            # The first update of a rollout is the on-policy one, of which the diagnostics speak.
            measure = not history and learner.diagnostics is not None and learner.diagnostics.due(number)
            history.append(update(learner, step, rows, measure=measure))
    return {
        name: sum(m.get(name, 0.0) for m in history) / sum(name in m for m in history) for name in history[0]
    }
