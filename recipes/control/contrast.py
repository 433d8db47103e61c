"""Trains CartPole and a language model with the same estimator object, and compares their gradient noise.

An episode is a completion, an action is a token. Both trainers lay them out as N rows of T actions and ask
one `Estimator` for advantages and loss; it does not know which of them asks. Here one object with a baseline
(RLOO, the mean return of the other rows of the group) trains both, and so does one without (REINFORCE), with
a few seeds each. The noise of each update's gradient is measured during training. Both are exact, so at equal
policies their gradients differ by noise alone.

Look for: CartPole has a reward of 1 for every step, so all returns are positive, and without a baseline every
action is reinforced, only to different degrees: the noise is four times as large with short episodes, and
hundreds of times with long ones. In the language task, with rewards of 1 and 0, wrong answers have reward 0
and the larger score norms, so the best constant is nearer to 0 than to the mean: here the baseline even adds
noise. With rewards of 2 and 1 (`ladder.py vanilla --shift 1`) the baseline is needed here too.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import math
from dataclasses import dataclass
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
TASK, GENERATIONS = "sort_digits", 8


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
    """Points of each curve of noise."""


class Point(NamedTuple):
    """Updates with similar rewards: mean reward, mean noise of the gradient, and its interval."""

    reward: float
    noise: float
    low: float
    high: float


Curves = dict[str, dict[int, Point]]  # by variant and bin


class Side(NamedTuple):
    """One of the two sides: facts about it, and its runs with and without a baseline."""

    name: str
    unit: str
    rows: int
    facts: dict[str, str]
    updates: dict[str, list[list[dict[str, Any]]]]  # metrics by variant, seed, update
    after: dict[str, list[float]]  # reward of fresh episodes or held-out prompts, by variant, seed


def train_both(arguments: Arguments, name: str, estimator: Estimator, seed: int) -> tuple[Any, Any]:
    """Train the agent and the language model with the same object; returns the two results."""
    common: dict[str, Any] = {
        "estimator": estimator,
        "seed": seed,
        "eval_every": 0,
        "diagnostics_every": 1,
    }
    common |= {"overwrite": True, "quiet": True}
    folder = arguments.output_dir / f"{name}-seed{seed}"
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


def noise_of(update: dict[str, Any]) -> float:
    """Give tr Var(g) of an update, from |g|^2 = signal + noise and the logged ratio of the two."""
    ratio = update.get("gradient/snr")  # none where no two rows differed: no gradient, no noise
    return 0.0 if ratio is None else update["grad_norm"] ** 2 / max(1 + ratio, 1e-6)


def train_all(arguments: Arguments) -> tuple[list[Any], list[Any]]:
    """Train every variant with every seed; returns the results of the agents and of the models, in order."""
    results = []
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            pair = train_both(arguments, variant, VARIANTS[variant], seed)
            results.append(pair)
            rewards = [f"{result.eval_after['reward']:.4g}" for result in pair]
            print(f"seed {seed}, {variant} baseline: reward {' and '.join(rewards)}")
    agents, models = zip(*results, strict=True)
    return list(agents), list(models)


def side(
    name: str, unit: str, rows: int, length: str, facts: dict[str, str], results: list[Any]
) -> Side:
    updates: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in VARIANTS}
    after: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for variant, result in zip([*VARIANTS] * (len(results) // len(VARIANTS)), results, strict=True):
        updates[variant].append(read_metrics(result.output_dir / "metrics.jsonl")[1:])
        after[variant].append(result.eval_after["reward"])
    first, last = (
        mean(run[i][length] for runs in updates.values() for run in runs) for i in (0, -1)
    )
    facts = {"N": f"{rows} {unit}s", **facts, "T": f"{first:.1f} at first, {last:.1f} at last"}
    return Side(name, unit, rows, facts, updates, after)


def sides(arguments: Arguments, agents: list[Any], models: list[Any]) -> list[Side]:
    facts = {"compared with": "all others", "reward": "after every action"}
    other_facts = {
        "compared with": f"the other {GENERATIONS - 1} of the prompt",
        "reward": "once, at the end",
    }
    rows = arguments.prompts * GENERATIONS
    return [
        side(arguments.env, "episode", arguments.episodes, "episode_length", facts, agents),
        side(TASK, "completion", rows, "completions/mean_length", other_facts, models),
    ]


def curves(one: Side, bins: int) -> Curves:
    """Return the noise of each variant at equal rewards.

    How noisy a gradient is depends on how good the policy is, and the variants learn at different speeds: so
    they are compared at equal rewards. The bins hold equally many updates, of all variants together.
    """
    pooled = {
        variant: [row for run in runs for row in run] for variant, runs in one.updates.items()
    }
    rewards = [row["reward"] for rows in pooled.values() for row in rows]
    edges = np.quantile(rewards, np.linspace(0, 1, bins + 1)[1:-1])
    found: Curves = {variant: {} for variant in VARIANTS}
    for variant, rows in pooled.items():
        place = np.digitize([row["reward"] for row in rows], edges).tolist()
        for b in sorted(set(place)):
            part = [row for row, at in zip(rows, place, strict=True) if at == b]
            noises = [noise_of(row) for row in part]
            found[variant][b] = Point(
                mean(row["reward"] for row in part), *interval(noises).tolist()
            )
    return found


def times(curve: Curves) -> float:
    """Return how many times larger the noise is without the baseline: the median over bins that have both."""
    without, having = curve["without"], curve["with"]
    ratios = [
        without[b].noise / having[b].noise for b in without if b in having and having[b].noise > 0
    ]
    return median(ratios) if ratios else math.nan


def print_table(both: list[Side], found: list[Curves]) -> None:
    def line(label: str, cells: list[str]) -> None:
        print(f"{label:30}" + "".join(f"{cell:>36}" for cell in cells))

    print()
    line("", [one.name for one in both])
    for fact in both[0].facts:
        line(fact, [one.facts[fact] for one in both])
    for variant in VARIANTS:
        ends = [one.after[variant] for one in both]
        cells = [f"{mean(end):.4g} ({min(end):.4g} to {max(end):.4g})" for end in ends]
        line(f"reward after, {variant}", cells)
    for variant in VARIANTS:
        rows = [[row for run in one.updates[variant] for row in run] for one in both]
        ratios = [
            [r["gradient/snr"] for r in side if r.get("gradient/snr") is not None] for side in rows
        ]
        line(
            f"median signal/noise, {variant}",
            [f"{median(ratio or [math.nan]):.2f}" for ratio in ratios],
        )
    line(
        "noise, without / with",
        [f"{times(curve):.2f} (median, at equal reward)" for curve in found],
    )
    for one, curve in zip(both, found, strict=True):
        print(f"\n{one.name}: noise tr Var(g) of an update (95 % interval), by mean reward")
        for variant in VARIANTS:
            for reward, noise, low, high in curve[variant].values():
                print(
                    f"  {reward:8.3f} {variant:>8} baseline {noise:12.5g} ({low:.5g} to {high:.5g})"
                )


def draw_rewards(axes: Axes, one: Side) -> None:
    for variant, runs in one.updates.items():
        color = COLOURS[variant]
        lines = [[row["reward"] for row in run] for run in runs]
        for line in lines:
            axes.plot(range(1, len(line) + 1), line, color=color, alpha=0.3, linewidth=1)
        middle = [mean(rewards) for rewards in zip(*lines, strict=False)]
        axes.plot(range(1, len(middle) + 1), middle, color=color, linewidth=2.4)
    axes.set_ylim(0)
    axes.set_xlabel("update")
    axes.set_ylabel(f"mean reward of the update's {one.unit}s")
    when = one.facts["reward"]
    axes.set_title(
        f"{one.name}: {one.facts['N']} per update, reward {when}", loc="left", fontsize=11
    )


def draw_noise(axes: Axes, one: Side, curve: Curves) -> None:
    for variant, points in curve.items():
        rewards, noise, low, high = np.array(list(points.values())).T
        axes.plot(rewards, noise, "o-", color=COLOURS[variant], linewidth=2.2, markersize=7)
        axes.vlines(rewards, low, high, color=COLOURS[variant], alpha=0.6)
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(LogFormatter(minor_thresholds=(2, 0.4)))
    axes.set_xlabel(f"mean reward of the update's {one.unit}s")
    axes.set_ylabel("noise tr Var(g) ((reward per unit of weight)²)")
    axes.set_title(f"{one.name}: noise of the gradient at equal rewards", loc="left", fontsize=11)


def draw(both: list[Side], found: list[Curves]) -> Figure:
    figure = Figure(figsize=(12, 8.5), dpi=100, layout="constrained")
    grid = figure.subplots(2, 2)
    for column, (one, curve) in enumerate(zip(both, found, strict=True)):
        draw_rewards(grid[0][column], one)
        draw_noise(grid[1][column], one, curve)
    open_frame(*grid.flat)
    names = {"with": "with a baseline (rloo)", "without": "without (reinforce)"}
    for line, variant in enumerate(VARIANTS):
        place = {"transform": grid[0][1].transAxes, "ha": "right", "color": COLOURS[variant]}
        grid[0][1].text(0.98, 0.2 - 0.08 * line, names[variant], **place)
    gains = [
        f"{times(curve):.2g} times the noise on {one.name}"
        for one, curve in zip(both, found, strict=True)
    ]
    title = f"Without the baseline the gradient has {gains[0]}, {gains[1]}"
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(
        "thin lines: seeds; bars: 95 % of a bootstrap over updates", fontsize=9, color="#555555"
    )
    return figure


def main(arguments: Arguments) -> None:
    torch.set_num_threads(1)  # networks so small gain nothing from more
    both = sides(arguments, *train_all(arguments))
    found = [curves(one, arguments.bins) for one in both]
    print_table(both, found)
    draw(both, found).savefig(arguments.output)
    print(f"figure: {arguments.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
