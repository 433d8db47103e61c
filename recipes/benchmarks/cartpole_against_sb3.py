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
slows down slows all of them. The program prints medians over seeds, and ratios to tokenrl with the same seed.

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

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from tokenrl import train_agent
from tokenrl.control import Environments, seed_of
from tokenrl.runs import read_metrics

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


class Outcome(NamedTuple):
    """The result of one agent with one seed."""

    seconds: float  # of processor time, until solved or given up
    steps: int
    solved: bool


def time_tokenrl(seed: int) -> Outcome:
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
    at = next((i for i, row in enumerate(rows) if row["eval_reward"] >= SOLVED), None)
    last = -1 if at is None else at
    return Outcome(clocks[last]["cpu_seconds"], int(rows[last]["num_env_steps"]), at is not None)


class Watch(BaseCallback):
    """Counts the processor time of training, and stops it once an evaluation says that it is solved.

    Evaluations happen between the updates of one rollout and the start of the next, with the clock stopped.
    """

    def __init__(self, evaluate: Callable[[], float]) -> None:
        super().__init__()
        self.evaluate = evaluate
        self.seconds, self.began, self.evaluated, self.solved = 0.0, 0.0, 0, False

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
        self.solved = self.evaluate() >= SOLVED
        self.began = time.process_time()


def mean_return(model: Any, envs: Environments, seed: int) -> float:
    """Play one whole episode in every environment, from the starting states that tokenrl is evaluated on."""
    observations = envs.reset(seed_of(seed, 1, evaluation=True))
    alive, returns = np.ones(EPISODES, bool), np.zeros(EPISODES)
    while alive.any():
        actions, _ = model.predict(observations, deterministic=False)
        observations, rewards, terminated, truncated = envs.step(actions)
        returns += rewards * alive
        alive &= ~(terminated | truncated)
    return float(returns.mean())


def time_ppo(seed: int) -> Outcome:
    model = PPO("MlpPolicy", make_vec_env(ENV, PPO_ENVS, seed=seed), seed=seed, device="cpu", **ZOO)
    envs = Environments(ENV, EPISODES)
    watch = Watch(lambda: mean_return(model, envs, seed))
    model.learn(PPO_STEPS, callback=watch, log_interval=None)
    return Outcome(watch.seconds, watch.evaluated, watch.solved)


def spread(values: list[float], form: str) -> str:
    """Median, and the range in brackets."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main(seeds: int = 3) -> None:
    """Time tokenrl and stable-baselines3 until CartPole-v1 is solved.

    Args:
        seeds: Seeds 0, 1, ...; each is one turn of both.
    """
    torch.set_num_threads(1)
    names = "torch", "gymnasium", "stable-baselines3"
    print(f"{', '.join(f'{name} {version(name)}' for name in names)}; 1 thread; {ENV}")
    outcomes: dict[str, list[Outcome]] = {"tokenrl": [], "ppo_zoo": []}
    for seed in range(seeds):
        outcomes["tokenrl"].append(time_tokenrl(seed))
        outcomes["ppo_zoo"].append(time_ppo(seed))
        for name, measured in outcomes.items():
            print(f"  seed {seed} {name}: {measured[-1]}", flush=True)
    print("\nmedian (range); seconds of processor time; unsolved runs count until they gave up")
    for name, measured in outcomes.items():
        print(f"{name} ({sum(outcome.solved for outcome in measured)} of {seeds} solved)")
        print(f"  seconds until solved       {spread([o.seconds for o in measured], '.2f')}")
        print(f"  steps until solved         {spread([o.steps for o in measured], ',.0f')}")
        pairs = zip(measured, outcomes["tokenrl"], strict=True)
        ratios = [theirs.seconds / ours.seconds for theirs, ours in pairs]
        print(f"  seconds, times tokenrl's   {spread(ratios, '.2f')}")


if __name__ == "__main__":
    tyro.cli(main)
