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

import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from curves import interval, open_frame
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

import tokenrl
from tokenrl import Estimator
from tokenrl.runs import read_metrics

VARIANTS = {"with": Estimator.preset("rloo"), "without": Estimator.preset("reinforce")}
COLOURS = {"with": "#0072B2", "without": "#D55E00"}  # Okabe and Ito
LABELS = {"with": "with a baseline (rloo)", "without": "without (reinforce)"}
TASK = "sort_digits"
GENERATIONS = 8


@dataclass(frozen=True)
class Arguments:
    """Train an agent and a language model with one estimator, with and without a baseline."""

    output: Path = Path("contrast.png")
    """Where the figure goes."""
    output_dir: Path = Path("runs/control_contrast")
    """Directory of the runs; earlier runs in it are replaced."""
    env: str = "CartPole-v1"
    """Gymnasium id."""
    seeds: int = 3
    """Runs of each kind."""
    updates: int = 40
    """Updates of the agent."""
    episodes: int = 64
    """Episodes per update; all start alike, so they are one group."""
    steps: int = 60
    """Updates of the language model."""
    prompts: int = 16
    """Prompts per update of the language model, with 8 completions each, which are a group."""
    bins: int = 5
    """Points of each curve of squared norms."""


class Point(NamedTuple):
    """Updates with similar rewards: mean reward, mean squared norm of the gradient, and its interval."""

    reward: float
    square: float
    low: float
    high: float


@dataclass
class Side:
    """The runs of the agent or of the model, with and without a baseline."""

    name: str
    unit: str
    length: str  # the metric that holds the mean T
    facts: dict[str, str]
    updates: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)
    """Metrics by variant, seed, update."""
    final: dict[str, list[float]] = field(default_factory=dict)
    """Reward of fresh episodes or held-out prompts, by variant, seed."""

    def add(self, variant: str, result: Any) -> None:
        """Add the metrics of a finished run."""
        metrics = read_metrics(result.output_dir / "metrics.jsonl")[1:]
        self.updates.setdefault(variant, []).append(metrics)
        self.final.setdefault(variant, []).append(result.eval_after["reward"])

    def pooled(self, variant: str) -> list[dict[str, Any]]:
        """Return the metrics of all updates of a variant."""
        return list(chain.from_iterable(self.updates[variant]))

    def lengths(self) -> str:
        """Return the mean length of the rows in the first and in the last update."""
        runs = self.updates["with"] + self.updates["without"]
        first, last = (mean(run[i][self.length] for run in runs) for i in (0, -1))
        return f"{first:.1f} at first, {last:.1f} at last"

    def points(self, bins: int) -> dict[str, dict[int, Point]]:
        """Return the squared norms of each variant at equal rewards, by variant and bin.

        How noisy a gradient is depends on how good the policy is, and the variants learn at different speeds:
        so they are compared at equal rewards. The bins hold equally many updates, of all variants together.
        """
        rewards = [row["reward"] for variant in VARIANTS for row in self.pooled(variant)]
        edges = np.quantile(rewards, np.linspace(0, 1, bins + 1)[1:-1])
        points: dict[str, dict[int, Point]] = {variant: {} for variant in VARIANTS}
        for variant in VARIANTS:
            members: dict[int, list[dict[str, Any]]] = {}
            for row in self.pooled(variant):
                members.setdefault(int(np.digitize(row["reward"], edges)), []).append(row)
            for index, rows in sorted(members.items()):
                squares = interval([row["grad_norm"] ** 2 for row in rows]).tolist()
                points[variant][index] = Point(mean(row["reward"] for row in rows), *squares)
        return points


def train_both(arguments: Arguments, variant: str, seed: int) -> tuple[Any, Any]:
    """Train the agent and the language model with the same object; returns the two results."""
    common: dict[str, Any] = {"estimator": VARIANTS[variant], "seed": seed, "eval_every": 0}
    common |= {"overwrite": True, "quiet": True}
    folder = arguments.output_dir / f"{variant}-seed{seed}"
    agent = tokenrl.train_agent(
        env=arguments.env,
        num_envs=arguments.episodes,
        max_steps=arguments.updates,
        learning_rate=1e-2,
        output_dir=str(folder / "control"),
        **common,
    )
    model = tokenrl.train(
        task=TASK,
        prompts_per_step=arguments.prompts,
        num_generations=GENERATIONS,
        max_steps=arguments.steps,
        output_dir=str(folder / "language"),
        **common,
    )
    return agent, model


def train_all(arguments: Arguments) -> list[Side]:
    """Train every variant with every seed; returns the agents and the models."""
    agents = Side(
        arguments.env,
        "episode",
        "episode_length",
        {
            "N": f"{arguments.episodes} episodes",
            "compared with": "all others",
            "reward": "after every action",
        },
    )
    models = Side(
        TASK,
        "completion",
        "completions/mean_length",
        {
            "N": f"{arguments.prompts * GENERATIONS} completions",
            "compared with": f"the other {GENERATIONS - 1} of the prompt",
            "reward": "once, at the end",
        },
    )
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            agent, model = train_both(arguments, variant, seed)
            agents.add(variant, agent)
            models.add(variant, model)
            rewards = f"{agent.eval_after['reward']:.4g} and {model.eval_after['reward']:.4g}"
            print(f"seed {seed}, {variant} baseline: reward {rewards}")
    return [agents, models]


def ratio(points: dict[str, dict[int, Point]]) -> float:
    """Return the squared norm without the baseline over that with it: the median over the bins of both."""
    bins = [b for b in points["without"] if b in points["with"] and points["with"][b].square > 0]
    ratios = [points["without"][b].square / points["with"][b].square for b in bins]
    return median(ratios) if ratios else math.nan


def print_table(sides: list[Side], bins: int) -> None:
    def line(label: str, cells: list[str]) -> None:
        print(f"{label:30}" + "".join(f"{cell:>36}" for cell in cells))

    print()
    line("", [side.name for side in sides])
    for fact in sides[0].facts:
        line(fact, [side.facts[fact] for side in sides])
    line("T", [side.lengths() for side in sides])
    for variant in VARIANTS:
        ends = [side.final[variant] for side in sides]
        cells = [f"{mean(end):.4g} ({min(end):.4g} to {max(end):.4g})" for end in ends]
        line(f"reward after, {variant}", cells)
    ratios = [ratio(side.points(bins)) for side in sides]
    line("|g|², without / with", [f"{x:.2f} (median, at equal reward)" for x in ratios])
    for side in sides:
        print(f"\n{side.name}: mean |g|² of an update (95 % interval), by mean reward")
        for variant, points in side.points(bins).items():
            for reward, square, low, high in points.values():
                print(
                    f"  {reward:8.3f} {variant:>8} baseline {square:12.5g} ({low:.5g} to {high:.5g})"
                )


def draw_rewards(axes: Axes, side: Side) -> None:
    for variant, runs in side.updates.items():
        rewards = np.array([[row["reward"] for row in run] for run in runs])
        updates = range(1, rewards.shape[1] + 1)
        axes.plot(updates, rewards.T, color=COLOURS[variant], alpha=0.3, linewidth=1)
        axes.plot(updates, rewards.mean(0), color=COLOURS[variant], linewidth=2.4)
    axes.set(ylim=(0, None), xlabel="update", ylabel=f"mean reward of the update's {side.unit}s")
    title = f"{side.name}: {side.facts['N']} per update, reward {side.facts['reward']}"
    axes.set_title(title, loc="left", fontsize=11)


def draw_norms(axes: Axes, side: Side, bins: int) -> None:
    for variant, points in side.points(bins).items():
        rewards, squares, low, high = np.array(list(points.values())).T
        axes.plot(rewards, squares, "o-", color=COLOURS[variant], linewidth=2.2, markersize=7)
        axes.vlines(rewards, low, high, color=COLOURS[variant], alpha=0.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    axes.set_xlabel(f"mean reward of the update's {side.unit}s")
    axes.set_ylabel("mean |g|² ((reward per unit of weight)²)")
    axes.set_title(f"{side.name}: the gradient at equal rewards", loc="left", fontsize=11)


def draw(sides: list[Side], bins: int) -> Figure:
    figure = Figure(figsize=(12, 8.5), dpi=100, layout="constrained")
    grid = figure.subplots(2, 2)
    for side, (above, below) in zip(sides, grid.T, strict=True):
        draw_rewards(above, side)
        draw_norms(below, side, bins)
    open_frame(*grid.flat)
    corner = grid[0][1]
    for height, (variant, label) in zip((0.2, 0.12), LABELS.items(), strict=True):
        corner.text(
            0.98, height, label, transform=corner.transAxes, ha="right", color=COLOURS[variant]
        )
    ratios = [f"{ratio(side.points(bins)):.2g} times as large on {side.name}" for side in sides]
    title = f"Without the baseline |g|² is {' and '.join(ratios)}"
    figure.suptitle(title, x=0.01, ha="left")
    note = "thin lines: seeds; bars: 95 % of a bootstrap over updates"
    figure.supxlabel(note, fontsize=9, color="#555555")
    return figure


def main(arguments: Arguments) -> None:
    torch.set_num_threads(1)  # networks so small gain nothing from more
    sides = train_all(arguments)
    print_table(sides, arguments.bins)
    draw(sides, arguments.bins).savefig(arguments.output)
    print(f"figure: {arguments.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
