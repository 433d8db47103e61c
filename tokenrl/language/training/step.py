"""One training step as a straight line: sample, reward, advantages, score, loss, backward, update, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tokenrl.core.baselines import RunningMean
from tokenrl.core.rows import keep
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.rewarded import reward_rows
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.training.batch import Batch
from tokenrl.language.training.collect import (
    Deal,
    Experience,
    Prompts,
    old_logprobs,
    refill,
    sample,
    step_rows,
    trainer_state,
)
from tokenrl.language.training.kl_control import adapt_beta
from tokenrl.language.training.processes import StepRows, gather, share
from tokenrl.language.training.records import completion_rows, step_metrics
from tokenrl.language.training.update import Learner, updates


class Record(NamedTuple):
    """The results of one training step.

    Attributes:
        metrics: numbers for metrics.jsonl, under TRL's names.
        rows: returns the completions as table rows; they are decoded only when it is called.
        timings: seconds spent in each part of the step, and in each reward function (`rewards/NAME/seconds`).
    """

    metrics: dict[str, float]
    rows: Callable[[], list[dict[str, Any]]]
    timings: dict[str, float]


def training_step(
    learner: Learner, rewards: Rewards, running_mean: RunningMean, step: int, prompts: Prompts, more: Deal
) -> Record:
    """Run one training step: sample, reward, update, record.

    Args:
        learner: the policy, its optimiser and the settings.
        rewards: the reward functions.
        running_mean: mean reward of earlier steps. It is read before it is updated, because otherwise a
            reward would enter its own baseline.
        step: number of this step, from 1.
        prompts: the whole step's prompts, the same on every process.
        more: deals further prompts, for estimators that replace groups of equal rewards.
    """
    policy, estimator, accelerator = learner.policy, learner.estimator, learner.accelerator
    sampling = replace(learner.sampling, step=step)
    g, times, before = sampling.group_size, [time.perf_counter()], dict(rewards.seconds)

    mine = share(accelerator, prompts)
    rollout = sample(learner, mine, sampling)  # n rows, g for each prompt
    result = reward_rows(policy, rewards, [row for _, row in mine], rollout, **trainer_state(learner, step))
    own = Experience(mine, rollout, result)
    if estimator.zero_spread == "refill":
        mine, rollout, result = own = refill(learner, rewards, sampling, own, more)
    times.append(time.perf_counter())

    rows = gather(accelerator, step_rows(learner, rewards, sampling, own))  # all N rows, on every process
    kept = keep(estimator, rows.rewards, rows.mask, group_size=g, valid=rows.valid, truncated=rows.truncated)
    # From all N rows on every process, so that advantages do not depend on how the step is split.
    advantages = estimator.advantages(
        rows.rewards,
        rows.mask,
        group_size=g,
        valid=kept.compared,
        baseline_value=running_mean.value,
        max_length=sampling.max_completion_length,
        **rows.inputs(),
    )

    batch = Batch(rollout, rows, kept, advantages.policy, old_logprobs(learner, rollout))
    history = []
    for update in updates(learner, batch, step):
        for part in update.parts():
            scores = learner.scores(part)
            loss = estimator.loss(
                scores.logprobs, part.advantages, part.weights, part.rollout.mask, **part.inputs(scores)
            )
            update.backward(part, loss, scores.logprobs)
        history.append(update.apply())
    learner.generator.sync(policy)  # the next step samples from the new weights

    metrics = result.metrics | step_metrics(rows, rewards.names, g) | averaged(history)
    metrics |= teach_baselines(learner, running_mean, rollout, rows, advantages.returns)
    if estimator.needs_kl:
        metrics["kl_coef"] = adapt_beta(learner, metrics["kl"])
    times.append(time.perf_counter())
    shown = share(accelerator, advantages.policy)
    table = partial(completion_rows, policy, mine, rollout, result, rewards.names, shown)
    spent = {f"rewards/{name}/seconds": now - before[name] for name, now in rewards.seconds.items()}
    return Record(metrics, table, {"collect": times[1] - times[0], "update": times[2] - times[1]} | spent)


def teach_baselines(
    learner: Learner, running_mean: RunningMean, rollout: Rollout, rows: StepRows, returns: Tensor
) -> dict[str, float]:
    """Update the running mean and the critic with this step's rewards, after the policy's update used them.

    Args:
        learner: holds the critic.
        running_mean: mean reward of earlier steps.
        rollout: this process's n rows.
        rows: all N rows of the step.
        returns: the critic's targets [N, T].

    Returns:
        `baseline`, the running mean that this step used, and `value_loss`, the critic's loss before its
        update; each only where the estimator has it.
    """
    metrics = {}
    if learner.estimator.baseline == "running_mean":
        metrics["baseline"] = float(running_mean.value)
        running_mean.update(rows.rewards, valid=rows.valid)
    if learner.critic is not None and rollout.hidden is not None:
        states = (rows.mask & rows.valid[:, None]).to(returns.dtype)
        weights, width = states / states.sum().clamp(min=1), rollout.mask.shape[1]
        metrics["value_loss"] = learner.critic.update(
            learner.estimator,
            rollout.hidden,
            share(learner.accelerator, returns)[:, :width],
            share(learner.accelerator, weights)[:, :width],
            learner.accelerator,
        )
    return metrics


def averaged(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average the metrics of the step's updates; each over the updates that report it."""
    return {
        name: sum(m.get(name, 0.0) for m in history) / sum(name in m for m in history) for name in history[0]
    }
