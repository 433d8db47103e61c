"""REINFORCE on CartPole-v1 in NumPy alone, its variations, and DQN on the same axes.

The agent is one page, `tokenrl/control/numpy_agent.py`: read it beside this. 100 ReLU units, a gradient
written by hand, RMSProp, five episodes an update. Each variation changes one thing:

    gamma         how far ahead an action is credited with rewards: 0.8, 0.95, 0.99, 0.999
    window        the same with a sharp limit: each reward is credited to the last 5, 10, 20, 50 actions only
    plain         returns are not standardised within the episode
    undiscounted  gamma 1, with standardisation and without

Several are drawn side by side: --variation gamma window plain undiscounted.

Expect: with the usual settings, seeds 0 to 4 reach a mean of 475 over 100 episodes after 1,961 to 2,860
episodes (about a million steps and 15 seconds of one core each). Then they fluctuate: at episode 3,000 the
means lie between 445 and 489. DQN has 50,000 steps, with 4 % random actions to the end, and reaches 179 to
278. With seeds 0 and 1, the settings that look ahead by 50 steps or fewer (gamma 0.8 and 0.95, every window)
mostly rise as fast at first and never exceed a mean of 405; gamma 0.99, 0.999 and 1 are much alike.
Standardising does not help here: without it 475 is reached sooner (after 1,963 and 2,054 episodes), and
without the discount too, the one setting whose gradient is unbiased, sooner still (1,520 and 1,325). Two
seeds prove little; use more.
"""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl.control import NumpySettings, train_numpy

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A8A8A"  # Okabe and Ito
SUGGESTED = 475.0  # CartPole-v1's own reward threshold, for the mean of 100 episodes
Curve = tuple[np.ndarray, int]  # the rolling mean of 100 episodes, and environment steps


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; one run for each."""
    episodes: int = 3000
    """Episodes per run."""
    variation: tuple[Literal["gamma", "window", "plain", "undiscounted"], ...] = ()
    """What to vary, with one panel for each. Default: nothing, and a curve for each seed."""
    dqn: bool = False
    """Train DQN (stable-baselines3) too and draw it on the same axes."""
    dqn_steps: int = 50_000
    """Environment steps of each DQN run."""
    output: Path = Path("numpy_cartpole.png")
    """Where the figure goes."""


def settings_of(variation: str) -> dict[str, NumpySettings]:
    usual = NumpySettings()
    if variation == "gamma":
        return {f"gamma {gamma:g}": replace(usual, gamma=gamma) for gamma in (0.8, 0.95, 0.99, 0.999)}
    if variation == "window":
        windows = {f"window {n}": replace(usual, window=n) for n in (5, 10, 20, 50)}
        return windows | {"no window": usual}
    if variation == "plain":
        return {"standardised": usual, "not standardised": replace(usual, standardise=False)}
    undiscounted = replace(usual, gamma=1.0)
    return {
        "gamma 0.99": usual,
        "gamma 1": undiscounted,
        "gamma 1, not standardised": replace(undiscounted, standardise=False),
    }


def rolling(returns: list[float]) -> np.ndarray:
    """Mean of the last 100 episodes, from the hundredth on (of fewer, if there are fewer)."""
    width = min(100, len(returns))
    return np.convolve(returns, np.ones(width) / width, mode="valid")


def reinforce(settings: NumpySettings, episodes: int) -> Curve:
    updates = islice(train_numpy(settings), -(-episodes // settings.episodes_per_update))
    played = [episode.rewards for _, batch in updates for episode in batch][:episodes]
    return rolling([float(rewards.sum()) for rewards in played]), sum(map(len, played))


def dqn(seed: int, steps: int) -> Curve:
    """Train DQN with rl-baselines3-zoo's settings for CartPole-v1; 4 % of its actions stay random."""
    import gymnasium
    from stable_baselines3 import DQN
    from stable_baselines3.common.monitor import Monitor

    env = Monitor(gymnasium.make("CartPole-v1"))
    agent = DQN(
        "MlpPolicy", env, learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1000,
        gamma=0.99, target_update_interval=10, train_freq=256, gradient_steps=128, exploration_fraction=0.16,
        exploration_final_eps=0.04, policy_kwargs={"net_arch": [256, 256]}, seed=seed, device="cpu",
    )  # fmt: skip
    agent.learn(steps)
    return rolling(env.get_episode_rewards()), env.get_total_steps()


def tell(name: str, curve: Curve) -> None:
    """Print the best and the last mean of one run."""
    mean, steps = curve
    reached = np.flatnonzero(mean >= SUGGESTED)
    when = f"{reached[0] + 100} episodes" if len(reached) else "never"
    print(f"{name:34} best {mean.max():5.1f}   last {mean[-1]:5.1f}   475 after {when:13}   steps {steps:,}",
          flush=True)  # fmt: skip


def line(axes: Axes, mean: np.ndarray, **style: object) -> None:
    axes.plot(np.arange(len(mean)) + 100, mean, **style)


def dress(axes: Axes, episodes: int) -> None:
    axes.axhline(500, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(
        "500, the most there is", (0, 500), (4, 3), textcoords="offset points", color=GREY, fontsize=9
    )
    axes.set_xlim(0, max(episodes, 101))
    axes.set_ylim(0, 540)
    axes.set_xlabel("episodes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EAEAEA", linewidth=0.8)


def draw_seeds(runs: list[Curve], others: list[Curve], episodes: int) -> Figure:
    """Draw a thin line for each run and, of NumPy's, a thick one for their mean."""
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    dress(axes, episodes)
    for mean, _ in runs:
        line(axes, mean, color=BLUE, linewidth=0.9, alpha=0.45)
    line(axes, np.mean([mean for mean, _ in runs], axis=0), color=BLUE, linewidth=2.4)
    for mean, _ in others:
        line(axes, mean, color=ORANGE, linewidth=1.2, alpha=0.8)
    steps = np.mean([steps for _, steps in runs])
    text = f"REINFORCE in NumPy, {len(runs)} seeds and their mean\n{steps:,.0f} steps a run"
    axes.annotate(text, (0.98, 0.10), xycoords="axes fraction", color=BLUE, ha="right")
    reached = sum(mean.max() >= SUGGESTED for mean, _ in runs)
    title = f"REINFORCE: {reached} of {len(runs)} seeds reach a mean of 475 within {episodes:,} episodes"
    if others:
        steps = np.mean([steps for _, steps in others])
        text = f"DQN (stable-baselines3), {len(others)} seeds\n{steps:,.0f} steps a run"
        axes.annotate(text, (0.98, 0.24), xycoords="axes fraction", color=ORANGE, ha="right")
        last = min(len(mean) for mean, _ in [*runs, *others]) - 1  # the last episode that every run has
        here, there = (np.mean([mean[last] for mean, _ in curves]) for curves in (runs, others))
        title += f";\nafter {last + 100} episodes DQN is at {there:.0f}, REINFORCE at {here:.0f}"
    axes.set_ylabel("return, mean of the last 100 episodes")
    axes.set_title(title, loc="left", fontsize=11)
    return figure


TITLES = {
    "gamma": "How far ahead an action answers",
    "window": "Each reward is credited to the last actions only",
    "plain": "Returns standardised within the episode, or not",
    "undiscounted": "Without a discount",
}


def draw_variations(panels: dict[str, dict[str, list[Curve]]], others: list[Curve], episodes: int) -> Figure:
    """Draw a panel for each variation, and in it the mean over the seeds; the usual setting is black."""
    rows, columns = (2, 2) if len(panels) > 2 else (1, len(panels))
    figure = Figure(figsize=(6 * columns, 4.2 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes, (variation, curves) in zip(grid, panels.items(), strict=False):
        dress(axes, episodes)
        colours = iter((ORANGE, PURPLE, GREEN, BLUE))
        for name, runs in curves.items():
            mean = np.mean([mean for mean, _ in runs], axis=0)
            colour = "black" if settings_of(variation)[name] == NumpySettings() else next(colours)
            line(axes, mean, color=colour, linewidth=2, label=f"{name}: {mean[-1]:.0f} at the end")
        for i, (mean, _) in enumerate(others):
            line(axes, mean, color=GREY, linewidth=1, label=None if i else "DQN, each seed")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        axes.set_title(TITLES[variation], loc="left", fontsize=11)
    for axes in figure.axes[::columns]:
        axes.set_ylabel("return, mean of 100 episodes\nand of the seeds")
    return figure


def main(args: Args) -> None:
    if args.dqn:
        try:
            import stable_baselines3  # noqa: F401
        except ImportError:
            raise SystemExit(
                "--dqn trains DQN from stable-baselines3, which is not installed: pip install "
                "stable-baselines3, or leave --dqn out."
            ) from None
    panels = {variation: settings_of(variation) for variation in args.variation}
    wanted = {s: name for chosen in panels.values() for name, s in chosen.items()} or {
        NumpySettings(): "NumPy"
    }
    found: dict[NumpySettings, list[Curve]] = {settings: [] for settings in wanted}
    for settings, name in wanted.items():
        for seed in args.seeds:
            found[settings].append(reinforce(replace(settings, seed=seed), args.episodes))
            tell(f"{name}, seed {seed}", found[settings][-1])
    others = []
    for seed in args.seeds if args.dqn else ():
        others.append(dqn(seed, args.dqn_steps))
        tell(f"DQN, seed {seed}", others[-1])
    if panels:
        drawn = {v: {name: found[s] for name, s in chosen.items()} for v, chosen in panels.items()}
        figure = draw_variations(drawn, others, args.episodes)
    else:
        figure = draw_seeds(found[NumpySettings()], others, args.episodes)
    figure.savefig(args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
