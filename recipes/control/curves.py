"""How the programs of this folder train agents, and print and draw means over seeds with their 95 % intervals.

An interval is a percentile bootstrap of the mean over seeds: the seeds are drawn anew with replacement, 2,000
times from a fixed seed, so that the same runs always give the same interval. With few seeds it is too narrow:
where the scores of seeds are normally distributed, it covers the mean in 85 of 100 cases with five seeds and
in 93 with twenty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl import train_agent
from tokenrl.runs import read_metrics

GREY = "#8A8A8A"
PALE = "#EAEAEA"


def trained(folder: Path, **settings: Any) -> tuple[Any, pd.DataFrame]:
    """Train an agent into a folder; returns the result, and a row of metrics for each update.

    It is not evaluated: the episodes of training are on-policy and plenty.
    """
    settings |= {"eval_every": 0, "eval_episodes": 1, "overwrite": True, "quiet": True}
    result = train_agent(output_dir=str(folder), **settings)
    metrics = read_metrics(result.output_dir / "metrics.jsonl")
    return result, pd.DataFrame(metrics[1:])  # the first line is the evaluation before training


def resampled(rows: int, replicates: int = 2000) -> np.ndarray:
    """Return weights [replicates, rows] of rows that are drawn with replacement; they sum to 1."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), replicates) / rows


def interval(values: np.ndarray | list[float]) -> np.ndarray:
    """Return mean, low and high [3, ...] of the mean over the first axis of values [S, ...], the seeds."""
    values = np.asarray(values, dtype=float)
    ends = np.quantile(resampled(len(values)) @ values, (0.025, 0.975), axis=0)
    return np.concatenate([[values.mean(0)], ends])


def with_interval(bounds: np.ndarray, form: str = ".3f") -> str:
    """Write what `interval` returned of one number: the mean, and low and high in brackets."""
    mean, low, high = (format(number, form) for number in bounds)
    return f"{mean} [{low}, {high}]"


def mean_with_interval(values: np.ndarray | list[float], form: str = ".3f") -> str:
    """Write the mean of values [S] over seeds, and its interval in brackets."""
    return with_interval(interval(values), form)


def rolling(values: np.ndarray, window: int) -> np.ndarray:
    """Return the means [S, T - window + 1] of each `window` values in [S, T]; at most T of them."""
    window = min(window, values.shape[1])
    return np.lib.stride_tricks.sliding_window_view(values, window, axis=1).mean(-1)


def draw_band(
    axes: Axes, x: np.ndarray, curves: np.ndarray, colour: str, label: str | None = None
) -> None:
    """Draw the mean over seeds of curves [S, T] at x [T], in a band of its interval."""
    mean, low, high = interval(curves)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=2, label=label)


def draw_rolling(
    axes: Axes, curves: np.ndarray, window: int, colour: str, label: str, episodes: int = 1
) -> None:
    """Draw the rolling mean of curves [S, updates] over the episodes played, with so many in an update."""
    means = rolling(curves, window)
    updates = np.arange(curves.shape[1] - means.shape[1], curves.shape[1]) + 1
    draw_band(axes, updates * episodes, means, colour, label)


def draw_mean(axes: Axes, x: float, values: np.ndarray, colour: str, marker: str = "o") -> None:
    """Draw the mean of values [S] at x, with its interval as a bar."""
    mean, low, high = interval(values)
    axes.errorbar(x, mean, [[mean - low], [high - mean]], fmt=marker, color=colour, capsize=4)


def save(figure: Figure, path: Path) -> None:
    """Write a figure; its panels are open above and to the right, with a pale grid."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=PALE, linewidth=0.8)
    figure.savefig(path)
    print(f"figure: {path}")
