"""One update of the weights from rows of a rollout: micro-batches, processes and skipped rows change nothing.

The loss is a sum whose weights come from the whole step, so a micro-batch is a slice of it. Weights and
advantages are identical on every process; each trains on its own rows, and the loss is multiplied by the
number of processes because averaging gradients divides by it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.core.estimator import Advantages, Estimator
from tokenrl.core.statistics import GradientDiagnostics, flat_gradient
from tokenrl.errors import Stopped
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.critic import Critic


@dataclass
class Learner:
    """What an update changes and needs: the policy, its optimiser, and the settings.

    Attributes:
        policy: the policy, whose model is the bare one.
        model: the same model as prepared by accelerate, through which gradients flow.
        optimizer: prepared optimiser over the policy's trainable parameters.
        accelerator: accelerate's handle of device, precision and processes.
        estimator: what turns rewards into a loss.
        args: settings with every None resolved.
        critic: learned values, for the estimators that need them.
        diagnostics: measures the gradient's noise, if asked for.
        nonfinite: updates in a row whose gradient was not finite.
        skipped: all such updates so far.
    """

    policy: Policy
    model: nn.Module
    optimizer: Any
    accelerator: Any
    estimator: Estimator
    args: TrainSettings
    critic: Critic | None = None
    diagnostics: GradientDiagnostics | None = None
    nonfinite: int = 0
    skipped: int = 0

    def state_dict(self) -> dict[str, float]:
        """What a continuation needs beside weights: the KL's weight and the counts, as plain numbers."""
        return {"kl_coef": self.estimator.beta, "nonfinite": self.nonfinite, "skipped": self.skipped}


class Step(NamedTuple):
    """One step's rows: this process's rollout, and what every process knows of all N rows.

    Attributes:
        rollout: this process's n rows, with columns up to its own longest completion.
        mask: actions of all rows that are learnt from [N, T].
        valid: rows that count in the divisor [N].
        advantages: of all rows.
        old_logprobs: this process's rows under the policy that sampled them [n, T]; None on-policy.
        ref_logprobs: this process's rows under the reference [n, T]; None without KL.
    """

    rollout: Rollout
    mask: Tensor
    valid: Tensor
    advantages: Advantages
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


def update(learner: Learner, step: Step, chosen: Tensor, *, measure: bool = False) -> dict[str, float]:
    """One optimiser step on the rows `chosen` (bool [N], the same on every process).

    Returns:
        `loss`, `grad_norm`; with a clipped ratio of tokens `clip_ratio`, the share of tokens beyond the
        range; and, to `measure`, the gradient's signal and noise.

    Raises:
        Stopped: too many updates in a row had a gradient that was not finite.
    """
    accelerator, parameters = learner.accelerator, learner.policy.trainable_parameters()
    weights = _weights(learner, step, chosen)  # [N, T]
    groups = torch.arange(len(chosen), device=chosen.device) // learner.args.num_generations
    early = groups < (int(groups[-1]) + 1) // 2 if measure else chosen  # half of the groups, or all at once
    passes = _passes(learner, step, chosen & early)
    half, count = None, len(passes)
    if measure:
        passes += _passes(learner, step, chosen & ~early)
    learner.optimizer.zero_grad()
    sums = torch.zeros(3, dtype=torch.float64)  # loss, tokens beyond the clip, tokens
    for k, rows in enumerate(passes):
        if measure and k == count:
            half = flat_gradient(parameters, accelerator)
        last = k + 1 == len(passes)
        with contextlib.nullcontext() if last else accelerator.no_sync(learner.model):
            loss, beyond, tokens = _loss(learner, step, weights, rows)
            accelerator.backward(loss * accelerator.num_processes)
        sums += torch.stack([loss.detach(), beyond, tokens]).cpu().double()
    if not passes:  # nothing to learn: a zero gradient, not none, so that the optimiser's moments go on
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    metrics = {}
    if measure and learner.diagnostics is not None and half is not None:
        metrics = learner.diagnostics.metrics(half, flat_gradient(parameters), int(groups[-1]) + 1)
    norm = _clip(learner)
    _apply(learner, norm)
    sums = accelerator.reduce(sums.to(torch.float32).to(accelerator.device), reduction="sum").cpu()
    metrics |= {"loss": float(sums[0]), "grad_norm": norm}
    if learner.estimator.ratio in ("token", "cispo"):
        metrics["clip_ratio"] = float(sums[1] / sums[2].clamp(min=1))
    return metrics


def _apply(learner: Learner, norm: float) -> None:
    """Step the optimiser, or skip an update whose gradient is not finite."""
    if math.isfinite(norm):
        learner.optimizer.step()
        learner.nonfinite = 0
        return
    learner.optimizer.zero_grad()  # a NaN must never reach the weights
    learner.skipped, learner.nonfinite = learner.skipped + 1, learner.nonfinite + 1
    if learner.nonfinite >= learner.args.stop_after_nonfinite:
        raise Stopped(
            f"The gradient was not finite in {learner.nonfinite} updates in a row (all skipped; the weights "
            "are as before them). Lower the learning rate or the scale of the rewards; in low precision try "
            "float32."
        )


def _weights(learner: Learner, step: Step, chosen: Tensor) -> Tensor:
    """Token weights [N, T] of the rows of this update, zero elsewhere."""
    weights = step.mask.new_zeros(step.mask.shape, dtype=step.advantages.policy.dtype)
    weights[chosen] = learner.estimator.token_weights(
        step.mask[chosen].to(weights.dtype),  # 1/N in the precision of the advantages
        max_length=learner.args.max_completion_length or step.mask.shape[1],
        valid=step.valid[chosen],
    )
    return weights


def _passes(learner: Learner, step: Step, chosen: Tensor) -> list[Tensor]:
    """This process's rows of each backward pass; every process gets the same number of passes.

    Rows whose loss is zero whatever the policy are left out: they count in weights and statistics only.
    """
    active = chosen & step.valid & step.mask.any(dim=1)
    if not learner.estimator.loss_side_terms:
        active = active & (step.advantages.policy != 0).reshape(len(active), -1).any(dim=1)
    by_process = active.view(learner.accelerator.num_processes, -1)  # [W, n]
    size = learner.args.micro_batch_size or by_process.shape[1]
    count = -(-int(by_process.sum(dim=1).max()) // size)
    mine = by_process[learner.accelerator.process_index].nonzero().squeeze(1)
    return [mine[k * size : (k + 1) * size] for k in range(count)]


def _loss(learner: Learner, step: Step, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the loss of some local rows, the tokens beyond the clip range, and the tokens."""
    empty = len(rows) == 0
    if empty:  # a pass of no weight: the other processes wait for this one's gradients
        rows = torch.zeros(1, dtype=torch.long, device=rows.device)
    estimator, policy = learner.estimator, learner.policy
    part = step.rollout.rows(rows)
    width = part.mask.shape[1]
    everywhere = rows + learner.accelerator.process_index * len(step.rollout.prompt_index)
    scores = score(
        learner.model,
        part,
        temperature=learner.args.temperature,
        share_prompt=policy.share_prompt,
        entropy=estimator.needs_entropy,
    )
    logprobs = scores.logprobs
    old = logprobs.detach() if step.old_logprobs is None else step.old_logprobs[rows, :width]
    advantages = step.advantages.policy[everywhere]
    loss = estimator.loss(
        logprobs,
        advantages if advantages.ndim == 1 else advantages[:, :width],
        weights[everywhere, :width] * (0.0 if empty else 1.0),
        part.mask,
        old_logprobs=old if estimator.needs_old_logprobs else None,
        sampling_logprobs=part.logprobs if estimator.needs_sampling_logprobs else None,
        ref_logprobs=None if step.ref_logprobs is None else step.ref_logprobs[rows, :width],
        entropy=scores.entropy,
    )
    ratio = (logprobs.detach() - old).exp()
    low, high = estimator.clip_range
    beyond = ((ratio > high) | (ratio < low)) & part.mask & (not empty)
    return loss, beyond.sum(), part.mask.sum() * (0 if empty else 1)


def _clip(learner: Learner) -> float:
    """Clip the gradient's norm; returns the norm before."""
    limit = learner.args.max_grad_norm or float("inf")
    return float(learner.accelerator.clip_grad_norm_(learner.policy.trainable_parameters(), limit))
