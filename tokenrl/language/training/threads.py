"""Chooses how many threads sample from a language model and train it, by timing a few of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.training.forward import differentiate, made_up_rollout
from tokenrl.language.training.update import Learner
from tokenrl.runs.threads import Choice, choose_threads, threads_in_words, with_threads

Stage = Literal["sampling", "training"]
WORK = 100_000_000
"""Parameters times rows of what is timed, so that a large model is timed on few rows."""
MOST_ROWS = 256
"""The most rows that are timed."""


def stage_threads(
    policy: Policy, args: Any, *stages: Stage, training: Callable[[], None] | None = None, rows: int = 32
) -> dict[str, Choice]:
    """Choose the number of threads for each stage; nothing is chosen where the model is on no CPU.

    Args:
        policy: the policy, on the device where it will run; it is left as it is.
        args: the settings, in which `sampling_threads` and `training_threads` may say a number.
        *stages: what the run does with the policy.
        training: a piece of the run's training, to be timed; None for that of a few short completions.
        rows: number of completions that are sampled at once; fewer are timed if the model is large.

    Raises:
        Stopped: the model's logits are not finite.
    """
    if policy.device.type != "cpu":
        return {}
    parameters = policy.size
    work = _Work(policy, max(2, min(rows, WORK // parameters) // 2))
    timed = {"sampling": work.sampling, "training": training or work.training}
    with torch.random.fork_rng(devices=[]):
        return {
            stage: choose_threads(timed[stage], parameters, getattr(args, f"{stage}_threads", None))
            for stage in stages
        }


def settle_threads(learner: Learner) -> dict[str, Choice]:
    """Choose the numbers of threads of a training run, and write them into its settings and its generator."""
    forward = learner.forward
    rollout = made_up_rollout(learner.args, forward.policy)

    def training() -> None:
        differentiate(forward.policy, forward.model, rollout)

    args = learner.args
    rows = args.sampling_batch_size or args.prompts_per_step * args.num_generations
    threads = stage_threads(
        forward.policy, args, "sampling", "training", training=training, rows=min(rows, MOST_ROWS)
    )
    take_threads(learner, threads)
    return threads


def take_threads(learner: Learner, threads: Mapping[str, Choice]) -> None:
    """Write numbers of threads into the settings of a training run and into its generator."""
    learner.args = with_threads(learner.args, threads)
    if isinstance(learner.generator, TransformersGenerator):
        learner.generator = replace(learner.generator, threads=learner.args.sampling_threads)


def announced_threads(policy: Policy, stage: Stage, announce: Callable[[str], None]) -> int | None:
    """Choose the number of threads for a stage of a command that records no settings.

    Args:
        policy: the policy, on the device where it will run.
        stage: what the command does with it.
        announce: prints a line for people, if something was measured.

    Returns:
        The number for `using_threads`.
    """
    choices = stage_threads(policy, None, stage)
    for choice in choices.values():
        if choice.measured:
            announce(f"threads: {threads_in_words(choices)}")
        return choice.number
    return None


@dataclass
class _Work:
    """Both stages on two prompts and a few tokens.

    Attributes:
        policy: the policy.
        generations: completions of each prompt.
    """

    policy: Policy
    generations: int

    def sampling(self) -> Rollout:
        """Sample completions, which never end early."""
        vocabulary = self.policy.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        context = self.policy.context or 64
        length = max(1, min(4, context // 3))
        prompt = [i % vocabulary for i in range(max(1, min(8, context - length)))]
        draws = torch.linspace(0.1, 0.9, 2 * self.generations * length).view(-1, length)
        endless = TransformersGenerator(replace(self.policy, eos_ids=()))
        return endless.generate([prompt, prompt[::-1]], Sampling(length, self.generations), draws)

    @cached_property
    def rollout(self) -> Rollout:
        """What is trained on."""
        return self.sampling()

    def training(self) -> None:
        """Score the completions and compute the gradient; the parameters and their `grad` stay."""
        differentiate(self.policy, self.policy.model, self.rollout)
