"""Trains CartPole and a language model with the same estimator object, and compares their gradients.

An episode is a completion, an action is a token. Both trainers lay them out as N rows of T actions and ask
one `Estimator` for advantages and loss; it does not know which of them asks. Here one object with a baseline
(RLOO, the mean return of the other rows of the group) trains both, and so does one without (REINFORCE), with
a few seeds each. Both are exact: at equal policies their gradients have the same mean, and a larger mean
square of the gradient's norm, E|g|^2 = |E g|^2 + tr Var(g), is noise.

Look for: CartPole has a reward of 1 for every step, so all returns are positive, and without a baseline every
action is reinforced, only to different degrees. At equal rewards the mean of |g|^2 is then two to six times
as large, and hundreds of times where most episodes last all 500 steps. In the language task, with rewards of
1 and 0, wrong answers have reward 0 and the larger score norms, so the best constant is nearer to 0 than to
the mean: here the baseline adds noise, and without it |g|^2 is about half. With rewards of 2 and 1
(`ladder.py vanilla --shift 1`) the baseline is needed here too.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import tyro
from curves import interval, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import tokenrl
from tokenrl import Estimator
from tokenrl.runs import read_metrics

VARIANTS = {"with": Estimator.preset("rloo"), "without": Estimator.preset("reinforce")}
COLOURS = {"with": "#0072B2", "without": "#D55E00"}  # Okabe and Ito
LABELS = {"with": "with a baseline (rloo)", "without": "without (reinforce)"}
ENV, TASK = "CartPole-v1", "sort_digits"
BINS = 5  # points of each curve of squared norms


@dataclass
class Side:
    """The runs of the agent or of the model, with and without a baseline."""

    name: str
    unit: str
    updates: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)
    """Metrics by variant, seed, update."""
    final: dict[str, list[float]] = field(default_factory=dict)
    """Reward of fresh episodes or held-out prompts, by variant, seed."""

    def add(self, variant: str, result: Any) -> None:
        """Add the metrics of a finished run."""
        metrics = read_metrics(result.output_dir / "metrics.jsonl")[1:]
        self.updates.setdefault(variant, []).append(metrics)
        self.final.setdefault(variant, []).append(result.eval_after["reward"])

    def points(self) -> dict[str, np.ndarray]:
        """Return by variant the mean reward of updates, their mean squared norm and its interval, [4, BINS].

        How noisy a gradient is depends on how good the policy is, and the variants learn at different speeds:
        so they are compared at equal rewards. The bins hold equally many updates, of all variants together;
        where one has none, the numbers are nan.
        """
        rows = {variant: list(chain.from_iterable(runs)) for variant, runs in self.updates.items()}
        rewards = [row["reward"] for of_variant in rows.values() for row in of_variant]
        edges = np.quantile(rewards, np.linspace(0, 1, BINS + 1)[1:-1])
        points = {variant: np.full((4, BINS), np.nan) for variant in rows}
        for variant, of_variant in rows.items():
            reward = np.array([row["reward"] for row in of_variant])
            square = np.array([row["grad_norm"] ** 2 for row in of_variant])
            places = np.digitize(reward, edges)
            for index in set(places):
                members = places == index
                points[variant][:, index] = reward[members].mean(), *interval(square[members])
        return points

    def ratio(self) -> float:
        """Return the squared norm without the baseline over that with it: the median over the bins of both."""
        points = self.points()
        return float(np.nanmedian(points["without"][1] / points["with"][1]))


def train_both(variant: str, seed: int, updates: int, steps: int) -> tuple[Any, Any]:
    """Train the agent and the language model with the same object; returns the two results."""
    common: dict[str, Any] = {"estimator": VARIANTS[variant], "seed": seed, "eval_every": 0}
    common |= {"overwrite": True, "quiet": True}
    folder = Path("runs/control_contrast") / f"{variant}-seed{seed}"
    agent = tokenrl.train_agent(
        env=ENV,
        num_envs=64,  # episodes of an update; all start alike, so they are one group
        max_steps=updates,
        learning_rate=1e-2,
        output_dir=str(folder / "control"),
        **common,
    )
    model = tokenrl.train(
        task=TASK,
        prompts_per_step=16,
        num_generations=8,
        max_steps=steps,
        output_dir=str(folder / "language"),
        **common,
    )
    return agent, model


def print_table(sides: list[Side]) -> None:
    for side in sides:
        print(
            f"\n{side.name}: |g|² without / with the baseline, at equal reward: {side.ratio():.2f}"
        )
        for variant, ends in side.final.items():
            print(
                f"  reward after, {variant}: {mean(ends):.4g} ({min(ends):.4g} to {max(ends):.4g})"
            )


def draw_rewards(axes: Axes, side: Side) -> None:
    for variant, runs in side.updates.items():
        rewards = np.array([[row["reward"] for row in run] for run in runs])
        updates = range(1, rewards.shape[1] + 1)
        axes.plot(updates, rewards.T, color=COLOURS[variant], alpha=0.3, linewidth=1)
        axes.plot(updates, rewards.mean(0), color=COLOURS[variant], linewidth=2.4)
    axes.set(ylim=(0, None), xlabel="update", ylabel=f"mean reward of the update's {side.unit}s")
    axes.set_title(side.name, loc="left", fontsize=11)


def draw_norms(axes: Axes, side: Side) -> None:
    for variant, points in side.points().items():
        rewards, squares, low, high = points
        axes.plot(rewards, squares, "o-", color=COLOURS[variant], linewidth=2.2, markersize=7)
        axes.vlines(rewards, low, high, color=COLOURS[variant], alpha=0.6)
    axes.set_yscale("log")
    axes.set_xlabel(f"mean reward of the update's {side.unit}s")
    axes.set_ylabel("mean |g|² ((reward per unit of weight)²)")
    axes.set_title(f"{side.name}: the gradient at equal rewards", loc="left", fontsize=11)


def draw(sides: list[Side]) -> Figure:
    figure = Figure(figsize=(12, 8.5), dpi=100, layout="constrained")
    grid = figure.subplots(2, 2)
    for side, (above, below) in zip(sides, grid.T, strict=True):
        draw_rewards(above, side)
        draw_norms(below, side)
    handles = [Line2D([], [], color=COLOURS[variant]) for variant in VARIANTS]
    grid[0][1].legend(handles, LABELS.values(), frameon=False, loc="lower right")
    ratios = [f"{side.ratio():.2g} times as large on {side.name}" for side in sides]
    title = f"Without the baseline |g|² is {' and '.join(ratios)}"
    figure.suptitle(title, x=0.01, ha="left")
    note = "thin lines: seeds; bars: 95 % of a bootstrap over updates"
    figure.supxlabel(note, fontsize=9, color="#555555")
    return figure


def main(
    seeds: int = 3, updates: int = 40, steps: int = 60, output: Path = Path("contrast.png")
) -> None:
    """Train an agent and a language model with one estimator, with and without a baseline.

    Args:
        seeds: Runs of each kind.
        updates: Updates of the agent.
        steps: Updates of the language model.
        output: Where the figure goes.
    """
    torch.set_num_threads(1)  # networks so small gain nothing from more
    agents, models = Side(ENV, "episode"), Side(TASK, "completion")
    for seed in range(seeds):
        for variant in VARIANTS:
            agent, model = train_both(variant, seed, updates, steps)
            agents.add(variant, agent)
            models.add(variant, model)
            rewards = f"{agent.eval_after['reward']:.4g} and {model.eval_after['reward']:.4g}"
            print(f"seed {seed}, {variant} baseline: reward {rewards}")
    print_table([agents, models])
    save(draw([agents, models]), output)


if __name__ == "__main__":
    tyro.cli(main)
