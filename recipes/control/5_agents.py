"""The classic agent of textbooks beside agents tuned for the environment, over seeds.

    python recipes/control/5_agents.py                              # all three environments
    python recipes/control/5_agents.py --env Pendulum-v1 --agent tuned --seeds 3
    tokenrl control --agent classic --env Acrobot-v1                # one such run by the command line

`classic` has one hidden layer of 16 ReLU units, Adam at 0.01 and one episode an update; the returns to go of
each episode (gamma 0.99) are shifted and scaled to mean 0 and standard deviation 1 over its own steps.
`tuned` has settings for each environment. Both are in tokenrl/control/arguments.py, where comments say what
each choice is for. Every trained policy is judged by fresh episodes with sampled actions.

Look for: the spread of the classic agent over seeds, since nothing bounds its steps, and an episode is only
compared with itself. The initial weights are not what decides: with PyTorch's own instead of orthogonal ones
the classic agent ended at 445 on CartPole (ten seeds), and on Acrobot two of four seeds stayed at -500. All
other numbers are on the page of `tokenrl control`, recipes/pages/reference/control.md.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[control]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from curves import draw_band, draw_mean, mean_with_interval, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl import train_agent
from tokenrl.control import agent_settings, describe
from tokenrl.runs import read_metrics, smooth

COLOURS = {"classic": "#D55E00", "tuned": "#0072B2"}  # Okabe and Ito
SMOOTHED = 20  # episodes, at least, in each value of a learning curve
FRESH = 100  # episodes that a trained policy is judged by


class Run(NamedTuple):
    """A finished run: what it was, its summary.json, and the rows of its updates in metrics.jsonl."""

    env: str
    agent: str
    seed: int
    summary: dict[str, Any]
    updates: list[dict[str, Any]]

    def __str__(self) -> str:
        after = self.summary["eval_after"]
        steps = self.summary["env_steps"]
        reward = f"{after['reward']:.1f} ± {after['reward_stderr']:.1f}"
        best = f"with the best actions {after['reward_greedy']:.1f}"
        return f"{self.env}, {self.agent}, seed {self.seed}: {reward}, {best}; {steps:,} environment steps"


def train(env: str, agent: str, seed: int, max_steps: int | None) -> Run:
    """Train one agent; a signal raises KeyboardInterrupt or SystemExit."""
    settings = agent_settings(agent, env) | {"seed": seed, "eval_episodes": FRESH}
    settings["eval_every"] = 0  # only before and after training
    settings |= {} if max_steps is None else {"max_steps": max_steps}
    folder = Path("runs/agents") / f"{env}-{agent}-seed{seed}"
    result = train_agent(**settings, output_dir=str(folder), overwrite=True, quiet=True)
    if result.exit_code:
        raise SystemExit(result.exit_code)
    summary = json.loads((folder / "summary.json").read_text())
    return Run(env, agent, seed, summary, read_metrics(folder / "metrics.jsonl")[1:])


Groups = dict[tuple[str, str], list[Run]]  # by environment and agent


def ends(runs: list[Run]) -> np.ndarray:
    """Return the mean return of the fresh episodes of each run, [S]."""
    return np.array([run.summary["eval_after"]["reward"] for run in runs])


def print_table(groups: Groups) -> None:
    for (env, agent), runs in groups.items():
        threshold = runs[0].summary["threshold"]
        solved = sum(run.summary["solved"] is True for run in runs)
        score = f", {solved} of {len(runs)} seeds reach {threshold:g}" if threshold else ""
        steps, cpu = (
            np.mean([run.summary[name] for run in runs])
            for name in ("env_steps", "train_cpu_seconds")
        )
        episodes = np.mean([played(run) for run in runs])
        print(f"\n{env}, {agent}: {' '.join(f'{end:.1f}' for end in ends(runs))}")
        print(f"  mean {mean_with_interval(ends(runs), '.1f')}{score}")
        print(
            f"  {episodes:,.0f} episodes, {steps:,.0f} environment steps, {cpu:.1f} CPU s of training"
        )


def played(run: Run) -> int:
    """Return the number of episodes that ended in training."""
    return sum(row["episodes"] for row in run.updates)


def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return environment steps so far, and the mean return of at least `SMOOTHED` episodes around there."""
    rows = [row for row in run.updates if row["episodes"]]
    window = 2 * round(SMOOTHED / 2 / np.mean([row["episodes"] for row in rows])) + 1
    steps = np.array([row["num_env_steps"] for row in rows])
    return steps, np.array(smooth([row["reward"] for row in rows], window))


def draw_agent(axes: Axes, agent: str, runs: list[Run]) -> None:
    """Draw the mean learning curve, and the fresh episodes. A run that has ended keeps its last value."""
    curves = [curve(run) for run in runs if played(run)]
    if curves:
        points = np.geomspace(max(x[0] for x, _ in curves), max(x[-1] for x, _ in curves), 200)
        returns = np.array([np.interp(points, x, y) for x, y in curves])
        draw_band(axes, points, returns, COLOURS[agent], agent)
    end = np.mean([run.summary["env_steps"] for run in runs])
    draw_mean(axes, end, ends(runs), COLOURS[agent])


def draw(groups: Groups) -> Figure:
    """Draw the learning curves of each environment, by environment steps."""
    envs = list(dict.fromkeys(env for env, _ in groups))
    figure = Figure(figsize=(3.2 + 2.9 * len(envs), 4), dpi=90, layout="constrained")
    for env, axes in zip(envs, figure.subplots(1, len(envs), squeeze=False)[0], strict=True):
        agents = {agent: runs for (name, agent), runs in groups.items() if name == env}
        for agent, runs in agents.items():
            draw_agent(axes, agent, runs)
        threshold = next(iter(agents.values()))[0].summary["threshold"]
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
        agent: Agents.
        seeds: Number of seeds of each environment; the last number counts for all further ones.
        max_steps: Updates. Default: those of the agent.
        output: Where the figure goes.
    """
    print(f"mean return of {FRESH} fresh episodes, sampled actions, ± standard error")
    groups: Groups = defaultdict(list)
    for number, name in enumerate(env):
        if "classic" in agent and not describe(name).discrete:
            print(
                "The classic agent chooses among actions by softmax; here it gets the Gaussian head."
            )
        for seed, kind in product(range(seeds[min(number, len(seeds) - 1)]), agent):
            run = train(name, kind, seed, max_steps)
            print(run, flush=True)
            groups[name, kind].append(run)
    print_table(groups)
    save(draw(groups), output)


if __name__ == "__main__":
    tyro.cli(main)
