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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from curves import draw_band, draw_mean, mean_with_interval, open_frame
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl import train_agent
from tokenrl.control import agent_settings, describe
from tokenrl.runs import read_metrics, smooth

COLOURS = {"classic": "#D55E00", "tuned": "#0072B2"}  # Okabe and Ito
SMOOTHED = 20  # episodes, at least, in each value of a learning curve


@dataclass(frozen=True)
class Arguments:
    """Train agents by name on environments, over seeds, and draw how they learn."""

    env: tuple[str, ...] = ("CartPole-v1", "Acrobot-v1", "LunarLander-v3")
    """Environments."""
    agent: tuple[Literal["classic", "tuned"], ...] = ("classic", "tuned")
    """Agents."""
    seeds: tuple[int, ...] = (10, 10, 5)
    """Number of seeds of each environment; the last number counts for all further ones."""
    max_steps: int | None = None
    """Updates. Default: those of the agent."""
    eval_episodes: int = 100
    """Fresh episodes of each evaluation."""
    output: Path = Path("agents.png")
    """Where the figure goes."""
    output_dir: Path = Path("runs/agents")
    """Where the run directories go; earlier runs in it are replaced."""
    video: bool = False
    """Film an episode of each trained policy."""


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


def train(arguments: Arguments, env: str, agent: str, seed: int) -> Run:
    """Train one agent; a signal raises KeyboardInterrupt or SystemExit."""
    settings = agent_settings(agent, env) | {"seed": seed, "video": arguments.video}
    settings["eval_episodes"] = arguments.eval_episodes
    settings["eval_every"] = 0  # only before and after training
    if arguments.max_steps is not None:
        settings["max_steps"] = arguments.max_steps
    folder = arguments.output_dir / f"{env}-{agent}-seed{seed}"
    result = train_agent(**settings, output_dir=str(folder), overwrite=True, quiet=True)
    if result.exit_code:
        raise SystemExit(result.exit_code)
    summary = json.loads((folder / "summary.json").read_text())
    return Run(env, agent, seed, summary, read_metrics(folder / "metrics.jsonl")[1:])


def train_all(arguments: Arguments) -> Iterator[Run]:
    counts = arguments.seeds[: len(arguments.env)]
    for env, seeds in zip_longest(arguments.env, counts, fillvalue=arguments.seeds[-1]):
        if "classic" in arguments.agent and not describe(env).discrete:
            print(
                "The classic agent chooses among actions by softmax; here it gets the Gaussian head."
            )
        for seed in range(seeds):
            for agent in arguments.agent:
                yield train(arguments, env, agent, seed)


Groups = dict[tuple[str, str], list[Run]]  # by environment and agent


def ends(runs: list[Run]) -> np.ndarray:
    """Return the mean return of the fresh episodes of each run, [S]."""
    return np.array([run.summary["eval_after"]["reward"] for run in runs])


def solved(runs: list[Run]) -> int:
    return sum(run.summary["solved"] is True for run in runs)


def print_table(groups: Groups) -> None:
    for (env, agent), runs in groups.items():
        threshold = runs[0].summary["threshold"]
        score = ""
        if threshold is not None:
            score = f", {solved(runs)} of {len(runs)} seeds reach {threshold:g}"
        steps = np.mean([run.summary["env_steps"] for run in runs])
        cpu = np.mean([run.summary["train_cpu_seconds"] for run in runs])
        print(f"\n{env}, {agent}: {' '.join(f'{end:.1f}' for end in ends(runs))}")
        print(f"  mean {mean_with_interval(ends(runs), '.1f')}{score}")
        episodes = np.mean([played(run) for run in runs])
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
    open_frame(*figure.axes)
    note = f"lines: return in training, over {SMOOTHED} episodes or more; bands, bars: 95 %"
    figure.supxlabel(f"{note}; dots: fresh episodes; dotted: threshold", fontsize=9)
    return figure


def main(arguments: Arguments) -> None:
    print(
        f"mean return of {arguments.eval_episodes} fresh episodes, sampled actions, ± standard error"
    )
    groups: Groups = defaultdict(list)
    for run in train_all(arguments):
        print(run, flush=True)
        groups[run.env, run.agent].append(run)
    print_table(groups)
    draw(groups).savefig(arguments.output)
    print(f"figure: {arguments.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
