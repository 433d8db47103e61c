"""One training step as a straight line: sample, reward, advantages, score, loss, backward, update, record.

The loss is a sum over tokens whose weights come from the whole step, so a micro-batch is a slice of it, and
neither the size of a micro-batch, nor the number of processes, nor leaving out rows without gradient changes
the update. Weights and advantages are identical on every process, and each process trains on its own rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tokenrl.core.statistics import flat_gradient
from tokenrl.language.rollout.rewarded import reward_rows
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training.batch import Batch, averaging, gather, share
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
from tokenrl.language.training.records import completion_rows, step_metrics
from tokenrl.language.training.update import (
    averaged,
    counted,
    minibatches,
    passes,
    signal,
    teach_baselines,
    token_weights,
    update_metrics,
)

if TYPE_CHECKING:
    from tokenrl.core.baselines import RunningMean
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.training.learner import Learner


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
    sampling, parameters = replace(learner.sampling, step=step), policy.trainable_parameters()
    times, before, entropy = [time.perf_counter()], dict(rewards.seconds), estimator.needs_entropy

    mine = share(accelerator, prompts)
    rollout = sample(learner, mine, sampling)  # n rows, G for each prompt
    result = reward_rows(policy, rewards, [row for _, row in mine], rollout, **trainer_state(learner, step))
    own = Experience(mine, rollout, result)
    if estimator.zero_spread == "refill":
        mine, rollout, result = own = refill(learner, rewards, sampling, own, more)
    times.append(time.perf_counter())

    rows = gather(accelerator, step_rows(learner, rewards, sampling, own))  # all N rows, on every process
    kept = rows.kept(estimator, sampling.group_size)
    advantages = estimator.advantages(
        rows.rewards, rows.mask, valid=kept.compared, **rows.inputs(sampling, running_mean.value)
    )

    batch = Batch(rollout, rows, kept, advantages.policy, old_logprobs(learner, rollout))
    history = []
    for chosen, measured in minibatches(learner, batch, step):  # rows of an update [N]
        weights, half = token_weights(learner, batch, chosen), None  # [N, T]
        parts, middle = passes(learner, batch, chosen, measured)
        sums = torch.zeros(3, dtype=torch.float64)
        learner.optimizer.zero_grad()
        for number, index in enumerate(parts):
            if measured and number == middle:
                half = flat_gradient(parameters, accelerator)
            part = batch.part(index, weights, accelerator)
            with averaging(accelerator, learner.model, last=number + 1 == len(parts)):
                scores = score(learner.model, part.rollout, **learner.scoring, entropy=entropy)
                loss = estimator.loss(
                    scores.logprobs, part.advantages, part.weights, part.rollout.mask, **part.inputs(scores)
                )
                # The loss is a sum over the rows of all processes, but gradients are averaged over processes.
                accelerator.backward(loss * accelerator.num_processes)
            learner.forward.hand_over()
            sums += counted(estimator, part, loss, scores.logprobs)
        learner.forward.average_gradients(accelerator)
        noise = signal(learner, half)
        norm = float(accelerator.clip_grad_norm_(parameters, learner.args.max_grad_norm or math.inf))
        if not parts:  # the optimiser would go on along its momentum, and decay weights, where no data say so
            learner.idle += 1
        elif learner.accepts(norm):
            learner.optimizer.step()
        learner.forward.refresh()
        history.append(update_metrics(learner, sums, norm) | noise)
    learner.generator.sync(policy)  # the next step samples from the new weights

    metrics = result.metrics | step_metrics(rows, rewards.names, sampling.group_size) | averaged(history)
    metrics |= teach_baselines(learner, running_mean, rollout, rows, advantages.returns)
    metrics |= learner.adapt_beta(metrics)
    times.append(time.perf_counter())
    own_advantages = share(accelerator, advantages.policy)
    table = partial(completion_rows, policy, mine, rollout, result, rewards.names, own_advantages)
    spent = {f"rewards/{name}/seconds": now - before[name] for name, now in rewards.seconds.items()}
    return Record(metrics, table, {"collect": times[1] - times[0], "update": times[2] - times[1]} | spent)
