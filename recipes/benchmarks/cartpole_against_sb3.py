"""Measures processor time until CartPole-v1 is solved, against stable-baselines3, on one machine.

Solved is an evaluation of 100 episodes, from starting states that were never trained on, with a mean return
of 475 or more. Actions are drawn there as in training.
tokenrl has the defaults of `tokenrl control`: whole episodes of 64 environments, the mean of the other
episodes as the baseline, no critic. It is compared with PPO with the settings that rl-baselines3-zoo tuned
for CartPole.

The time is processor time of rollouts and updates, without imports, making of networks and environments, or
evaluation. All are evaluated alike: tokenrl after each update (some 1,300 steps at first, 32,000 at last),
the others after every 1,024 steps. All have one thread, so that none waits for another, and OpenMP's spin
count, which the command tokenrl sets, plays no part. They take turns, seed by seed, so that a machine that
slows down slows all of them. The program prints medians over seeds, and ratios of runs with the same seed;
what was not solved counts until it gave up. Without stable-baselines3 tokenrl is measured alone.

    pip install -c constraints.txt stable-baselines3 -e .
    python recipes/benchmarks/cartpole_against_sb3.py

Look for: tokenrl takes about ten times more steps but less time, because it makes a few large
updates where PPO makes many small ones, and steps 64 environments in one call.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from one_trainer import print_measurement
from step_against_trl import (
    TRAINER,
    alternate,
    middle,
    print_heading,
    print_row,
    run,
    times,
    versions,
)

ENV, SOLVED, EPISODES = "CartPole-v1", 475.0, 100
EVALUATE_EVERY = 1024  # steps of stable-baselines3
ZOO = {
    "n_steps": 32,
    "batch_size": 256,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "n_epochs": 20,
    "learning_rate": lambda remaining: 1e-3 * remaining,
    "clip_range": lambda remaining: 0.2 * remaining,
}
PPO_ENVS, PPO_STEPS = 8, 100_000  # environments, and steps after which PPO gives up
MAX_UPDATES = 100  # after which tokenrl gives up
COLUMNS = ("solved: PPO", "tokenrl", "PPO, s", "tokenrl, s", "ratio of a seed (range)")
COLUMNS += ("steps: PPO", "tokenrl")


def time_tokenrl(seed: int) -> dict[str, float]:
    """Train by tokenrl; returns the processor time and the steps until it was solved or given up."""
    from tokenrl import train_agent
    from tokenrl.runs import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        result = train_agent(
            env=ENV,
            seed=seed,
            output_dir=f"{folder}/run",
            max_steps=MAX_UPDATES,
            eval_every=1,
            eval_episodes=EPISODES,
            stop_when_solved=True,
            quiet=True,
        )
        rows = read_metrics(result.output_dir / "metrics.jsonl")[1:]
        clocks = read_metrics(result.output_dir / "timings.jsonl")
    solved = [row["eval_reward"] >= SOLVED for row in rows]
    last = solved.index(True) if any(solved) else -1
    steps = rows[last]["num_env_steps"]
    return {"seconds": clocks[last]["cpu_seconds"], "steps": steps, "solved": any(solved)}


def mean_return(model: Any, envs: Any, seed: int) -> float:
    """Play one whole episode in every environment, from the starting states that tokenrl is evaluated on."""
    from tokenrl.control import seed_of

    observations = envs.reset(seed_of(seed, 1, evaluation=True))
    alive, returns = np.ones(EPISODES, bool), np.zeros(EPISODES)
    while alive.any():
        actions, _ = model.predict(observations, deterministic=False)
        observations, rewards, terminated, truncated = envs.step(actions)
        returns += rewards * alive
        alive &= ~(terminated | truncated)
    return float(returns.mean())


def time_ppo(seed: int) -> dict[str, float]:
    """Train by stable-baselines3; returns the same.

    Evaluations happen between the updates of one rollout and the start of the next, with the clock stopped.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    from tokenrl.control import Environments

    class Watch(BaseCallback):
        """Counts the processor time of training, and stops it once an evaluation says that it is solved."""

        seconds, began, evaluated, solved = 0.0, 0.0, 0, False

        def _on_training_start(self) -> None:
            self.began = time.process_time()

        def _on_rollout_start(self) -> None:
            if self.num_timesteps - self.evaluated >= EVALUATE_EVERY:
                self.pause()

        def _on_step(self) -> bool:
            return not self.solved

        def _on_training_end(self) -> None:
            if not self.solved:
                self.pause()

        def pause(self) -> None:
            self.seconds += time.process_time() - self.began
            self.evaluated = self.num_timesteps
            self.solved = mean_return(self.model, envs, seed) >= SOLVED
            self.began = time.process_time()

    model = PPO("MlpPolicy", make_vec_env(ENV, PPO_ENVS, seed=seed), seed=seed, device="cpu", **ZOO)
    envs = Environments(ENV, EPISODES)
    watch = Watch()
    model.learn(PPO_STEPS, callback=watch, log_interval=None)
    return {"seconds": watch.seconds, "steps": watch.evaluated, "solved": watch.solved}


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """Measure one agent with a seed, which is the number of the round."""
    import torch

    torch.set_num_threads(1)
    return (time_tokenrl if spec["who"] == "tokenrl" else time_ppo)(spec["round"])


def main(seeds: int = 3) -> None:
    """Time tokenrl and stable-baselines3 until CartPole-v1 is solved.

    Args:
        seeds: Seeds 0, 1, ...; each is one turn of both.
    """
    about = versions(run(TRAINER, {"part": "device"}), "gymnasium", "stable_baselines3")
    print_heading(COLUMNS, f"{about}; 1 thread; {ENV}")
    args = Namespace(rounds=seeds, tokenrl={})
    _, *both = alternate(Path(__file__), {}, [{}], args, "stable_baselines3")
    solved = [str(sum(result.get("solved", False) for result in results)) for results in both]
    print_row([*solved, *times(*both, ".2f"), *(middle(x, "steps", ",.0f") for x in both)])


if __name__ == "__main__":
    if "--measure" in sys.argv:  # in a process of its own
        print_measurement(measure)
    else:
        tyro.cli(main)
