"""Updates the policy's weights from a rollout, in micro-batches and on several processes.

The loss is a sum over tokens whose weights come from the whole step, so a micro-batch is a slice of it, and
neither the size of a micro-batch, nor the number of processes, nor leaving out rows without gradient changes
the update. Weights and advantages are identical on every process, and each process trains on its own rows.
Processes average their gradients, so the loss is multiplied by their number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.core.estimator import Estimator
from tokenrl.core.statistics import GradientDiagnostics, flat_gradient
from tokenrl.errors import Stopped
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.prompts import SharedPrompts
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Scores, score
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.batch import Batch, Part
from tokenrl.language.training.critic import Critic
from tokenrl.language.training.forward import Forward
from tokenrl.language.training.passes import Lengths, equal_passes, fixed_cost
from tokenrl.runs.optimizers import load_optimizer_state, optimizer_state

CLIPPED = ("token", "cispo")
"""Ratios with a clip range for each token; for them the metric `clip_ratio` is reported."""
COUNTS = ("nonfinite", "skipped", "idle")
"""The counts of a `Learner`."""


@dataclass
class Learner:
    """The policy, its optimiser, and all that an update reads: everything that outlives a step.

    Attributes:
        policy: the policy, with the weights that the optimiser changes; its `model` is not wrapped.
        forward: how forward passes are computed: what is sampled and scored, and what gradients flow through.
        model: what gradients flow through, as wrapped by accelerate.
        optimizer: the optimiser of the policy's trainable parameters, wrapped by accelerate.
        accelerator: accelerate's handle of device, precision and processes.
        estimator: turns rewards into advantages and a loss. KL control replaces it to change its `beta`.
        args: the settings of the run.
        generator: samples the run's completions.
        critic: predicts values, for the estimators that need them; else None.
        diagnostics: measures signal and noise of the gradient; None unless the run asks for it.
        nonfinite: number of consecutive updates, up to now, whose gradient was not finite.
        skipped: number of all updates so far that were skipped for such a gradient.
        idle: number of all updates so far that were left out because no row could have a gradient.
        generated: number of completions that this process has generated since they were last counted.
    """

    policy: Policy
    forward: Forward
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
    idle: int = 0
    generated: int = 0

    @property
    def sampling(self) -> Sampling:
        """How the run samples; callers set the step."""
        args = self.args
        return Sampling(
            args.max_completion_length,
            args.num_generations,
            args.temperature,
            args.seed,
            truncate_prompts=args.truncate_prompts,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation needs besides the weights; tensors are references, not copies."""
        counts = {name: getattr(self, name) for name in COUNTS}
        return {
            "kl_coef": self.estimator.beta,
            **counts,
            "optimizer": optimizer_state(self.optimizer),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "diagnostics": None if self.diagnostics is None else self.diagnostics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the weights of the policy are loaded apart from this."""
        if state["kl_coef"] != self.estimator.beta:
            self.estimator = replace(self.estimator, beta=state["kl_coef"])
        for name in COUNTS:
            setattr(self, name, int(state[name]))
        load_optimizer_state(self.optimizer, state["optimizer"])
        for part, saved in ((self.critic, state["critic"]), (self.diagnostics, state["diagnostics"])):
            if part is not None and saved is not None:
                part.load_state_dict(saved)

    def sync(self) -> None:
        """Sample and score with the weights that the policy has now."""
        self.forward.refresh()
        self.generator.sync(self.policy)

    @property
    def scoring(self) -> dict[str, Any]:
        """Keyword arguments of `score`: completions are scored at the temperature of sampling."""
        return {"temperature": self.args.temperature, **self.forward.policy.ways}

    def scores(self, part: Part) -> Scores:
        """Score completions with a gradient."""
        needed = self.estimator.needs_entropy
        with self.forward.in_updates():
            return score(self.model, part.rollout, prompts=part.prompts, entropy=needed, **self.scoring)


@dataclass
class Update:
    """One step of the optimiser: adds up the gradients of its micro-batches, and what is reported of them.

    Attributes:
        learner: the policy, its optimiser and the settings.
        batch: the step's rows.
        chosen: True for the rows that this update learns from [N], the same on every process.
        measure: whether to measure signal and noise of the gradient, by comparing two halves of the groups.
    """

    learner: Learner
    batch: Batch
    chosen: Tensor
    measure: bool = False
    _idle: bool = False  # no row of any process can have a gradient
    _half: Tensor | None = None  # gradient of the first half of the groups
    # Sums over the micro-batches: the loss, the tokens outside the clip range, all tokens learnt from.
    _sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def parts(self) -> Iterator[Part]:
        """Yield the micro-batches; their gradients accumulate in the parameters.

        Every process yields the same number, because the backward pass of the last micro-batch averages the
        accumulated gradients over processes and would wait for ever for a process that has none.
        """
        learner, accelerator = self.learner, self.learner.accelerator
        size, active, weights = learner.args.micro_batch_size, self._active(), self._weights()
        row = torch.arange(len(active), device=active.device)
        middle = self._groups // 2 * learner.sampling.group_size if self.measure else len(row)
        lengths = self._lengths()
        early = equal_passes(accelerator, active & (row < middle), size, lengths)
        blocks = early + equal_passes(accelerator, active & (row >= middle), size, lengths)
        learner.optimizer.zero_grad()
        for k, block in enumerate(blocks):
            if self.measure and k == len(early):
                self._half = flat_gradient(learner.policy.trainable_parameters(), accelerator)
            prompts = SharedPrompts(torch.cat(block)) if len(block) > 1 else None
            last = k + 1 == len(blocks)  # in a block of several, prompts are shared, by one process alone
            with contextlib.nullcontext() if last else accelerator.no_sync(learner.model):
                for rows in block:
                    yield self.batch.part(rows, weights, accelerator, prompts)
            if prompts is not None:
                prompts.backward()
        self._idle = not blocks

    def backward(self, part: Part, loss: Tensor, logprobs: Tensor) -> None:
        """Add the gradient of a micro-batch's loss, and count its tokens outside the clip range.

        `logprobs` are those of the present policy [m, T].
        """
        accelerator, estimator = self.learner.accelerator, self.learner.estimator
        # The loss is a sum over the rows of all processes, but gradients are averaged over processes.
        accelerator.backward(loss * accelerator.num_processes)
        counts = torch.zeros(2, dtype=torch.int64, device=loss.device)  # tokens outside the range, tokens
        if estimator.ratio in CLIPPED:
            ratio, learnt = (logprobs.detach() - part.old(logprobs)).exp(), part.weights != 0
            low, high = estimator.clip_range
            beyond = ((ratio > high) | (ratio < low)) & learnt
            counts = torch.stack([beyond.sum(), learnt.sum()])
        self._sums += torch.cat([loss.detach()[None], counts]).cpu().double()

    def apply(self) -> dict[str, float]:
        """Clip the gradient and step the optimiser, or skip a gradient that is not finite.

        An update without any gradient leaves weights and moments alone: the optimiser would go on along its
        momentum, and decay the weights, where the data say nothing.

        Returns:
            `loss`; `grad_norm`, before clipping; `grad_clipped`, 1 if it was clipped, else 0; `clip_ratio`,
            the share of tokens whose ratio is outside the clip range, for ratios that are clipped for each
            token; and signal and noise of the gradient, if they were measured.

        Raises:
            Stopped: too many consecutive updates had a gradient that was not finite.
        """
        learner, accelerator = self.learner, self.learner.accelerator
        parameters, metrics = learner.policy.trainable_parameters(), {}
        learner.forward.average_gradients(accelerator)
        if self._half is not None and learner.diagnostics is not None:
            metrics = learner.diagnostics.metrics(self._half, flat_gradient(parameters), self._groups)
        limit = learner.args.max_grad_norm or math.inf
        norm = float(accelerator.clip_grad_norm_(parameters, limit))
        if self._idle:
            learner.idle += 1
        else:
            _step_optimizer(learner, norm)
            learner.forward.refresh()
        sums = accelerator.reduce(self._sums.float().to(accelerator.device), reduction="sum").cpu()
        metrics |= {"loss": float(sums[0]), "grad_norm": norm, "grad_clipped": float(norm > limit)}
        if learner.estimator.ratio in CLIPPED:
            metrics["clip_ratio"] = float(sums[1] / sums[2].clamp(min=1))
        return metrics

    @property
    def _groups(self) -> int:
        return len(self.chosen) // self.learner.sampling.group_size

    def _active(self) -> Tensor:
        """Return which rows [N] can have a gradient; the others count only in the weights."""
        batch = self.batch
        active = self.chosen & batch.kept.counted & batch.kept.mask.any(dim=1)
        if self.learner.estimator.loss_side_terms:
            return active  # a KL or an entropy term has a gradient also where the advantage is 0
        return active & (batch.advantages != 0).reshape(len(active), -1).any(dim=1)

    def _lengths(self) -> Lengths:
        """Return what the rows of the step cost."""
        rows, policy = self.batch.rows, self.learner.forward.policy
        dtype = next(policy.model.parameters()).dtype
        fixed = fixed_cost(policy.size, dtype, policy.device.type)
        prompt = int(rows.prompt_length.max()) if policy.share_prompt else 0
        lengths, group = rows.mask.sum(dim=1), self.learner.sampling.group_size
        return Lengths(lengths, prompt, group, fixed, policy.share_passes)

    def _weights(self) -> Tensor:
        """Return the weights [N, T] of the tokens of the chosen rows; 0 elsewhere."""
        kept, chosen = self.batch.kept, self.chosen
        weights = self.batch.advantages.new_zeros(kept.mask.shape)
        weights[chosen] = self.learner.estimator.token_weights(
            kept.mask[chosen].to(weights.dtype),  # so that 1/N has the precision of the advantages
            max_length=self.learner.sampling.max_completion_length,
            valid=kept.counted[chosen],
        )
        return weights


def updates(learner: Learner, batch: Batch, step: int) -> Iterator[Update]:
    """Yield the updates of a rollout: `num_minibatches` sets of groups in each of `num_iterations` passes."""
    args, size = learner.args, learner.sampling.group_size
    groups = len(batch.kept.mask) // size
    generator = torch.Generator().manual_seed((args.seed << 32) + step)
    # Only the first update of a rollout is on-policy, and the diagnostics are about the on-policy gradient.
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
