"""One update of the weights from rows of a rollout: micro-batches, processes and skipped rows change nothing.

The loss is a sum whose weights come from the whole step, so a micro-batch is a slice of it. Weights and
advantages are identical on every process; each trains on its own rows, and the loss is multiplied by the
number of processes because averaging gradients divides by it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.core.estimator import Estimator
from tokenrl.core.rows import Kept
from tokenrl.core.statistics import GradientDiagnostics, flat_gradient
from tokenrl.errors import Stopped
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Scores
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.critic import Critic
from tokenrl.language.training.processes import StepRows, equal_passes, share

CLIPPED = ("token", "cispo")
"""Ratios that are clipped token by token, so that one can say which tokens are beyond the range."""


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
        generator: samples the run's completions.
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
    generator: Generator
    critic: Critic | None = None
    diagnostics: GradientDiagnostics | None = None
    nonfinite: int = 0
    skipped: int = 0

    @property
    def sampling(self) -> Sampling:
        """How the run samples, at no step in particular."""
        args = self.args
        return Sampling(
            args.max_completion_length,
            args.num_generations,
            args.temperature,
            args.seed,
            truncate_prompts=args.truncate_prompts,
        )

    def state_dict(self) -> dict[str, float]:
        """What a continuation needs beside weights: the KL's weight and the counts, as plain numbers."""
        return {"kl_coef": self.estimator.beta, "nonfinite": self.nonfinite, "skipped": self.skipped}

    @property
    def scoring(self) -> dict[str, Any]:
        """How completions are scored, as `score` takes it: at the temperature that they were sampled at."""
        return {"temperature": self.args.temperature, "share_prompt": self.policy.share_prompt}


class Batch(NamedTuple):
    """What the updates of a step learn from: this process's n rows, and what all processes know of all N.

    Attributes:
        rollout: this process's n rows, with columns up to its own longest completion.
        rows: all N rows.
        kept: which of them, and of their tokens [N, T], are learnt from and divided by.
        advantages: of all rows [N] or, where each token has its own, [N, T].
        old_logprobs: this process's rows under the policy that sampled them [n, T]; None where the only
            update is that policy's own.
    """

    rollout: Rollout
    rows: StepRows
    kept: Kept
    advantages: Tensor
    old_logprobs: Tensor | None


class Part(NamedTuple):
    """A micro-batch: m of this process's rows, cut to their longest completion.

    Attributes:
        rollout: the rows.
        advantages: [m] or [m, T].
        weights: of the tokens in the loss of the whole update [m, T].
        ref_logprobs: under the reference [m, T]; None without a KL.
        old_logprobs: under the policy that sampled [m, T]; None where that is the policy as it is now.
    """

    rollout: Rollout
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    old_logprobs: Tensor | None

    def old(self, logprobs: Tensor) -> Tensor:
        """What the ratio is taken against [m, T], given the log-probabilities of the policy as it is now."""
        return logprobs.detach() if self.old_logprobs is None else self.old_logprobs

    def inputs(self, scores: Scores) -> dict[str, Tensor | None]:
        """What `Estimator.loss` may ask for besides its first four arguments, by its names."""
        return {
            "old_logprobs": self.old(scores.logprobs),
            "sampling_logprobs": self.rollout.logprobs,
            "ref_logprobs": self.ref_logprobs,
            "entropy": scores.entropy,
        }


@dataclass
class Update:
    """One step of the optimiser: the micro-batches whose gradients it adds up, and what is counted meanwhile.

    Attributes:
        learner: what is updated.
        batch: the step's rows.
        chosen: which of them this update learns from, the same on every process [N].
        measure: whether to measure the gradient's signal and noise, by the two halves of the groups.
    """

    learner: Learner
    batch: Batch
    chosen: Tensor
    measure: bool = False
    _half: Tensor | None = None  # gradient of the first half of the groups
    _sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # loss and two counts

    def parts(self) -> Iterator[Part]:
        """Yield the micro-batches, whose gradients add up from one to the next.

        Every process gets as many. In all but the last, processes keep their gradients to themselves; the
        backward pass of the last one averages the sums over processes.
        """
        learner, accelerator = self.learner, self.learner.accelerator
        size, active, weights = learner.args.micro_batch_size, self._active(), self._weights()
        row = torch.arange(len(active), device=active.device)
        middle = self._groups // 2 * learner.sampling.group_size if self.measure else len(row)
        early = equal_passes(accelerator, active & (row < middle), size)
        passes = early + equal_passes(accelerator, active & (row >= middle), size)
        learner.optimizer.zero_grad()
        for k, rows in enumerate(passes):
            if self.measure and k == len(early):
                self._half = flat_gradient(learner.policy.trainable_parameters(), accelerator)
            last = k + 1 == len(passes)
            with contextlib.nullcontext() if last else accelerator.no_sync(learner.model):
                yield self._part(rows, weights)
        if not passes:  # nothing to learn: a zero gradient, not none, so that the optimiser's moments go on
            for parameter in learner.policy.trainable_parameters():
                parameter.grad = torch.zeros_like(parameter)

    def backward(self, part: Part, loss: Tensor, logprobs: Tensor) -> None:
        """Add the gradient of a micro-batch's loss, and count what is reported of it.

        The backward pass that all processes share averages over them, and the loss is a sum over all their
        rows: so it is multiplied by their number.
        """
        accelerator, estimator = self.learner.accelerator, self.learner.estimator
        accelerator.backward(loss * accelerator.num_processes)
        counts = torch.zeros(2, dtype=torch.int64, device=loss.device)  # tokens beyond the range, tokens
        if estimator.ratio in CLIPPED:
            ratio, learnt = (logprobs.detach() - part.old(logprobs)).exp(), part.weights != 0
            low, high = estimator.clip_range
            beyond = ((ratio > high) | (ratio < low)) & learnt
            counts = torch.stack([beyond.sum(), learnt.sum()])
        self._sums += torch.cat([loss.detach()[None], counts]).cpu().double()

    def apply(self) -> dict[str, float]:
        """Clip the gradient and step the optimiser, or skip a gradient that is not finite.

        Returns:
            `loss`, `grad_norm` before clipping; with a clipped ratio of tokens `clip_ratio`, the share of
            tokens beyond the range; and, if it was measured, the gradient's signal and noise.

        Raises:
            Stopped: too many updates in a row had a gradient that was not finite.
        """
        learner, accelerator = self.learner, self.learner.accelerator
        parameters, metrics = learner.policy.trainable_parameters(), {}
        if self._half is not None and learner.diagnostics is not None:
            metrics = learner.diagnostics.metrics(self._half, flat_gradient(parameters), self._groups)
        limit = learner.args.max_grad_norm or math.inf
        norm = float(accelerator.clip_grad_norm_(parameters, limit))
        _step_optimizer(learner, norm)
        sums = accelerator.reduce(self._sums.float().to(accelerator.device), reduction="sum").cpu()
        metrics |= {"loss": float(sums[0]), "grad_norm": norm}
        if learner.estimator.ratio in CLIPPED:
            metrics["clip_ratio"] = float(sums[1] / sums[2].clamp(min=1))
        return metrics

    @property
    def _groups(self) -> int:
        return len(self.chosen) // self.learner.sampling.group_size

    def _active(self) -> Tensor:
        """Rows [N] whose gradient is not zero whatever the policy; the others count in the weights only."""
        batch = self.batch
        active = self.chosen & batch.kept.counted & batch.kept.mask.any(dim=1)
        if self.learner.estimator.loss_side_terms:
            return active
        return active & (batch.advantages != 0).reshape(len(active), -1).any(dim=1)

    def _weights(self) -> Tensor:
        """Weights [N, T] of the tokens of the chosen rows, zero elsewhere."""
        kept, chosen = self.batch.kept, self.chosen
        weights = self.batch.advantages.new_zeros(kept.mask.shape)
        weights[chosen] = self.learner.estimator.token_weights(
            kept.mask[chosen].to(weights.dtype),  # 1/N in the precision of the advantages
            max_length=self.learner.sampling.max_completion_length,
            valid=kept.counted[chosen],
        )
        return weights

    def _part(self, rows: Tensor, weights: Tensor) -> Part:
        """The micro-batch of some of this process's rows, none for a pass that only waits for the others."""
        batch, waits = self.batch, len(rows) == 0
        rows = rows.new_zeros(1) if waits else rows
        rollout = batch.rollout.rows(rows)

        def own(whole: Tensor) -> Tensor:
            mine = share(self.learner.accelerator, whole)[rows]
            return mine if mine.ndim == 1 else mine[:, : rollout.mask.shape[1]]

        return Part(
            rollout,
            own(batch.advantages),
            own(weights) * (0.0 if waits else 1.0),
            None if batch.rows.ref_logprobs is None else own(batch.rows.ref_logprobs),
            None if batch.old_logprobs is None else batch.old_logprobs[rows, : rollout.mask.shape[1]],
        )


def updates(learner: Learner, batch: Batch, step: int) -> Iterator[Update]:
    """Yield a rollout's updates: `num_iterations` passes in `num_minibatches` parts, groups kept whole."""
    args, size = learner.args, learner.sampling.group_size
    groups = len(batch.kept.mask) // size
    generator = torch.Generator().manual_seed(((args.seed << 32) + step) % 2**63)
    # The first update of a rollout is the on-policy one, of which the diagnostics speak.
    measure = learner.diagnostics is not None and learner.diagnostics.due(step)
    for _ in range(args.num_iterations):
        order = torch.arange(groups)
        if args.num_minibatches > 1:
            order = torch.randperm(groups, generator=generator)
        for part in order.tensor_split(args.num_minibatches):
            chosen = torch.zeros(groups, dtype=torch.bool)
            chosen[part] = True
            yield Update(learner, batch, chosen.repeat_interleave(size).to(batch.kept.mask.device), measure)
            measure = False


def _step_optimizer(learner: Learner, norm: float) -> None:
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
