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

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from curves import draw_band, interval, save
from matplotlib.figure import Figure

import tokenrl
from tokenrl import Estimator

VARIANTS = {
    "with a baseline (rloo)": (Estimator.preset("rloo"), "#0072B2"),  # Okabe and Ito
    "without (reinforce)": (Estimator.preset("reinforce"), "#D55E00"),
}
AGENT = {
    "env": "CartPole-v1",
    "num_envs": 64,
    "learning_rate": 1e-2,
}  # episodes that start alike: a group
MODEL = {"task": "sort_digits", "prompts_per_step": 16, "num_generations": 8}
UNITS = {"CartPole-v1": "episodes", "sort_digits": "completions"}
BINS = 5  # points of each curve of squared norms


def train_all(seeds: int, updates: int, steps: int) -> pd.DataFrame:
    """Train both with the same objects; returns a row for each update, by side, variant and seed."""
    tables = []
    for seed in range(seeds):
        for variant, (estimator, _) in VARIANTS.items():
            common = {"estimator": estimator, "seed": seed, "eval_every": 0}
            common |= {"overwrite": True, "quiet": True}
            folder = Path("runs/control_contrast") / f"{estimator.preset_name}-seed{seed}"
            results = (
                tokenrl.train_agent(
                    **AGENT, **common, max_steps=updates, output_dir=str(folder / "control")
                ),
                tokenrl.train(
                    **MODEL, **common, max_steps=steps, output_dir=str(folder / "language")
                ),
            )
            for side, result in zip(UNITS, results, strict=True):
                rows = pd.DataFrame(result.metrics[1:])
                labels = {"side": side, "variant": variant, "seed": seed}
                tables.append(rows[["step", "reward", "grad_norm"]].assign(**labels))
                print(f"seed {seed}, {side}, {variant}: reward {result.eval_after['reward']:.4g}")
    return pd.concat(tables)


def points_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return mean reward, mean squared norm and the ends of its interval, by bin of rewards and variant.

    How noisy a gradient is depends on how good the policy is, and the variants learn at different speeds: so
    they are compared at equal rewards. The bins hold equally many updates, of all variants together.
    """
    edges = np.quantile(rows["reward"], np.linspace(0, 1, BINS + 1)[1:-1])
    bins = np.digitize(rows["reward"], edges)
    points = {}
    for key, members in rows.groupby([bins, "variant"]):
        points[key] = [members["reward"].mean(), *interval(members["grad_norm"] ** 2)]
    columns = ["reward", "square", "low", "high"]
    return pd.DataFrame(points, index=columns).T.rename_axis(["bin", "variant"])


def ratio_of(points: pd.DataFrame) -> float:
    """Return the squared norm without the baseline over that with it: the median over the bins of both."""
    squares = points["square"].unstack()
    ours, theirs = (squares[variant] for variant in VARIANTS)
    return float((theirs / ours).median())


def draw(table: pd.DataFrame) -> Figure:
    """Draw rewards by update, and squared norms by reward, of the agent and of the model."""
    figure = Figure(figsize=(12, 8.5), dpi=100, layout="constrained")
    ratios = []
    for side, above, below in zip(UNITS, *figure.subplots(2, 2), strict=True):
        rows = table[table["side"] == side]
        points = points_of(rows)
        ratios.append(f"{ratio_of(points):.2g} times as large on {side}")
        for variant, (_, colour) in VARIANTS.items():
            rewards = rows[rows["variant"] == variant].pivot(
                index="seed", columns="step", values="reward"
            )
            draw_band(above, rewards.columns, rewards.to_numpy(), colour, variant)
            each = points.xs(variant, level="variant")
            below.plot(each["reward"], each["square"], "o-", color=colour)
            below.vlines(each["reward"], each["low"], each["high"], color=colour, alpha=0.6)
        reward = f"mean reward of the update's {UNITS[side]}"
        above.set(title=side, ylim=(0, None), xlabel="update", ylabel=reward)
        below.set(yscale="log", xlabel=reward, ylabel="mean |g|² ((reward per unit of weight)²)")
        above.legend(frameon=False, loc="lower right")
    title = f"Without the baseline |g|² is {' and '.join(ratios)}, at equal rewards"
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel("bands: 95 % over seeds; bars: 95 % of a bootstrap over updates", fontsize=9)
    print(title)
    return figure


def main(
    seeds: int = 3, updates: int = 40, steps: int = 60, output: Path = Path("contrast.png")
) -> None:
    """Train an agent and a language model with one estimator, with and without a baseline.

    Args:
        seeds: Runs of each kind.
        updates: Updates of the agent.
        steps: Updates of the language model.
        output: Where the figure goes.
    """
    torch.set_num_threads(1)  # networks so small gain nothing from more
    save(draw(train_all(seeds, updates, steps)), output)


if __name__ == "__main__":
    tyro.cli(main)
