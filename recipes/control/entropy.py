"""What an entropy bonus is for: it frees a policy from a trap, and on a plain grid it only costs.

In the environment `trap` a grid of 6 x 6 cells has a goal with a reward of 1 in the far corner, and a decoy
with a reward of 0.5 one step from the start. Both end the episode, each step costs 0.01, and an episode is
cut after 50 steps. The plain `gridworld`, 4 x 4 cells, has the goal alone. REINFORCE with a running mean as
its baseline trains a softmax policy, linear in the one-hot cell, with a bonus of beta times the entropy of
each step. Beta falls linearly to 0 over the run; what counts is the exact return of the final policy.

Why it is a trap: to a policy that does not know the way yet, the decoy is the better choice. The step into it
returns 0.49; the step away from it, with uniform actions afterwards, 0.21. And a gradient is estimated from
the episodes that were played: at first 84 % end in the decoy and 5 % at the goal. Each update that makes the
decoy more probable leaves fewer episodes to learn the way from, until there are none, although the whole path
returns 0.90. The bonus keeps the first step away from the decoy probable while the way is learnt. Once its
return is above 0.49 the gradient turns, and as beta falls the policy commits to the goal.

The sweet spot is the beta with the highest mean return over seeds. Others are not told apart from it if the
95 % interval (bootstrap) of the difference over pairs of equal seeds reaches 0. If beta 0 is highest or among
these, there is no sweet spot. A run ends at the goal or at the decoy if more than half of the episodes of the
final policy do. A run without a bonus is flagged `entropy-collapsed` if its last entropy is below 0.1.

Look for: the runs that end at the decoy, which fall with beta, and the price of a beta that is too large: a
policy that is nearly uniform for most of the run has no time left to commit. The flag says that a policy has
chosen, not that it chose badly. The numbers are on the page of `tokenrl control`,
recipes/pages/reference/control.md.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import copy
import itertools
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pandas as pd
import torch
import tyro
from curves import GREY, draw_mean, draw_rolling, interval, mean_with_interval, save, trained
from grid_values import STEPS, values_of
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.control import GridWorld

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")  # Okabe and Ito
ENVIRONMENTS = ("trap", "gridworld")
EPISODES = 10  # per update
WINDOW = 10  # updates in a rolling mean: 100 episodes


def grid_of(env: str) -> GridWorld:
    """Return the grid itself, whose returns can be computed."""
    return gymnasium.make(env).unwrapped


def chances_of(grid: GridWorld, policy: np.ndarray) -> list[float]:
    """Return the chances that an episode ends at the goal and, in `trap`, at the decoy.

    The chance of an end is the expected return where this end alone pays, and pays 1.
    """
    alone = copy.copy(grid)
    alone.step_reward = 0.0
    chances = []
    for end in grid.ends:
        alone.ends = {cell: float(cell == end) for cell in grid.ends}
        chances.append(values_of(alone, policy)[0])
    return chances


def train(env: str, beta: float, seed: int, updates: int) -> dict[str, Any]:
    """Train once; returns the curves of the run, and exact facts about its final policy."""
    result, metrics = trained(
        Path("runs/control_entropy") / env / f"beta_{beta:g}" / f"seed_{seed}",
        env=env,
        estimator=Estimator(baseline="running_mean", returns="reward_to_go", entropy_coef=beta),
        entropy_schedule="linear",
        hidden=(),  # linear in the one-hot cell
        num_envs=EPISODES,
        max_steps=updates,
        learning_rate=0.2,
        seed=seed,
    )
    grid = grid_of(env)
    with torch.no_grad():
        policy = result.policy(torch.eye(grid.cells)).double().softmax(-1).numpy()
    goal, *decoy = chances_of(grid, policy)
    return {
        "beta": beta,
        "seed": seed,
        "return": values_of(grid, policy)[0],
        "goal": goal > 0.5,
        "decoy": sum(decoy) > 0.5,
        "flagged": "entropy-collapsed" in result.flags,
        "rewards": metrics["reward"].to_numpy(),
        "entropies": metrics["entropy"].to_numpy(),
    }


def print_start(env: str) -> None:
    """Print exact returns: of a uniform policy, where its episodes end, and after a step off the decoy."""
    grid = grid_of(env)
    uniform = np.full((grid.cells, 4), 0.25)
    ends = zip(("goal", "decoy"), chances_of(grid, uniform), strict=False)
    words = ", ".join(f"{end} {chance:.1%}" for end, chance in ends)
    print(f"\n{env}: a uniform policy returns {values_of(grid, uniform)[0]:.3f} (ends: {words})")
    if env == "trap":
        later = grid.step_reward + values_of(grid, uniform, STEPS - 1)[grid.size]
        print(f"a first step down, away from the decoy, then uniform: {later:.3f}")


def print_table(runs: pd.DataFrame) -> str:
    """Print a line per beta, and the sweet spot with the betas that are as good; returns the sweet spot."""
    print(f"{'beta':>5}  {'final return':22}  {'behind the best':22}  entropy  flagged  ends at")
    returns = runs.pivot(index="seed", columns="beta", values="return")
    best = returns.mean().idxmax()
    alike = []
    for beta, group in runs.groupby("beta", sort=False):
        behind = returns[best] - returns[beta]
        if beta != best and interval(behind)[1] <= 0:
            alike.append(beta)
        seeds = len(group)
        goal, decoy, flagged = group[["goal", "decoy", "flagged"]].sum()
        entropies = np.stack(group["entropies"])
        entropy = entropies[:, -max(1, entropies.shape[1] // 10) :].mean()
        print(
            f"{beta:5g}  {mean_with_interval(returns[beta], '6.3f')}  {mean_with_interval(behind, '6.3f')}  "
            f"{entropy:7.3f}  {flagged:2} of {seeds:2}  "
            f"goal {goal}, decoy {decoy}, neither {seeds - goal - decoy}"
        )
    spot = f"beta {best:g}"
    if best == 0:
        spot = "none; no bonus is best"
    elif 0 in alike:
        spot = f"none; beta {best:g} is highest, but no bonus is as good"
    names = ", ".join(f"{beta:g}" for beta in alike)
    remainder = f"not told apart from it: {names}" if alike else "all others are worse"
    verdict = f"sweet spot: {spot} ({remainder})"
    print(verdict)
    return verdict


def draw(sweeps: dict[str, pd.DataFrame]) -> Figure:
    """Draw rolling means of return and entropy, and the final return of every seed, by beta."""
    figure = Figure(figsize=(15, 8.4), dpi=100, layout="constrained")
    grid = figure.subplots(len(sweeps), 3, squeeze=False)
    for (title, runs), (left, middle, right) in zip(sweeps.items(), grid, strict=True):
        groups = runs.groupby("beta", sort=False)
        for i, ((beta, group), colour) in enumerate(
            zip(groups, itertools.cycle(COLOURS), strict=False)
        ):
            for axes, name in ((left, "rewards"), (middle, "entropies")):
                curves = np.stack(group[name])
                draw_rolling(axes, curves, WINDOW, colour, f"beta = {beta:g}", EPISODES)
            seeds = np.linspace(-0.25, 0.25, len(group))
            right.scatter(i + seeds, group["return"], s=14, color=colour, alpha=0.6, linewidth=0)
            draw_mean(right, i, group["return"], "black", "_")
        left.set(xlabel="episodes (rolling mean of 100)", ylabel="mean return of an episode")
        left.set_title(title, loc="left", fontsize=11)
        middle.set(xlabel="episodes (rolling mean of 100)")
        middle.set_ylabel("entropy, nats (dotted: uniform)")
        middle.axhline(np.log(4), color=GREY, linestyle=":")
        right.set(xlabel="beta at the start")
        right.set_ylabel("return of the final policy (bars: mean, 95 %)")
        right.set_xticks(range(len(groups)), [f"{beta:g}" for beta in runs["beta"].unique()])
    grid[0][0].legend(frameon=False)
    return figure


def main(
    seeds: int = 20,
    updates: int = 200,
    betas: tuple[float, ...] = (0.0, 0.01, 0.1, 0.3, 1.0),
    output: Path = Path("entropy.png"),
) -> None:
    """Sweep an entropy bonus in a grid with a decoy and in one without.

    Args:
        seeds: Runs of each kind.
        updates: Updates of 10 episodes each.
        betas: Weights of the entropy bonus at the start.
        output: Where the figure goes.
    """
    print(f"{seeds} seeds, {updates * EPISODES} episodes each; mean [95 % interval over seeds]")
    sweeps = {}
    for env in ENVIRONMENTS:
        print_start(env)
        kinds = itertools.product(betas, range(seeds))
        runs = pd.DataFrame([train(env, beta, seed, updates) for beta, seed in kinds])
        sweeps[f"{env}, {print_table(runs)}"] = runs
    save(draw(sweeps), output)


if __name__ == "__main__":
    tyro.cli(main)
