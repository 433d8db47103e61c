"""One training step as a straight line: sample, reward, advantages, score, loss, backward, update, record.

The loss is a sum over tokens whose weights come from the whole step, so a micro-batch is a slice of it, and
neither the size of a micro-batch, nor the number of processes, nor leaving out rows without gradient changes
the update. Weights and advantages are identical on every process, and each process trains on its own rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokenrl.core.memories import Memory, update
from tokenrl.core.schedules import policy_steps
from tokenrl.core.statistics import explained, generator_of
from tokenrl.errors import ending
from tokenrl.language.rollout.rewarded import Rewarded, averaged, unread_tokens
from tokenrl.language.rollout.rollout import to_host
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.experience import (
    Experience,
    experience,
    gather,
    loss_statistics,
    mismatch_metrics,
    step_metrics,
    update_metrics,
)
from tokenrl.language.training.rows import (
    later_rows,
    learning_rows,
    loss_inputs,
    loss_terms,
    own_columns,
    rows_of_step,
    update_weights,
)
from tokenrl.language.training.tokens import step_table
from tokenrl.runs.processes import local, sum_gradients

if TYPE_CHECKING:
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.training.learner import Learner


class Record(NamedTuple):
    """The results of one training step.

    Attributes:
        metrics: numbers for metrics.jsonl, under TRL's names.
        rows: returns the completions as table rows; they are decoded only when it is called.
        rewarded: this process's rows.
        timings: seconds of each part of the step and of each reward function (`rewards/NAME/seconds`).
        failures: what failed in the episode of each of this process's rows; empty without an environment.
        unread: what `unread_tokens` says of this process's rows.
        ends: the words with which code of the user's ends the run, once the policy had moved; else empty.
    """

    metrics: dict[str, float]
    rows: Callable[[], list[dict[str, Any]]]
    rewarded: Rewarded
    timings: dict[str, float]
    failures: Sequence[str]
    unread: str
    ends: list[str]


def training_step(
    learner: Learner, rewards: Rewards, memory: Memory, step: int, stream: PromptStream
) -> Record:
    """Run one training step: sample, reward, update, record.

    Each metric of an update is averaged over the updates that report it.

    Args:
        learner: the policy, its optimiser and the settings.
        rewards: the reward functions.
        memory: what the baseline remembers of earlier steps. It is read before it is updated, because
            otherwise a reward would enter its own baseline.
        step: number of this step, from 1.
        stream: draws prompts, the same on every process: those of the whole step, and for some estimators those
            that replace groups of equal rewards.

    Raises:
        Finished: code of the user's ends the run before the policy moves; the step is left out.
    """
    estimator = learner.estimator
    accelerator = learner.accelerator
    sampling = replace(learner.sampling, step=step)
    policy_learns = policy_steps(learner.args, step) > 0  # before that the critic alone
    reward_seconds = dict(rewards.seconds)
    began = time.perf_counter()

    rewarded = rows_of_step(learner, rewards, sampling, stream)  # n rows, G for each prompt
    sampling = replace(sampling, num_generations=learner.group_size)
    collected = time.perf_counter()

    rows = experience(learner, rewarded, sampling)
    whole = gather(learner, rows, rewarded.failures or (), step)  # all N rows, on every process
    options = sampling, memory, rewards, own_columns(learner, rewarded)
    first = terms = loss_terms(learner, whole, *options)
    parameters = learner.policy.trainable_parameters()
    updates: list[dict[str, float]] = []
    scored: list[list[tuple[Tensor, Tensor]]] = []  # of each update
    for chosen in minibatches(learner, len(whole), step):  # rows of an update [N]
        if updates and estimator.chosen("scale").needs:
            terms = loss_terms(learner, later_rows(learner, rows, whole), *options)
        advantages = local(accelerator, terms.advantages)
        weights = local(accelerator, update_weights(learner, terms, chosen))  # [n, T]
        learning = learning_rows(learner, terms, chosen)  # [N]
        sums: list[Tensor] = []
        scored.append([])
        learner.policy.model.zero_grad()
        for index in learner.micro_batches(rows, computed=local(accelerator, learning)):
            part = rows.take(index)
            scores = learner.score(part)
            inputs = loss_inputs(part, scores, advantages[index], weights[index])
            loss = estimator.loss(**inputs)
            accelerator.backward(loss)
            learner.forward.accumulate_gradients()
            sums.append(loss_statistics(learner, loss, inputs))
            scored[-1].append((index, scores.logprobs.detach()))
        sum_gradients(accelerator, parameters)
        norm = accelerator.clip_grad_norm_(parameters, learner.largest_norm)
        norm, *sums = to_host([norm, *sums])
        if policy_learns and learner.accepts(float(norm), bool(learning.any())):
            learner.optimizer.step()
        learner.forward.copy_weights()
        updates.append(update_metrics(learner, sums, float(norm)))
    if learner.average is not None:
        learner.average.update()
    ends: list[str] = []  # once the policy has moved, the step is completed
    with ending(ends):
        learner.generator.sync(learner.policy)  # the next step samples from the new weights

    metrics = averaged(rewarded.logged)
    metrics |= step_metrics(whole, rewards.names, learner.sampling.group_size)
    metrics |= {name: fmean(update[name] for update in updates) for name in updates[0]}
    metrics |= mismatch_metrics(rows, scored[0])  # the sampler beside the policy before its update
    metrics |= update_memories(learner, memory, stream, rows, whole, terms.returns, ends)
    table = partial(step_table, replace(learner), rewarded, rows, first, rewards.names, scored)
    metrics |= learner.adapt_beta(metrics, policy_learns)  # the table keeps the weight before
    timings = {"collect": collected - began, "update": time.perf_counter() - collected}
    timings |= rewards.seconds_since(reward_seconds)
    unread = unread_tokens(learner.policy, rewarded)
    return Record(metrics, table, rewarded, timings, rewarded.failures or (), unread, ends)


def minibatches(learner: Learner, rows: int, step: int) -> Iterator[Tensor]:
    """Yield the rows of each update: `num_minibatches` sets of groups in each of `num_iterations` passes.

    Yields:
        True for the rows that the update learns from [N], the same on every process.
    """
    args = learner.args
    size = learner.group_size
    order = torch.arange(rows // size)
    generator = generator_of(args.seed, "minibatches", step)
    for _ in range(args.num_iterations):
        if args.num_minibatches > 1:
            order = torch.randperm(rows // size, generator=generator)
        for part in order.tensor_split(args.num_minibatches):
            chosen = torch.zeros(rows // size, dtype=torch.bool)
            chosen[part] = True
            yield chosen.repeat_interleave(size)


def update_memories(
    learner: Learner,
    memory: Memory,
    stream: PromptStream,
    rows: Experience,
    whole: Experience,
    returns: Tensor,
    ends: list[str],
) -> dict[str, float]:
    """Update memory, replay, critic and chances of prompts with this step's rows, which updated the policy before.

    Args:
        learner: holds the replay and the critic.
        memory: what the baseline remembers of earlier steps.
        stream: learns from rewards how often each prompt is drawn.
        rows: this process's n rows.
        whole: all N rows of the step.
        returns: the critic's targets [N, T].
        ends: the words with which a memory or the stream ends the run join them.

    Returns:
        `baseline`, the mean value that this step read from the memory; `value_loss`, the critic's loss before
        its update; `explained_variance`, what its values explained of the returns; and the metrics of the stream.
        Each only where there is such a part.
    """
    metrics = {}
    if learner.replay is not None:
        learner.replay.keep(learner.policy, whole)
    if learner.estimator.needs_memory:
        with ending(ends):
            metrics["baseline"] = update(memory, whole.keys, whole.rewards, whole.rewarded)
    if learner.critic is not None:
        assert whole.values is not None  # which a critic has computed
        accelerator = learner.accelerator
        learnt = whole.mask & whole.rewarded[:, None]
        weights = learnt.to(returns.dtype) / learnt.sum().clamp(min=1)
        width = rows.mask.shape[1]
        targets, weights = (local(accelerator, x)[:, :width] for x in (returns, weights))
        metrics["value_loss"] = learner.critic.update(
            learner.estimator, rows.hidden, targets, weights, accelerator
        )
        metrics["explained_variance"] = explained(whole.values[learnt], returns[learnt])
    with ending(ends):
        metrics |= stream.learn(whole.prompt_index[whole.rewarded], whole.rewards[whole.rewarded])
    return metrics
