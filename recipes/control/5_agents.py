"""The classic agent of textbooks beside agents tuned for the environment, over seeds.

    python recipes/control/5_agents.py                              # all three environments
    python recipes/control/5_agents.py --env Pendulum-v1 --agent tuned --seeds 3
    tokenrl control --agent classic --env Acrobot-v1                # one such run by the command line

`classic` has one hidden layer of 16 ReLU units, Adam at 0.01 and one episode an update; the returns to go of
each episode (gamma 0.99) are shifted and scaled to mean 0 and standard deviation 1 over its own steps.
`tuned` has settings for each environment. Both are in tokenrl/control/agents.yaml, where comments say what
each choice is for. Every trained policy is judged by fresh episodes with sampled actions.

Look for: the spread of the classic agent over seeds, since nothing bounds its steps, and an episode is only
compared with itself. The initial weights are not what decides: with PyTorch's own instead of orthogonal ones
the classic agent ended at 445 on CartPole (ten seeds), and on Acrobot two of four seeds stayed at -500. All
other numbers are on the page of `tokenrl control`, recipes/pages/reference/control.md.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[control,box2d]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import tyro
from curves import draw_band, draw_mean, mean_with_interval, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl import train_agent
from tokenrl.control import agent_settings, describe
from tokenrl.runs import smooth

COLOURS = {"classic": "#D55E00", "tuned": "#0072B2"}  # Okabe and Ito
SMOOTHED = 20  # episodes, at least, in each value of a learning curve
FRESH = 100  # episodes that a trained policy is judged by


def train(env: str, agent: str, seed: int, max_steps: int | None) -> dict[str, Any]:
    """Train one agent; returns what the table and the figure need. A signal ends the program."""
    settings = agent_settings(agent, env) | {"seed": seed, "eval_episodes": FRESH}
    settings["eval_every"] = 0  # only before and after training
    settings |= {} if max_steps is None else {"max_steps": max_steps}
    folder = Path("runs/agents") / f"{env}-{agent}-seed{seed}"
    result = train_agent(**settings, output_dir=str(folder), overwrite=True, quiet=True)
    if result.exit_code:
        raise SystemExit(result.exit_code)
    print(f"{env}, {agent}, seed {seed}: {result.verdict}", flush=True)
    updates = pd.DataFrame(result.metrics[1:])
    return {
        "env": env,
        "agent": agent,
        "reward": result.eval_after["reward"],
        "solved": result.solved is True,
        "episodes": updates["episodes"].sum(),
        "steps": result.env_steps,
        "cpu": result.train_cpu_seconds,
        "updates": updates[updates["episodes"] > 0],
    }


def print_table(runs: pd.DataFrame) -> None:
    """Print the results of each agent in each environment."""
    for (env, agent), group in runs.groupby(["env", "agent"], sort=False):
        threshold = describe(env).solved
        score = ""
        if threshold is not None:
            score = f", {group['solved'].sum()} of {len(group)} seeds reach {threshold:g}"
        print(f"\n{env}, {agent}: {' '.join(f'{end:.1f}' for end in group['reward'])}")
        print(f"  mean {mean_with_interval(group['reward'], '.1f')}{score}")
        episodes, steps, cpu = group[["episodes", "steps", "cpu"]].mean()
        print(
            f"  {episodes:,.0f} episodes, {steps:,.0f} environment steps, {cpu:.1f} CPU s of training"
        )


def draw_agent(axes: Axes, agent: str, runs: pd.DataFrame) -> None:
    """Draw the mean learning curve, and the fresh episodes. A run that has ended keeps its last value."""
    curves = []
    for rows in runs["updates"]:
        if len(rows):
            window = 2 * round(SMOOTHED / 2 / rows["episodes"].mean()) + 1
            curves.append((rows["num_env_steps"], smooth(rows["reward"].tolist(), window)))
    if curves:
        start, end = (max(x.iloc[i] for x, _ in curves) for i in (0, -1))
        points = np.geomspace(start, end, 200)
        returns = np.array([np.interp(points, x, y) for x, y in curves])
        draw_band(axes, points, returns, COLOURS[agent], agent)
    draw_mean(axes, runs["steps"].mean(), runs["reward"], COLOURS[agent])


def draw(runs: pd.DataFrame) -> Figure:
    """Draw the learning curves of each environment, by environment steps."""
    groups = runs.groupby("env", sort=False)
    figure = Figure(figsize=(3.2 + 2.9 * len(groups), 4), dpi=90, layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for (env, rows), axes in zip(groups, panels, strict=True):
        for agent, group in rows.groupby("agent"):
            draw_agent(axes, agent, group)
        threshold = describe(env).solved
        if threshold is not None:
            axes.axhline(threshold, color="#555555", linestyle=":", linewidth=1.5)
        axes.set(xscale="log", xlabel="environment steps", ylabel="return")
        axes.set_title(env, loc="left", fontsize=11)
        axes.legend(frameon=False)
    note = f"lines: return in training, over {SMOOTHED} episodes or more; bands, bars: 95 %"
    figure.supxlabel(f"{note}; dots: fresh episodes; dotted: threshold", fontsize=9)
    return figure


def main(
    env: tuple[str, ...] = ("CartPole-v1", "Acrobot-v1", "LunarLander-v3"),
    agent: tuple[Literal["classic", "tuned"], ...] = ("classic", "tuned"),
    seeds: tuple[int, ...] = (10, 10, 5),
    max_steps: int | None = None,
    output: Path = Path("agents.png"),
) -> None:
    """Train agents by name on environments, over seeds, and draw how they learn.

    Args:
        env: Environments.
        agent: Agents. The classic agent gets a Gaussian head where actions are continuous.
        seeds: Number of seeds of each environment; the last number counts for all further ones.
        max_steps: Updates. Default: those of the agent.
        output: Where the figure goes.
    """
    runs = []
    for number, name in enumerate(env):
        count = seeds[min(number, len(seeds) - 1)]
        for seed, kind in product(range(count), agent):
            runs.append(train(name, kind, seed, max_steps))
    table = pd.DataFrame(runs)
    print_table(table)
    save(draw(table), output)


if __name__ == "__main__":
    tyro.cli(main)
