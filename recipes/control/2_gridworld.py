"""What a baseline does, on a 4x4 grid with a softmax policy linear in the one-hot cell.

The agent walks from one corner to the other. Each step costs 0.01, the goal has a reward of 1, and an episode
is cut after 50 steps; the best return is 0.94. Nearly all episodes that reach the goal have about the same
return, so without a baseline each of them reinforces all its actions, detours too. With the mean return
subtracted, only the better ones do. All estimators use the reward to go and clip gradients at norm 0.5.

Part 1, learning: vanilla, a running mean of past returns, a learned V(s) (the preset a2c), and returns
normalised to mean 0 and sd 1 over the actions of the batch. Episodes to convergence are those until the mean
of 100 returns lies within two wasted steps (0.02) of the best and stays there to the end of the run; a run
that never gets there counts with its full length, which makes ratios to it too small. Part 2, the reason: the
variance of the gradient of 10 episodes in the logits of the cells, many times at the same weights, against
that with the exact expected return J subtracted, which is what a running mean estimates, or the exact V(s).
What an entropy bonus does, here and where it is needed, is in `entropy.py`.

Look for: for the first policy a baseline does little, since J is small beside the spread of its returns. The
better the policy, the more alike its returns and the larger their mean, so the ratio grows from 1 to
hundreds. By default vanilla takes 1466 episodes, a running mean 392, V(s) 340, and normalising, which centres
too, 173. Intervals are 95 %, by bootstrap over seeds (part 2: over gradients); differences and ratios are
between runs of the same seed, or gradients of the same episodes.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from pathlib import Path

import numpy as np
import torch
import tyro
from curves import (
    GREY,
    draw_rolling,
    interval,
    mean_with_interval,
    resampled,
    rolling,
    save,
    trained,
    with_interval,
)
from grid_values import values_of
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.control import Environments, GridWorld, collect_episodes

BLUE, GREEN = "#0072B2", "#009E73"  # Okabe and Ito
BEST = 0.94
NEAR = 0.02  # two wasted steps
EPISODES = 10  # per update
WINDOW = 10  # updates in a rolling mean: 100 episodes
GRADIENTS = 200  # measured at each stage of part 2
RUNS = Path("runs/control_2_gridworld")
ESTIMATORS = {
    "vanilla": Estimator(baseline="none", returns="reward_to_go"),
    "running mean": Estimator(baseline="running_mean", returns="reward_to_go"),
    "learned V": Estimator.preset("a2c"),
    "normalised": Estimator(baseline="none", returns="reward_to_go", scale="token_whiten"),
}
COLOURS = dict(zip(ESTIMATORS, ("#D55E00", BLUE, GREEN, "#CC79A7"), strict=True))


def run(name: str, folder: str, seed: int, updates: int):
    """Train an estimator; returns the result and the metrics of the updates."""
    return trained(
        RUNS / folder.replace(" ", "_") / f"seed_{seed}",
        env="gridworld",
        estimator=ESTIMATORS[name],
        hidden=(),  # linear in the one-hot cell: a table, for the policy as for V
        num_envs=EPISODES,
        max_steps=updates,
        learning_rate=0.1,
        max_grad_norm=0.5,
        seed=seed,
    )


def histories(name: str, seeds: int, updates: int) -> dict:
    """Train once per seed; returns each metric by update, [seeds, updates]."""
    runs = [run(name, name, seed, updates)[1] for seed in range(seeds)]
    keys = ("reward", "reward_std", "num_env_steps")
    return {key: np.array([metrics[key] for metrics in runs]) for key in keys}


def converged(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the update [seeds] from which the rolling mean stays near the best, and whether there is one."""
    near = rolling(rewards, WINDOW) >= BEST - NEAR - 1e-6
    outside = near.shape[1] - np.argmin(near[:, ::-1], axis=1)  # one past the last update outside
    first = np.where(near.all(1), 0, outside)
    reached = first < near.shape[1]
    update = first + rewards.shape[1] - near.shape[1] + 1
    return np.where(reached, update, rewards.shape[1]), reached


def learning(seeds: int, length: int) -> tuple[dict, dict]:
    """Part 1; returns the histories and how many times sooner than vanilla each converges."""
    runs = {name: histories(name, seeds, length) for name in ESTIMATORS}
    vanilla, _ = converged(runs["vanilla"]["reward"])
    rows = range(seeds)
    vanilla_steps = runs["vanilla"]["num_env_steps"][rows, vanilla - 1]
    ratios = {}
    print(f"1. Learning: {seeds} seeds, {length * EPISODES} episodes each; mean [95 % interval]")
    for name, h in runs.items():
        updates, reached = converged(h["reward"])
        episodes = updates * EPISODES
        ratios[name] = np.exp(interval(np.log(vanilla / updates)))
        log_steps = np.log(vanilla_steps / h["num_env_steps"][rows, updates - 1])
        print(
            f"{name:13} episodes to convergence {mean_with_interval(episodes, '.0f')}, median "
            f"{np.median(episodes):.0f}, reached by {reached.sum()} of {seeds}\n"
            f"{'':13} vanilla's episodes over these {with_interval(ratios[name], '.2f')}, environment steps "
            f"{with_interval(np.exp(interval(log_steps)), '.2f')} (geometric means)"
        )
    return runs, ratios


def measure(updates: int) -> tuple[float, dict[str, np.ndarray]]:
    """Return J of one policy, and the ratios of the vanilla gradient's variance to that with a baseline."""
    policy = run("running mean", f"stages/{updates}", 0, updates)[0].policy
    envs = Environments("gridworld", GRADIENTS * EPISODES)
    rollout = collect_episodes(envs, policy, torch.Generator().manual_seed(0), seed=0)
    with torch.no_grad():
        table = policy(torch.eye(16)).double().softmax(-1)
    v = torch.from_numpy(values_of(GridWorld(), table.numpy()))
    j = float(v[0])
    cells = rollout.observations.argmax(-1)
    mask = rollout.mask
    rewards = rollout.rewards.double()
    scores = torch.eye(4)[rollout.actions] - table[cells]  # [N, T, 4], in the logits of the cell
    batch = torch.arange(len(cells)).div(EPISODES, rounding_mode="floor")[:, None].expand_as(cells)
    samples = {}
    for name, baseline in (("vanilla", "none"), ("J", "constant"), ("V(s)", "value")):
        estimator = Estimator(baseline=baseline, baseline_constant=j, returns="reward_to_go")
        advantages = estimator.advantages(rewards, mask, group_size=None, values=v[cells]).policy
        terms = (advantages * mask / EPISODES)[..., None] * scores
        gradient = torch.zeros(GRADIENTS, 16, 4, dtype=torch.double)
        gradient.index_put_((batch, cells), terms, accumulate=True)
        samples[name] = gradient.reshape(GRADIENTS, -1).numpy()
    ratios = {name: variance_ratio(samples["vanilla"], samples[name]) for name in ("J", "V(s)")}
    words = [f"   vanilla / {name} {with_interval(x, '.2f')}" for name, x in ratios.items()]
    print(f"after {updates:3} updates, J = {j:6.3f}:{''.join(words)}")
    return j, ratios


def variance_ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Ratio of the traces of the covariances of gradients [M, D] of the same episodes, with its interval."""

    def traces(g: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return weights @ (g**2).sum(1) - ((weights @ g) ** 2).sum(1)

    n = len(ours)
    weights = np.concatenate([np.full((1, n), 1 / n), resampled(n)])
    ratios = traces(ours, weights) / traces(theirs, weights)
    return np.array([ratios[0], *np.quantile(ratios[1:], (0.025, 0.975))])


def draw_learning(runs: dict, ratios: dict, variances: dict[int, tuple[float, dict]]) -> Figure:
    title = f"Learning converges {ratios['running mean'][0]:.1f} times sooner with a running mean"
    figure = Figure(figsize=(15, 4.4), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    left, middle, right = figure.subplots(1, 3)
    for axes in (left, middle):
        axes.set_xlabel("episodes (rolling mean of 100)")
    for name, h in runs.items():
        for axes, metric in ((left, "reward"), (middle, "reward_std")):
            draw_rolling(axes, h[metric], WINDOW, COLOURS[name], name, EPISODES)
    left.axhline(BEST, color=GREY, linestyle=":", label="best possible")
    left.set(ylim=(0.6, 0.96), ylabel="mean return of an episode")
    left.legend(loc="lower right", frameon=False)
    # Where all ten returns of every update are the same, the sd is 0, which has no logarithm.
    middle.set(yscale="log", ylim=(1e-4, 1), ylabel="sd of returns within an update")
    for name, colour, shift in (("J", BLUE, -0.06), ("V(s)", GREEN, 0.06)):
        y = np.array([measured[name] for _, measured in variances.values()]).T
        x = np.arange(len(variances)) + shift
        bars = [y[0] - y[1], y[2] - y[0]]
        right.errorbar(x, y[0], bars, fmt="o-", color=colour, capsize=3, label=f"{name} subtracted")
    right.axhline(1, color=GREY, linestyle=":")
    labels = [f"{updates * EPISODES}\nJ = {j:.2f}" for updates, (j, _) in variances.items()]
    right.set_xticks(range(len(labels)), labels)
    right.set(yscale="log", ylabel="variance of the gradient, vanilla over baseline")
    right.set_xlabel("episodes learnt from, then held; J of the policy")
    right.legend(loc="upper left", frameon=False)
    return figure


def main(
    seeds: int = 20,
    updates: int = 250,
    stages: tuple[int, ...] = (0, 2, 5, 10, 30),
    output: Path = Path("gridworld.png"),
) -> None:
    """Train on the grid with several estimators, and measure their gradients.

    Args:
        seeds: Runs of each kind.
        updates: Updates of 10 episodes each in part 1.
        stages: Updates with a running mean after which gradients are measured in part 2.
        output: Where the figure goes.
    """
    runs, ratios = learning(seeds, updates)
    print(
        f"\n2. Variance of the gradient of {EPISODES} episodes, {GRADIENTS} times at the same weights"
    )
    save(draw_learning(runs, ratios, {stage: measure(stage) for stage in stages}), output)


if __name__ == "__main__":
    tyro.cli(main)
