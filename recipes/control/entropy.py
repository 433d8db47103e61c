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
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from curves import (
    GREY,
    draw_mean,
    draw_rolling,
    interval,
    mean_with_interval,
    save,
    trained,
    with_interval,
)
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.control import GRIDWORLD_STEPS, GridWorld, describe, exact_return, exact_values

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")  # Okabe and Ito
ENVIRONMENTS = ("trap", "gridworld")
EPISODES = 10  # per update
WINDOW = 10  # updates in a rolling mean: 100 episodes


class Sweep(NamedTuple):
    """The runs of one environment; S seeds for each of B betas, in the order of the arguments."""

    env: str
    betas: tuple[float, ...]
    rewards: np.ndarray  # [B, S, updates], mean return of the episodes of an update
    entropies: np.ndarray  # [B, S, updates], nats per action
    returns: np.ndarray  # [B, S], exact expected return of the final policy
    chances: np.ndarray  # [B, S, 3], exact chances of its episodes to end at goal, decoy, neither
    collapsed: np.ndarray  # [B, S], whether the run was flagged `entropy-collapsed`

    @property
    def best(self) -> int:
        """Index of the beta with the highest mean return."""
        return int(self.returns.mean(1).argmax())

    def behind(self) -> np.ndarray:
        """Return the mean difference of each beta to the best, over pairs of equal seeds, [3, B]."""
        return interval((self.returns[self.best] - self.returns).T)


def grid_of(env: str) -> GridWorld:
    """Return the grid itself, whose returns can be computed."""
    return gymnasium.make(describe(env).env).unwrapped


def chances_of(grid: GridWorld, policy: np.ndarray) -> np.ndarray:
    """Return the chances [3] that an episode ends at the goal, at the decoy, or is cut.

    The chance of an end is the expected return where this end alone pays, and pays 1.
    """
    chances = []
    alone = copy.copy(grid)
    alone.step_reward = 0.0
    for end in (grid.goal, grid.decoy):
        alone.ends = {cell: float(cell == end) for cell in grid.ends}
        chances.append(exact_return(alone, policy, horizon=GRIDWORLD_STEPS))
    return np.array([*chances, 1 - sum(chances)])


def train(env: str, beta: float, seed: int, updates: int):
    """Train once; returns the result and the metrics of the updates."""
    return trained(
        Path("runs/control_entropy") / env / f"beta_{beta:g}" / f"seed_{seed}",
        env=env,
        max_episode_steps=GRIDWORLD_STEPS,
        estimator=Estimator(baseline="running_mean", returns="reward_to_go", entropy_coef=beta),
        entropy_schedule="linear",
        hidden=(),  # linear in the one-hot cell
        num_envs=EPISODES,
        max_steps=updates,
        learning_rate=0.2,
        seed=seed,
    )


def sweep(env: str, betas: tuple[float, ...], seeds: int, updates: int) -> Sweep:
    """Train with every beta and every seed."""
    grid = grid_of(env)
    columns: dict[str, list] = {name: [] for name in Sweep._fields[2:]}
    for beta, seed in itertools.product(betas, range(seeds)):
        result, metrics = train(env, beta, seed, updates)
        with torch.no_grad():
            policy = result.policy(torch.eye(grid.cells)).double().softmax(-1).numpy()
        columns["rewards"].append(metrics["reward"])
        columns["entropies"].append(metrics["entropy"])
        columns["returns"].append(exact_return(grid, policy, horizon=GRIDWORLD_STEPS))
        columns["chances"].append(chances_of(grid, policy))
        columns["collapsed"].append("entropy-collapsed" in result.flags)
    shaped = {}
    for name, values in columns.items():
        shaped[name] = np.array(values).reshape(len(betas), seeds, *np.shape(values)[1:])
    return Sweep(env, betas, **shaped)


def print_start(env: str) -> None:
    """Print exact returns: of a uniform policy, where its episodes end, and after a step off the decoy."""
    grid = grid_of(env)
    uniform = np.full((grid.cells, 4), 0.25)
    goal, decoy, _ = chances_of(grid, uniform)
    mean = exact_return(grid, uniform, horizon=GRIDWORLD_STEPS)
    print(
        f"\n{env}: a uniform policy returns {mean:.3f} (ends: goal {goal:.1%}, decoy {decoy:.1%})"
    )
    if grid.decoy is not None:
        later = exact_values(grid, uniform, horizon=GRIDWORLD_STEPS - 1)[grid.size]
        print(
            f"a first step down, away from the decoy, then uniform: {grid.step_reward + later:.3f}"
        )


def print_table(s: Sweep) -> None:
    """Print a line per beta, and the sweet spot with the betas that are as good."""
    print(f"{'beta':>5}  {'final return':22}  {'behind the best':22}  entropy  flagged  ends at")
    last = max(1, s.entropies.shape[2] // 10)
    seeds = s.returns.shape[1]
    for i, beta in enumerate(s.betas):
        goal, decoy = (s.chances[i, :, :2] > 0.5).sum(0)
        returns = mean_with_interval(s.returns[i], "6.3f")
        behind = with_interval(s.behind()[:, i], "6.3f")
        print(
            f"{beta:5g}  {returns}  {behind}  "
            f"{s.entropies[i, :, -last:].mean():7.3f}  {s.collapsed[i].sum():2} of {seeds:2}  "
            f"goal {goal}, decoy {decoy}, neither {seeds - goal - decoy}"
        )
    print(verdict(s))


def verdict(s: Sweep) -> str:
    """Name the sweet spot: the beta with the highest mean return, and those not told apart from it."""
    best = s.betas[s.best]
    low = s.behind()[1]
    alike = [beta for beta, least in zip(s.betas, low, strict=True) if least <= 0 and beta != best]
    names = ", ".join(f"{beta:g}" for beta in alike)
    remainder = f"not told apart from it: {names}" if alike else "all others are worse"
    if best == 0:
        return f"sweet spot: none; no bonus is best ({remainder})"
    if 0 in alike:
        return f"sweet spot: none; beta {best:g} is highest, but no bonus is as good ({remainder})"
    return f"sweet spot: beta {best:g} ({remainder})"


def draw(sweeps: list[Sweep]) -> Figure:
    """Draw rolling means of return and entropy, and the final return of every seed, by beta."""
    figure = Figure(figsize=(15, 8.4), dpi=100, layout="constrained")
    grid = figure.subplots(len(sweeps), 3, squeeze=False)
    for s, (left, middle, right) in zip(sweeps, grid, strict=True):
        for i, (beta, colour) in enumerate(zip(s.betas, itertools.cycle(COLOURS), strict=False)):
            for axes, runs in ((left, s.rewards[i]), (middle, s.entropies[i])):
                draw_rolling(axes, runs, WINDOW, colour, f"beta = {beta:g}", EPISODES)
            seeds = np.linspace(-0.25, 0.25, s.returns.shape[1])
            right.scatter(i + seeds, s.returns[i], s=14, color=colour, alpha=0.6, linewidth=0)
            draw_mean(right, i, s.returns[i], "black", "_")
        left.set(xlabel="episodes (rolling mean of 100)", ylabel="mean return of an episode")
        left.set_title(f"{s.env}, {verdict(s)}", loc="left", fontsize=11)
        middle.set(
            xlabel="episodes (rolling mean of 100)", ylabel="entropy, nats (dotted: uniform)"
        )
        middle.axhline(np.log(4), color=GREY, linestyle=":")
        right.set(
            xlabel="beta at the start", ylabel="return of the final policy (bars: mean, 95 %)"
        )
        right.set_xticks(range(len(s.betas)), [f"{beta:g}" for beta in s.betas])
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
    sweeps = []
    for env in ENVIRONMENTS:
        print_start(env)
        sweeps.append(sweep(env, betas, seeds, updates))
        print_table(sweeps[-1])
    print()
    save(draw(sweeps), output)


if __name__ == "__main__":
    tyro.cli(main)
