"""Evaluates a policy on episodes from starting states that it was never trained on."""

from __future__ import annotations

import numpy as np
import torch

from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy
from tokenrl.control.rollouts import collect_episodes
from tokenrl.core.statistics import mean_and_error

SEEDS = 2**30
"""Seeds of training are below this number and those of evaluation are not, so that they never share one."""
MOST_COPIES = 10**6
"""Largest number of copies of an environment, which take consecutive seeds."""


def seed_of(seed: int, purpose: int, rollout: int = 0, *, evaluation: bool = False) -> int:
    """Return the seed of one purpose in a run; other runs and purposes have other seeds.

    Args:
        seed: seed of the run.
        purpose: what is drawn; 0 for the starting states of training.
        rollout: number of rollouts before, for a purpose that needs a seed in each of them.
        evaluation: whether it is for an evaluation.
    """
    (state,) = np.random.SeedSequence([seed, purpose, rollout]).generate_state(1)
    number = int(state) % (SEEDS - MOST_COPIES)
    return number + SEEDS if evaluation else number


def evaluation_metrics(policy: Policy, envs: Environments, *, seed: int) -> dict[str, float]:
    """Play a whole episode in every environment, with sampled actions and with the best ones.

    Returns:
        For both, the mean return (of unscaled rewards, undiscounted) and its standard error over episodes;
        and the mean length of the episodes with sampled actions.
    """
    metrics: dict[str, float] = {}
    draws = {"reward": torch.Generator().manual_seed(seed), "reward_greedy": None}
    for name, generator in draws.items():
        start = seed_of(seed, 1, evaluation=True)
        rollout = collect_episodes(envs, policy, generator, seed=start)
        mean, error = mean_and_error(rollout.returns.double())
        metrics |= {name: float(mean), f"{name}_stderr": float(error)}
        metrics.setdefault("episode_length", float(rollout.lengths.double().mean()))
    return metrics
