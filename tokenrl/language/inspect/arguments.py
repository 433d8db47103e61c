"""Arguments of `tokenrl sample`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from tokenrl.language.policy.arguments import Dtype
from tokenrl.language.tasks.arguments import TaskArguments
from tokenrl.settings import Count, Natural, Positive, Settings


@dataclass(frozen=True)
class SampleArguments(Settings):
    """Complete prompts, those given or line by line."""

    model: str = ""
    """Local directory or hub name."""
    prompt: tuple[str, ...] = ()
    """One or more prompts. Default: ask for them, or read them as lines from a pipe."""
    task: str | None = None
    """Show the rewards of this task beside each completion."""
    reward: tuple[str, ...] = ()
    """Show these rewards instead, or without a task; named as in train."""
    reward_weights: tuple[float, ...] = ()
    """One weight a reward. Default: 1 each."""
    num_generations: Natural = 4
    """Completions a prompt; 0: the greedy one."""
    max_completion_length: Count | None = None
    """Most tokens a completion may have. Default: the task's, else 64, or what the context leaves."""
    temperature: Positive = 1.0
    """Temperature of sampling."""
    chat: bool = False
    """Send the prompt as a chat message of the user."""
    dtype: Dtype = "float32"
    """Precision of the weights."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
    seed: Natural = 0
    """Seed of sampling."""


@dataclass(frozen=True)
class EvaluateArguments(TaskArguments):
    """Evaluate a model on a task's held-out prompts, greedy and sampled."""

    model: str = ""
    """Local directory or hub name."""
    num_generations: Natural | None = None
    """Sampled completions a prompt, beside the greedy one; 0: none. Default: 4, or the largest k."""
    k: tuple[Count, ...] = ()
    """Sizes of pass@k (best-of-k where rewards are not 0 or 1). Default: 1 and num_generations."""
    best_of: Natural = 0
    """Largest n of best-of-n: so many completions are sampled for each prompt, the rewards named by --reward
    choose among them, and the task's own reward says what the choice is worth. 0: not measured."""
    reference: str | None = None
    """Directory or hub name of the model that training started from: report the KL to it."""
    max_completion_length: Count | None = None
    """Most tokens a completion may have. Default: the task's, else 256."""
    temperature: Positive = 1.0
    """Temperature of sampling."""
    dtype: Dtype = "float32"
    """Precision of the weights."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
    truncate_prompts: bool = False
    """Drop tokens from the left of prompts too long for the context, instead of refusing them."""
    seed: Natural = 0
    """Seed of sampling."""
    json: str | None = None
    """Also write the numbers to this file."""
