"""Tries a run out without changing a weight: an evaluation, training steps, a look at log-probabilities.

A step with the run's rewards shows whether there is a signal. One in which every completion has a reward of
its own shows what a full update costs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from tokenrl.core.estimator import Estimator
from tokenrl.core.rows import teaches_nothing
from tokenrl.errors import TokenrlError
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.scoring import score
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.checked_texts import Texts
from tokenrl.language.training.collect import sample
from tokenrl.language.training.run import Run
from tokenrl.language.training.step import Record, training_step
from tokenrl.runs.checkup import Finding
from tokenrl.runs.session import Session

T = TypeVar("T")

PROMPTS, GENERATIONS = 4, 4
"""Prompts, and completions of each, that are sampled and scored for the comparison."""


ENOUGH, MOST = 128, 8
"""Completions, or else steps, after which a check says that there is no signal; small steps are repeated."""


class Gap(NamedTuple):
    """How far log-probabilities of sampling and of scoring are apart, over the tokens, in nats."""

    mean: float
    largest: float


@dataclass
class Trials:
    """What was tried out.

    Attributes:
        estimator: the run's estimator.
        rewarded: training steps with the run's rewards: one, or several small ones until there is a signal.
        full: a training step in which every row has a gradient; None if it failed.
        gap: how far sampling and scoring are apart; None if that failed.
        evaluation: seconds of the evaluation.
        findings: what failed.
    """

    estimator: Estimator
    rewarded: list[Record] = field(default_factory=list)
    full: Record | None = None
    gap: Gap | None = None
    evaluation: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        """The steps that succeeded."""
        return [*self.rewarded, *([] if self.full is None else [self.full])]

    @property
    def sampled(self) -> list[dict[str, float]]:
        """The metrics of the steps with the run's rewards, or else of the other one."""
        return [record.metrics for record in self.rewarded or self.records]

    @property
    def flat(self) -> bool:
        """Whether no rewards differ that the estimator compares."""
        metrics = [record.metrics for record in self.rewarded]
        means = {one["reward"] for one in metrics}
        differ = not self.estimator.needs_groups and len(means) > 1  # between steps
        return not differ and all(teaches_nothing(self.estimator, one) for one in metrics)

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """Do some work and return what it returns; if it fails, keep a finding and return None."""
        try:
            return work()
        except TokenrlError as error:
            found, why = f"A trial of the {what} failed.", "Training would stop at the same error."
            self.findings.append(Finding(f"{what}-failed", found, why, str(error)))
            return None


def try_out(run: Run, session: Session, texts: Texts, evaluate: Callable[[], Mapping[str, float]]) -> Trials:
    """Evaluate, make trial steps and compare log-probabilities, on the prompts that can be asked.

    Args:
        run: the run.
        session: records the evaluation.
        texts: the prompts that can be asked. There is no evaluation if one of the held-out ones cannot.
        evaluate: evaluates the policy.
    """
    args, trials, began = run.args, Trials(run.args.estimator), time.perf_counter()
    if len(texts.held_out) == len(run.task.eval_prompts):
        session.evaluated(trials.attempt("evaluation", evaluate) or {})
    trials.evaluation = time.perf_counter() - began
    if not texts.train:
        return trials
    stream = PromptStream(texts.train, args.prompts_per_step, args.seed)
    step = partial(_trial_step, run, stream=stream)
    enough = min(MOST, math.ceil(ENOUGH / (args.prompts_per_step * args.num_generations)))
    while trials.flat and len(trials.rewarded) < enough and not trials.findings:
        record = trials.attempt("step", partial(step, run.rewards, number=1 + len(trials.rewarded)))
        trials.rewarded += [] if record is None else [record]
    trials.full = trials.attempt("update", partial(step, Rewards(_spread_rewards), number=1 + enough))
    trials.gap = trials.attempt("scoring", partial(_scoring_gap, run, texts.train))
    return trials


class Still:
    """Stands in for an optimiser: it clears the gradients, and never changes the weights."""

    def __init__(self, optimizer: Any) -> None:
        """Keep the optimiser whose gradients are cleared."""
        self._optimizer = optimizer

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """Leave the weights as they are."""


def _trial_step(run: Run, rewards: Rewards, *, stream: PromptStream, number: int) -> Record:
    """Make a real training step, with forward and backward passes, that leaves policy and critic unchanged.

    Args:
        run: the run, whose own parts stay as they are.
        rewards: the reward functions.
        stream: deals the prompts out.
        number: number of the step, which decides the random numbers.

    Raises:
        Stopped: a reward function failed, or abstained from every completion.
    """
    learner = replace(
        run.learner,
        optimizer=Still(run.learner.optimizer),
        critic=copy.deepcopy(run.learner.critic),
        diagnostics=None,
    )
    running_mean = copy.deepcopy(run.running_mean)
    try:
        return training_step(learner, rewards, running_mean, number, stream.next(), stream.take)
    finally:
        run.learner.optimizer.zero_grad()


def _spread_rewards(completions: Sequence[Any], **_: Any) -> list[float]:
    """Give every completion a reward of its own, so that every row has a gradient: a full update's work."""
    return [i * 0.618 % 1 for i in range(1, len(completions) + 1)]


def _scoring_gap(run: Run, rows: Sequence[Mapping[str, Any]]) -> Gap:
    """Sample a few completions, score them with the forward pass of training, and compare.

    Args:
        run: the run.
        rows: prompts; the first four are taken.
    """
    learner = run.learner
    size = min(GENERATIONS, learner.sampling.group_size)
    sampling = replace(learner.sampling, num_generations=size, step=1)
    rollout = sample(learner, list(enumerate(rows[:PROMPTS])), sampling)
    count = min(len(rollout.mask), learner.args.micro_batch_size or len(rollout.mask))
    rollout = rollout.rows(torch.arange(count, device=rollout.mask.device))
    scored = score(learner.model, rollout, **learner.scoring).logprobs.detach()
    apart = (scored - rollout.logprobs)[rollout.mask].double().abs()
    return Gap(float(apart.mean()), float(apart.max()))
