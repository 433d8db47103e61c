"""The arguments of `tokenrl advise`. Imports no torch and no gymnasium."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tokenrl.core.axes import Baseline
from tokenrl.language.policy.arguments import ModelArguments
from tokenrl.language.tasks.arguments import TaskArguments
from tokenrl.settings import Bounds, Count, Natural, Positive


@dataclass(frozen=True)
class AdviseArguments(ModelArguments, TaskArguments):
    """Recommend settings for an environment or a language task, from a short measurement, with reasons."""

    env: str = ""
    """Gymnasium id, or gridworld, walk, bandit."""
    task: str = ""
    """A language task, named as for training."""
    head: Literal["auto", "softmax", "gaussian"] = "auto"
    """Distribution of an agent's actions; auto goes by the action space."""
    baseline: Baseline | None = None
    """Baseline to use. Default: the one recommended."""
    max_episode_steps: Count | None = None
    """Steps after which an episode is cut. Default: the environment's own limit."""
    allow_no_baseline: bool = False
    """Go without a baseline also where episodes are longer than 500 steps."""
    episodes: Annotated[int, Bounds(at_least=2)] = 50
    """Episodes of random actions that are measured; fewer where they are long."""
    num_prompts: Count = 64
    """Training prompts that a language model is measured on."""
    num_samples: Annotated[int, Bounds(at_least=2)] = 32
    """Completions of each; groups up to this size can be judged."""
    max_completion_length: Count | None = None
    """Most tokens a completion may have. Default: the task's, else 256."""
    temperature: Positive = 1.0
    """Temperature of sampling."""
    seed: Natural = 0
    """Seed of the measurement, and of the training recommended."""
    config: str | None = None
    """Write the settings to this file, for --config of `tokenrl control` or `tokenrl train`."""
    json: str | None = None
    """Write settings, reasons and measurements to this file."""
