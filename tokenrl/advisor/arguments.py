"""The arguments of `tokenrl advise`. Imports no torch and no gymnasium."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenrl.core.axes import Baseline
from tokenrl.language.policy.arguments import LoraArguments, ModelArguments
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.settings import Count, Number, Positive, Seed, Several


@dataclass(frozen=True)
class AdviseArguments(ModelArguments, TaskArguments, LoraArguments):
    """Recommend settings for an environment or a language task, or diagnose a run, with reasons."""

    env: str = ""
    """Id of a gymnasium environment, or gridworld, trap, walk, costly_walk, bandit.
    For your own environment, name the file or module that registers it: my_envs.py:Mine-v0."""
    task: str = ""
    """Name of a language task, as for training."""
    run: str = ""
    """Directory of a run of `tokenrl train` or `tokenrl control`, finished or not, to diagnose."""
    head: Literal["auto", "softmax", "gaussian"] = "auto"
    """Distribution of an agent's actions; auto chooses by the action space."""
    baseline: Baseline | None = None
    """Baseline to use. Default: the one recommended."""
    max_episode_steps: Count | None = None
    """Steps after which an episode is cut. Default: the environment's own limit."""
    allow_no_baseline: bool = False
    """Allow training without a baseline where episodes may be longer than 500 steps."""
    episodes: Several = 50
    """Number of random episodes that are measured; fewer if they are long."""
    num_prompts: Count = 64
    """Number of training prompts that a language model is measured on."""
    num_samples: Several = 32
    """Completions per prompt; groups of up to this size can be recommended."""
    num_generations: Count | None = None
    """Completions per prompt to train with; with 1, no group is compared. Default: the one recommended."""
    max_completion_length: Count | None = None
    """Largest number of tokens in a completion. Default: the task's, else 256."""
    temperature: Positive = 1.0
    """Temperature of sampling."""
    seed: Seed = 0
    """Seed of the measurement, and of the recommended training."""
    pass_threshold: Number | None = None
    """Least total reward with which a completion is right, for pass@k. Default: 1 for a single reward that is
    declared binary, else the threshold of the task, if it has one."""
    config: str | None = None
    """Write the settings to this file, for --config of `tokenrl control` or `tokenrl train`."""
    json: str | None = None
    """Write settings, reasons and measurements to this file, as JSON."""
