"""Evaluates a policy on episodes from starting states that it was never trained on, and films one."""

from __future__ import annotations

import contextlib
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import gymnasium
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import RecordVideo

from tokenrl.control.environments import Environments, Spec
from tokenrl.control.policies import Policy
from tokenrl.control.rollouts import collect_episodes
from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Refused
from tokenrl.runs.files import remove

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


def evaluation_metrics(
    policy: Policy, envs: Environments, spec: Spec, *, seed: int
) -> dict[str, float]:
    """Play a whole episode in every environment, with sampled actions and with the best ones.

    Returns:
        For both, the mean return (of unscaled rewards, undiscounted) and its standard error over episodes;
        and the mean length of the episodes with sampled actions.
    """
    start = seed_of(seed, 1, evaluation=True)
    generator = torch.Generator().manual_seed(seed)
    sampled = collect_episodes(envs, policy, spec.horizon, generator, seed=start)
    greedy = collect_episodes(envs, policy, spec.horizon, None, seed=start)
    reward, error = mean_and_error(sampled.returns.double())
    greedy_reward, greedy_error = mean_and_error(greedy.returns.double())
    return {
        "reward": float(reward),
        "reward_stderr": float(error),
        "episode_length": float(sampled.lengths.double().mean()),
        "reward_greedy": float(greedy_reward),
        "reward_greedy_stderr": float(greedy_error),
    }


def film(policy: Policy, spec: Spec, folder: Path, *, seed: int) -> Path:
    """Film one episode with the most probable actions, by gymnasium's `RecordVideo`; return the file.

    Call `check_film` first: it refuses an environment that cannot be filmed.
    """

    def camera() -> gymnasium.Env:
        single = gymnasium.make(spec.env, render_mode="rgb_array", max_episode_steps=spec.horizon)
        return RecordVideo(single, str(folder), name_prefix="episode", disable_logger=True)

    # Many environments draw with SDL, which fails where there is no display unless its driver is 'dummy'.
    driver = os.environ.get("SDL_VIDEODRIVER", "dummy")
    start = seed_of(seed, 2, evaluation=True)
    video = folder / "episode-episode-0.mp4"
    remove(video)  # a link in its place would be written through
    with patch.dict(os.environ, SDL_VIDEODRIVER=driver), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        envs = Environments(spec.env, 1, vector=SyncVectorEnv([camera]))
        with contextlib.closing(envs):
            collect_episodes(envs, policy, spec.horizon, None, seed=start)
    return video


def check_film(spec: Spec) -> None:
    """Refuse an environment that cannot be filmed.

    Raises:
        Refused: the environment draws no picture, or moviepy is not installed.
    """
    if find_spec("moviepy") is None:
        raise Refused('A video needs moviepy: pip install "gymnasium[other]".')
    if "rgb_array" not in spec.render_modes:
        draws = ", ".join(spec.render_modes) or "nothing"
        raise Refused(f"{spec.env} cannot be filmed: it draws {draws}. Leave --video out.")
