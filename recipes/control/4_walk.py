"""A walk on a line, with a value head and without, and with returns normalised in each episode or not.

x starts at 0 and moves by 0.1 to the left or right. The episode ends when |x| exceeds 1, with a reward of 1 on
the right and -1 on the left; every other step pays 0.01, and after 50 steps the episode is
cut. Standing about returns 0.5, the straight path to the right 1.1. The agent is a textbook's: two tanh
layers of 128, PyTorch's initial weights, Adam 3e-4, one episode an update, a mean over its steps, gradients
clipped at norm 0.5, 400 episodes, and a time limit that counts as an end. With a value head on the same
layers the advantage is G_t - V(x), and the head learns G_t by half its squared error. "Normalised" means that
G_t, the return from step t on with gamma 0.99, is first shifted and scaled to mean 0 and sd 1 within its episode;
V then learns those numbers. This is the textbook's choice.

Look for: normalised in itself, every episode gets a credit that sums to 0, and V cannot bring back what was
divided out. With raw returns V is worth what the textbook says. Without V the policy walks straight to the
right; with it, it takes its time on the safe side and arrives all the same. In `--env costly_walk` every such
step costs 0.01, and V is no gain. The numbers are on the page of `tokenrl control`,
recipes/pages/reference/control.md.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from curves import draw_mean, draw_rolling, mean_with_interval, save, trained
from matplotlib.figure import Figure

from tokenrl import Estimator

GAMMA = 0.99
PLAIN = Estimator(baseline="none", returns="reward_to_go", gamma=GAMMA, aggregation="sequence_mean")
NORMALISED = replace(PLAIN, returns="episode_normalized", scale_eps=1e-8)
KINDS = {
    "normalised": NORMALISED,
    "normalised, V": replace(NORMALISED, baseline="value"),
    "raw": PLAIN,
    "raw, V": replace(PLAIN, baseline="value"),
}
# Okabe and Ito
COLOURS = dict(zip(KINDS, ("#D55E00", "#E69F00", "#0072B2", "#009E73"), strict=True))


def returns_of(name: str, seeds: int, **settings: Any) -> np.ndarray:
    """Train once per seed; returns the returns of the episodes, [seeds, episodes]."""
    returns = []
    for seed in range(seeds):
        _, metrics = trained(
            Path("runs/control_4_walk")
            / settings["env"]
            / name.replace(", ", "_")
            / f"seed_{seed}",
            estimator=KINDS[name],
            hidden=(128, 128),
            value_network="shared",
            time_limits="end",
            value_coef=1.0,  # of half the squared error, which is 0.5 of the squared error
            max_grad_norm=0.5,
            num_envs=1,
            learning_rate=3e-4,
            seed=seed,
            **settings,
        )
        returns.append(metrics["reward"])
    return np.array(returns)


def draw(runs: dict[str, np.ndarray], last: dict[str, np.ndarray]) -> Figure:
    """Draw the learning curves, and the end of each seed with the mean of its kind beside them."""
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, returns in runs.items():
        draw_rolling(left, returns, 20, COLOURS[name], name)
    left.set(xlabel="episodes (rolling mean of 20)", ylabel="return of an episode")
    left.legend(loc="lower right", frameon=False, ncol=2)
    for i, (name, values) in enumerate(last.items()):
        right.plot(np.full(len(values), i - 0.1), values, "o", color=COLOURS[name], alpha=0.5)
        draw_mean(right, i + 0.15, values, COLOURS[name], "s")
    right.set_xticks(range(len(last)), last)
    right.set_ylabel("mean return of the last 100 episodes, by seed")
    return figure


def main(
    env: Literal["walk", "costly_walk"] = "walk",
    seeds: int = 10,
    episodes: int = 400,
    initial_weights: Literal["orthogonal", "uniform"] = "uniform",
    output: Path = Path("walk.png"),
) -> None:
    """Learn the walk in four ways.

    Args:
        env: Whether a step pays 0.01 or costs it.
        seeds: Runs of each kind.
        episodes: Episodes of a run, one an update.
        initial_weights: Uniform are PyTorch's own.
        output: Where the figure goes.
    """
    print(f"{env}: mean returns over {seeds} seeds [95 % interval], last 100 episodes")
    runs: dict[str, np.ndarray] = {}
    last: dict[str, np.ndarray] = {}
    settings = {"env": env, "initial_weights": initial_weights, "max_steps": episodes}
    for name in KINDS:
        runs[name] = returns_of(name, seeds, **settings)
        each = last[name] = runs[name][:, -100:].mean(1)
        print(f"{name:14} last {mean_with_interval(each)}", flush=True)
    pairs = (("normalised, V", "normalised"), ("raw, V", "raw"), ("raw, V", "normalised, V"))
    for a, b in pairs:
        print(f"{a} minus {b}, seed by seed: {mean_with_interval(last[a] - last[b])}")
    save(draw(runs, last), output)


if __name__ == "__main__":
    tyro.cli(main)
