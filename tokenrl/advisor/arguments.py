"""The arguments of `tokenrl advise`. Imports no torch and no gymnasium."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenrl.core.axes import Baseline
from tokenrl.settings import Count, Seed, Settings, Several


@dataclass(frozen=True)
class AdviseArguments(Settings):
    """Recommend settings for an environment, or diagnose a run, with reasons."""

    env: str = ""
    """Id of a gymnasium environment, or gridworld, trap, walk, costly_walk, bandit.
    For your own environment, name the file or module that registers it: my_envs.py:Mine-v0."""
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
    seed: Seed = 0
    """Seed of the measurement, and of the recommended training."""
    config: str | None = None
    """Write the settings to this file, for --config of `tokenrl control`."""
    json: str | None = None
    """Write settings, reasons and measurements to this file, as JSON."""
