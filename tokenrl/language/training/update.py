"""Says which rows an update learns from, with which weights, in which passes, and what is reported of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenrl.core.statistics import flat_gradient
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.training.batch import Batch, Part, Room, StepRows, equal_passes, share

if TYPE_CHECKING:
    from tokenrl.core.baselines import RunningMean
    from tokenrl.core.estimator import Estimator
    from tokenrl.language.training.learner import Learner

CLIPPED = ("token", "cispo")
"""Ratios with a clip range for each token; for them the metric `clip_ratio` is reported."""


def minibatches(learner: Learner, batch: Batch, step: int) -> Iterator[tuple[Tensor, bool]]:
    """Yield the rows of each update: `num_minibatches` sets of groups in each of `num_iterations` passes.

    Yields:
        True for the rows that the update learns from [N], the same on every process, and whether signal and
        noise of its gradient are measured.
    """
    args, size = learner.args, learner.sampling.group_size
    groups = len(batch.kept.mask) // size
    generator = torch.Generator().manual_seed((args.seed << 32) + step)
    # Only the first update of a rollout is on-policy, and the diagnostics are about the on-policy gradient.
    measured = learner.diagnostics is not None and learner.diagnostics.due(step)
    for _ in range(args.num_iterations):
        order = torch.arange(groups)
        if args.num_minibatches > 1:
            order = torch.randperm(groups, generator=generator)
        for part in order.tensor_split(args.num_minibatches):
            chosen = torch.zeros(groups, dtype=torch.bool)
            chosen[part] = True
            yield chosen.repeat_interleave(size).to(batch.kept.mask.device), measured
            measured = False


def token_weights(learner: Learner, batch: Batch, chosen: Tensor) -> Tensor:
    """Return the weights [N, T] of the tokens of the chosen rows; 0 elsewhere."""
    kept = batch.kept
    weights = batch.advantages.new_zeros(kept.mask.shape)
    weights[chosen] = learner.estimator.token_weights(
        kept.mask[chosen].to(weights.dtype),  # so that 1/N has the precision of the advantages
        max_length=learner.sampling.max_completion_length,
        valid=kept.counted[chosen],
    )
    return weights


def passes(learner: Learner, batch: Batch, chosen: Tensor, measured: bool) -> tuple[list[Tensor], int]:
    """Divide the rows of an update into micro-batches, each a list of this process's rows.

    Rows that can have no gradient are left out; they count in the weights alone.

    Args:
        learner: the settings.
        batch: the step's rows.
        chosen: True for the rows of the update [N].
        measured: whether the gradient of the first half of the groups is wanted apart.

    Returns:
        The micro-batches, as many on every process, and how many of them are those of the first half.
    """
    active = chosen & batch.kept.counted & batch.kept.mask.any(dim=1)
    if not learner.estimator.loss_side_terms:  # a KL or an entropy term has a gradient everywhere
        active &= (batch.advantages != 0).reshape(len(active), -1).any(dim=1)
    size, args = learner.sampling.group_size, learner.args
    row = torch.arange(len(active), device=active.device)
    middle = len(row) // size // 2 * size if measured else 0
    assert args.tokens_per_pass is not None  # `choose_forward` has filled it in
    room = Room(args.tokens_per_pass, args.micro_batch_size, learner.forward.scoring.share_prompt)
    first, second = (
        equal_passes(learner.accelerator, batch.rows, active & half, size, room)
        for half in (row < middle, row >= middle)
    )
    return first + second, len(first)


def counted(estimator: Estimator, part: Part, loss: Tensor, logprobs: Tensor) -> Tensor:
    """Return the loss of a micro-batch, its tokens outside the clip range, and all that it learns from [3].

    `logprobs` are those of the present policy [m, T].
    """
    counts = torch.zeros(2, dtype=torch.int64, device=loss.device)
    if estimator.ratio in CLIPPED:
        ratio, learnt = (logprobs.detach() - part.old(logprobs)).exp(), part.weights != 0
        low, high = estimator.clip_range
        beyond = ((ratio > high) | (ratio < low)) & learnt
        counts = torch.stack([beyond.sum(), learnt.sum()])
    return torch.cat([loss.detach()[None], counts]).cpu().double()


def signal(learner: Learner, half: Tensor | None) -> dict[str, float]:
    """Return signal and noise of the gradient, from that of the first half of groups; None: not wanted."""
    if half is None or learner.diagnostics is None:
        return {}
    whole = flat_gradient(learner.policy.trainable_parameters())
    return learner.diagnostics.metrics(half, whole, learner.args.prompts_per_step)


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


def averaged(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average the metrics of the step's updates; each over the updates that report it."""
    return {
        name: sum(m.get(name, 0.0) for m in history) / sum(name in m for m in history) for name in history[0]
    }


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
