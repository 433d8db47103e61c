"""A walk on a line: a policy alone, with a value on the same layers, and with a value on layers of its own.

First a table. An episode of ten steps has a reward of 1 at the end and 0 before; with gamma 0.99 the return
of the action at step t is G_t = 0.99^(9 - t). A positive return makes the action taken more likely, and all
ten raw returns are positive, whatever was done. Normalised to mean 0 and sd 1, they make the first five
actions less likely and the last five more likely. Both are the estimator's own numbers; ddof of the sd is 0.

Then the walk. x starts at 0 and moves by 0.1 to the left or right. The episode ends when |x| exceeds 1, with
a reward of 1 on the right and -1 on the left; each step costs 0.01, and after 50 steps the episode is cut.
The best is eleven steps to the right, with a return of 0.89; random steps return -0.46, for most episodes are
cut. With a baseline the advantage is G_t - V(x) without a gradient through V, else it is G_t. "Shared" is one
network of two tanh layers with two outputs, and its loss is the policy's plus 0.5 times the value's;
"separate" has a second such network for the value. Gradients are clipped at norm 0.5.

Look for: the mean return of the last 100 of 400 episodes, and of all 400, seed by seed against no baseline.
All three end near the best. The shared value learns most slowly, because its loss also changes the layers
that the policy needs. A separate one is the fastest. Training without a baseline does well here, because 0
already lies between the good returns and the bad. Intervals are 95 %, by bootstrap over seeds. By default the
last 100 return 0.887 without a baseline, 0.883 with a shared value, 0.889 with a separate one; all 400, 0.55,
0.35 and 0.60.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl import Estimator, train_agent
from tokenrl.runs import read_metrics

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8A8A8A"
GAMMA, BEST = 0.99, 0.89
PLAIN = Estimator(baseline="none", returns="reward_to_go", gamma=GAMMA)
CRITIC = Estimator.preset("a2c", gamma=GAMMA)
KINDS = {"no baseline": (PLAIN, "shared"), "shared V": (CRITIC, "shared"), "separate V": (CRITIC, "separate")}
COLOURS = dict(zip(KINDS, ("#D55E00", "#0072B2", "#009E73"), strict=True))  # Okabe and Ito


@dataclass(frozen=True)
class Arguments:
    """Print the table of returns of ten steps, then learn the walk in three ways."""

    seeds: int = 10
    """Runs of each kind."""
    episodes: int = 400
    """Episodes of a run."""
    episodes_per_update: int = 4
    """Episodes per update."""
    hidden: tuple[int, ...] = (128, 128)
    """Units of each layer."""
    learning_rate: float = 1e-3
    """Learning rate of Adam."""
    output: Path = Path("walk.png")
    """Where the figure goes."""
    output_dir: Path = Path("runs/control_4_walk")
    """Directory of the runs."""


def ten_steps() -> tuple[torch.Tensor, torch.Tensor]:
    """Print and return the returns of ten actions, raw and normalised [10]."""
    rewards, mask = torch.zeros(1, 10, dtype=torch.double), torch.ones(1, 10, dtype=torch.bool)
    rewards[0, -1] = 1.0
    normal = replace(PLAIN, scale="token_whiten", scale_ddof=0, scale_eps=0)
    raw, normalised = (e.advantages(rewards, mask, group_size=None).policy[0] for e in (PLAIN, normal))
    print("  t  reward      G_t   normalised   the action taken becomes, raw / normalised")
    for t in range(10):
        words = " / ".join("more likely" if x > 0 else "less likely" for x in (raw[t], normalised[t]))
        print(f"{t:3} {rewards[0, t]:7.0f} {raw[t]:8.4f} {normalised[t]:12.4f}   {words}")
    return raw, normalised


def returns_of(args: Arguments, name: str) -> np.ndarray:
    """Train once per seed; returns the mean returns of the updates, [seeds, updates]."""
    estimator, value_network = KINDS[name]
    found = []
    for seed in range(args.seeds):
        result = train_agent(
            env="walk",
            estimator=estimator,
            hidden=args.hidden,
            value_network=value_network,
            value_coef=0.5,
            max_grad_norm=0.5,
            num_envs=args.episodes_per_update,
            max_steps=max(1, args.episodes // args.episodes_per_update),
            learning_rate=args.learning_rate,
            seed=seed,
            eval_every=0,
            eval_episodes=1,  # training episodes are on-policy and plenty
            output_dir=str(args.output_dir / name.replace(" ", "_") / f"seed_{seed}"),
            overwrite=True,
            quiet=True,
        )
        if result.exit_code:  # a signal ended the run; it is meant for the whole program
            raise SystemExit(result.exit_code)
        metrics = read_metrics(result.output_dir / "metrics.jsonl")
        found.append([row["reward"] for row in metrics[1:]])  # without the evaluation before
    return np.array(found)


def interval(x: np.ndarray) -> np.ndarray:
    """Return mean, low and high of the mean over the first axis, the seeds; 2000 resamples."""
    n = len(x)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2000) / n
    return np.concatenate([[x.mean(0)], np.quantile(weights @ x, (0.025, 0.975), axis=0)])


def say(x: np.ndarray) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*x)


def draw_learning(axes: Axes, runs: dict[str, np.ndarray], args: Arguments) -> None:
    for name, returns in runs.items():
        width = min(returns.shape[1], max(1, 20 // args.episodes_per_update))
        smooth = np.lib.stride_tricks.sliding_window_view(returns, width, axis=1).mean(-1)
        mean, low, high = interval(smooth)
        episodes = (np.arange(len(mean)) + width) * args.episodes_per_update
        axes.fill_between(episodes, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.plot(episodes, mean, color=COLOURS[name], linewidth=2, label=name)
    axes.axhline(BEST, color=GREY, linestyle=":", label="best possible")
    axes.set_xlabel("episodes (rolling mean of 20)")
    axes.set_ylabel("mean return of an episode")
    axes.legend(loc="lower right", frameon=False)


def draw_table(axes: Axes, raw: torch.Tensor, normalised: torch.Tensor) -> None:
    axes.axhline(0, color=GREY, linewidth=1)
    axes.plot(raw, "o-", color=ORANGE)
    axes.plot(normalised, "s-", color=BLUE)
    for text, at, shift, colour in (
        ("G_t: every action taken becomes likelier", (0, raw[0]), (0, 10), ORANGE),
        ("normalised:\nthe first five rarer", (3, normalised[3]), (10, -18), BLUE),
    ):
        axes.annotate(text, at, shift, textcoords="offset points", color=colour)
    axes.set_xlabel("step t of ten, the last pays 1")
    axes.set_ylabel("what the action is paid")


def main(args: Arguments) -> None:
    table = ten_steps()
    runs = {name: returns_of(args, name) for name in KINDS}
    tail, plain = max(1, 100 // args.episodes_per_update), runs["no baseline"]
    print(f"\nThe walk: mean returns over {args.seeds} seeds [95 % interval], and the gain over no baseline")
    for name, returns in runs.items():
        gains = [interval((returns - plain)[:, -n:].mean(1)) for n in (tail, returns.shape[1])]
        print(
            f"{name:12} last 100 episodes {say(interval(returns[:, -tail:].mean(1)))}, gain {say(gains[0])}"
        )
        print(f"{'':12} all {args.episodes} episodes  {say(interval(returns.mean(1)))}, gain {say(gains[1])}")
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_learning(left, runs, args)
    least = min(returns[:, -tail:].mean() for returns in runs.values())
    slowest = min(runs, key=lambda name: runs[name].mean())
    left.set_title(f"All end at {least:.2f} or more, the slowest is {slowest}", loc="left", fontsize=11)
    draw_table(right, *table)
    right.set_title("Ten steps, gamma 0.99: normalising turns half the signs", loc="left", fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EAEAEA", linewidth=0.8)
    figure.savefig(args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
