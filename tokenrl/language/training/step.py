"""One training step as a straight line: sample, reward, advantages, score, loss, backward, update, record.

The loss is a sum over tokens whose weights come from the whole step, so a micro-batch is a slice of it, and
neither the size of a micro-batch, nor the number of processes, nor leaving out rows without gradient changes
the update. Weights and advantages are identical on every process, and each process trains on its own rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokenrl.core.statistics import flat_gradient, generator_of
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training.batch import (
    Part,
    first_half,
    gather,
    learning_rows,
    micro_batches,
    share,
    sum_gradients,
)
from tokenrl.language.training.collect import (
    Deal,
    Experience,
    Prompts,
    completion_rows,
    old_logprobs,
    refill,
    reward,
    sample,
    step_metrics,
    step_rows,
)

if TYPE_CHECKING:
    from tokenrl.core.baselines import RunningMean
    from tokenrl.core.rows import Kept
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.rollout.rollout import Rollout
    from tokenrl.language.training.batch import StepRows
    from tokenrl.language.training.learner import Learner

CLIPPED = ("token", "cispo")
"""Ratios with a clip range for each token; for them the metric `clip_ratio` is reported."""


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

    Each metric of an update is averaged over the updates that report it.

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
    result = reward(learner, rewards, mine, rollout, step)
    own = Experience(mine, rollout, result)
    if estimator.zero_spread == "refill":
        mine, rollout, result = own = refill(learner, rewards, sampling, own, more)
    times.append(time.perf_counter())

    rows = gather(accelerator, step_rows(learner, rewards, sampling, own))  # all N rows, on every process
    kept = rows.kept(estimator, sampling.group_size)
    advantages, returns = estimator.advantages(
        rows.rewards, rows.mask, valid=kept.compared, **rows.inputs(sampling, running_mean.value)
    )

    old = old_logprobs(learner, rollout)  # [n, T]; None: the policy of the update is the one that sampled
    reference = None if rows.ref_logprobs is None else share(accelerator, rows.ref_logprobs)  # [n, T]
    history = []
    for chosen, measured in minibatches(learner, len(kept.mask), step):  # rows of an update [N]
        weights = token_weights(learner, kept, chosen, advantages)  # [N, T]
        own_part = Part(rollout, share(accelerator, advantages), share(accelerator, weights), reference, old)
        learning = learning_rows(learner, kept, advantages, chosen)  # [N]
        halves, groups, half = [learning], (0, 0), None
        if measured:
            first, groups = first_half(kept, chosen, sampling.group_size)
            halves = [learning & first, learning & ~first]
        sums = torch.zeros(3, dtype=torch.float64)
        learner.optimizer.zero_grad()
        for learnt in halves:
            for index in micro_batches(learner, rows, learnt):
                part = own_part.rows(index)
                scores = score(learner.forward.model, part.rollout, **learner.scoring, entropy=entropy)
                loss = estimator.loss(
                    scores.logprobs, part.advantages, part.weights, part.rollout.mask, **part.inputs(scores)
                )
                accelerator.backward(loss)
                learner.forward.hand_over()
                sums += counted(learner, part, loss, scores.logprobs)
            half = flat_gradient(parameters, accelerator) if measured and half is None else half
        sum_gradients(accelerator, parameters)
        noise = learner.gradient_noise(half, groups)
        norm = float(accelerator.clip_grad_norm_(parameters, learner.args.max_grad_norm or math.inf))
        if learner.accepts(norm, bool(learning.any())):
            learner.optimizer.step()
        learner.forward.refresh()
        history.append(update_metrics(learner, sums, norm) | noise)
    learner.generator.sync(policy)  # the next step samples from the new weights

    metrics = result.averaged() | step_metrics(rows, rewards.names, sampling.group_size)
    metrics |= {name: fmean(one[name] for one in history if name in one) for name in history[0]}
    metrics |= teach_baselines(learner, running_mean, rollout, rows, returns)
    metrics |= learner.adapt_beta(metrics)
    times.append(time.perf_counter())
    table = partial(completion_rows, policy, own, rewards.names, share(accelerator, advantages))
    spent = {f"rewards/{name}/seconds": now - before[name] for name, now in rewards.seconds.items()}
    return Record(metrics, table, {"collect": times[1] - times[0], "update": times[2] - times[1]} | spent)


def minibatches(learner: Learner, rows: int, step: int) -> Iterator[tuple[Tensor, bool]]:
    """Yield the rows of each update: `num_minibatches` sets of groups in each of `num_iterations` passes.

    Yields:
        True for the rows that the update learns from [N], the same on every process, and whether signal and
        noise of its gradient are measured.
    """
    args, size = learner.args, learner.sampling.group_size
    order = torch.arange(rows // size)
    generator = generator_of(args.seed, "minibatches", step)
    # Only the first update of a rollout is on-policy, and the diagnostics are about the on-policy gradient.
    measured = learner.diagnostics.due(step)
    for _ in range(args.num_iterations):
        if args.num_minibatches > 1:
            order = torch.randperm(rows // size, generator=generator)
        for part in order.tensor_split(args.num_minibatches):
            chosen = torch.zeros(rows // size, dtype=torch.bool)
            chosen[part] = True
            yield chosen.repeat_interleave(size).to(learner.accelerator.device), measured
            measured = False


def token_weights(learner: Learner, kept: Kept, chosen: Tensor, like: Tensor) -> Tensor:
    """Return the weights [N, T] of the tokens of the chosen rows, 0 elsewhere, in the precision of `like`."""
    weights = like.new_zeros(kept.mask.shape)
    weights[chosen] = learner.estimator.token_weights(
        kept.mask[chosen].to(weights.dtype),  # so that 1/N has that precision
        max_length=learner.sampling.max_completion_length,
        valid=kept.counted[chosen],
    )
    return weights


def counted(learner: Learner, part: Part, loss: Tensor, logprobs: Tensor) -> Tensor:
    """Return the loss of a micro-batch, its tokens outside the clip range, and all that it learns from [3].

    `logprobs` are those of the present policy [m, T].
    """
    counts = torch.zeros(2, dtype=torch.int64, device=loss.device)
    if learner.estimator.ratio in CLIPPED:
        ratio, learnt = (logprobs.detach() - part.old(logprobs)).exp(), part.weights != 0
        low, high = learner.estimator.clip_range
        beyond = ((ratio > high) | (ratio < low)) & learnt
        counts = torch.stack([beyond.sum(), learnt.sum()])
    return torch.cat([loss.detach()[None], counts]).cpu().double()


def update_metrics(learner: Learner, sums: Tensor, norm: float) -> dict[str, float]:
    """Return what is reported of an update.

    Args:
        learner: the settings.
        sums: what `counted` returned, summed over the micro-batches of this process.
        norm: norm of the gradient before clipping.

    Returns:
        `loss`; `grad_norm`; `grad_clipped`, 1 if the gradient was clipped, else 0; and `clip_ratio`, the
        share of tokens whose ratio is outside the clip range, for ratios that are clipped for each token.
    """
    accelerator, limit = learner.accelerator, learner.args.max_grad_norm or math.inf
    sums = accelerator.reduce(sums.float().to(accelerator.device), reduction="sum").cpu()
    metrics = {"loss": float(sums[0]), "grad_norm": norm, "grad_clipped": float(norm > limit)}
    if learner.estimator.ratio in CLIPPED:
        metrics["clip_ratio"] = float(sums[1] / sums[2].clamp(min=1))
    return metrics


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
        targets, weights = (share(learner.accelerator, x)[:, :width] for x in (returns, weights))
        metrics["value_loss"] = learner.critic.update(
            learner.estimator, rollout.hidden, targets, weights, learner.accelerator
        )
    return metrics
