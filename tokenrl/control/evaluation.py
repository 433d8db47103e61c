"""Evaluates a policy on episodes whose starting states it was never trained on, and films one."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import RecordVideo

from tokenrl.control.environments import Environments, Spec, make
from tokenrl.control.failures import close
from tokenrl.control.policies import Policy
from tokenrl.control.rollouts import collect_episodes
from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Refused

SEEDS = 2**30
"""Seeds of training are below this number and those of evaluation are not, so that they never share one."""


def seed_of(seed: int, purpose: int, rollout: int = 0, *, evaluation: bool = False) -> int:
    """Return the seed of one purpose in a run, which differs from those of other runs and purposes.

    Args:
        seed: seed of the run.
        purpose: what is drawn; 0 for the starting states of training.
        rollout: number of rollouts before, for a purpose that needs a seed in each of them.
        evaluation: whether it is for an evaluation.
    """
    number = int(np.random.SeedSequence([seed, purpose, rollout]).generate_state(1)[0]) % (SEEDS - 10**6)
    return number + SEEDS if evaluation else number


def evaluate(
    policy: Policy, envs: Environments, spec: Spec, *, seed: int, greedy: bool
) -> tuple[float, float, float]:
    """Play one whole episode in every environment.

    Returns:
        Mean return (of unscaled rewards, undiscounted), its standard error over episodes, and mean length.
    """
    generator = None if greedy else torch.Generator().manual_seed(seed)
    start = seed_of(seed, 1, evaluation=True)
    rollout = collect_episodes(envs, policy, spec.horizon, generator, seed=start)
    mean, error = mean_and_error(rollout.returns.double())
    return float(mean), float(error), float(rollout.lengths.double().mean())


def evaluation_metrics(policy: Policy, envs: Environments, spec: Spec, *, seed: int) -> dict[str, float]:
    """Evaluate a policy with sampled actions, as in training, and with the most probable actions."""
    sampled, error, length = evaluate(policy, envs, spec, seed=seed, greedy=False)
    greedy, greedy_error, _ = evaluate(policy, envs, spec, seed=seed, greedy=True)
    return {
        "reward": sampled,
        "reward_stderr": error,
        "reward_greedy": greedy,
        "reward_greedy_stderr": greedy_error,
        "episode_length": length,
    }


def film(policy: Policy, spec: Spec, folder: Path, *, seed: int) -> Path:
    """Film one episode with the most probable actions; return the file.

    Call `check_film` first: it refuses an environment that cannot be filmed.
    """
    with warnings.catch_warnings(), _no_window():
        warnings.simplefilter("ignore")
        single = gymnasium.make(spec.env, render_mode="rgb_array", max_episode_steps=spec.horizon)
        single = RecordVideo(single, str(folder), name_prefix="episode", disable_logger=True)
        copies = Environments(spec.env, 1, spec.horizon)
        observation, _ = single.reset(seed=seed_of(seed, 2, evaluation=True))
        over = False
        while not over:
            with torch.no_grad():
                action = policy.act(torch.from_numpy(copies.flat(np.asarray(observation)[None])), None)
            observation, _, terminated, truncated, _ = single.step(copies.translate(action.numpy())[0])
            over = terminated or truncated
        single.close()
        copies.close()
    return folder / "episode-episode-0.mp4"


@contextlib.contextmanager
def _no_window() -> Iterator[None]:
    """Let SDL, with which environments draw, open no window; else it complains where there is no display.

    Only for a while, so that environments which the process makes later still open theirs.
    """
    driver = "SDL_VIDEODRIVER"
    given = driver in os.environ
    os.environ.setdefault(driver, "dummy")
    try:
        yield
    finally:
        if not given:
            del os.environ[driver]


def check_film(spec: Spec) -> None:
    """Refuse an environment that cannot be filmed.

    Raises:
        Refused: the environment draws no picture, or moviepy is not installed.
    """
    try:
        import moviepy  # noqa: F401
    except ImportError as error:
        raise Refused(f'A video needs moviepy ({error}): pip install "gymnasium[other]".') from error
    vector = make(spec.env, 1, spec.horizon)
    modes = vector.metadata.get("render_modes", [])
    close(spec.env, vector)
    if "rgb_array" not in modes:
        raise Refused(
            f"{spec.env} cannot be filmed: it draws {', '.join(modes) or 'nothing'}. Leave --video out."
        )
