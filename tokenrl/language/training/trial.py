"""Tries a run out without changing a weight: real training steps, and one comparison of log-probabilities."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.scoring import score
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.collect import sample
from tokenrl.language.training.run import Run
from tokenrl.language.training.step import Record, training_step

PROMPTS, GENERATIONS = 4, 4
"""Prompts, and completions of each, that are sampled and scored for the comparison."""


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


def trial_step(run: Run, rewards: Rewards, stream: PromptStream, step: int) -> Record:
    """Make a real training step, with forward and backward passes, that leaves policy and critic unchanged.

    Args:
        run: the run, whose own parts stay as they are.
        rewards: the reward functions.
        stream: deals the prompts out.
        step: number of the step, which decides the random numbers.

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
        return training_step(learner, rewards, running_mean, step, stream.next(), stream.take)
    finally:
        run.learner.optimizer.zero_grad()


def spread_rewards(completions: Sequence[Any], **_: Any) -> list[float]:
    """Give every completion a reward of its own, so that every row has a gradient: a full update's work."""
    return [i * 0.618 % 1 for i in range(1, len(completions) + 1)]


class Gap(NamedTuple):
    """How far log-probabilities of sampling and of scoring are apart, over the tokens, in nats."""

    mean: float
    largest: float


def scoring_gap(run: Run, rows: Sequence[Mapping[str, Any]]) -> Gap:
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
