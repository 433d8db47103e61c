"""What the questions of the study share: judged tables of scores, intervals, and how both are drawn and written."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from tokenrl.lab import judge_scores

MARGIN = 0.02
BLUE, ORANGE = "#0072b2", "#c24e00"
COLOURS = {"better": "#007a58", "worse": ORANGE, "equivalent": BLUE, "undecided": "#26262b"}
COPY = "copy of another arm"
COLOURS[COPY] = "#8e8e97"


def judged_table(scores: Any, metric: str = "score", margin: float = MARGIN) -> Any:
    """Judge a table of scores of one problem: one family of comparisons with the first arm."""
    (family,) = judge_scores(scores, metric=metric, margin=margin).families
    return family


def judged_differences(differences: Mapping[str, pd.Series], margin: float = MARGIN) -> Any:
    """Judge differences that have references of their own, by cell and seed, as one family."""
    seeds = next(iter(differences.values())).index
    rows = [("none", seed, 0.0) for seed in seeds]
    for cell, by_seed in differences.items():
        rows += [(cell, seed, value) for seed, value in by_seed.items()]
    return judged_table(rows, margin=margin).against_reference


def score_cell(family: Any, scores: Any, digits: int = 3) -> str:
    """Return the difference of an arm to the reference and the verdict, or the mean of the reference."""
    reference = f"reference, {scores.mean:.{digits}f}"
    return verdict_cell(family.against_reference, scores.arm, reference)


def verdict_cell(differences: Mapping[str, Any], label: str, reference: str = "reference") -> str:
    """Return the difference of an arm or cell to the reference and the verdict."""
    if label not in differences:
        return reference
    return f"{differences[label].interval} {differences[label].verdict}"


def forest(
    axes: Axes,
    differences: Mapping[str, Any],
    margin: float = MARGIN,
    up: float = 0,
    hollow: bool = False,
    copies: Container[str] = (),
) -> None:
    """Draw differences with their intervals, one below the other, in the colours of their verdicts."""
    axes.axvspan(-margin, margin, color="#e9e9ee", lw=0)
    axes.axvline(0, color="#b9b9c2", lw=1)
    for row, (label, difference) in enumerate(differences.items()):
        kind = COPY if label in copies else difference.verdict
        colour = COLOURS[kind]
        ends = difference.adjusted
        axes.plot([ends.low, ends.high], [row - up] * 2, color=colour, lw=1 if hollow else 2)
        fill = "white" if hollow else colour
        value = difference.mean.value
        axes.plot(value, row - up, "o", color=colour, mfc=fill, ms=7, label=kind)
        if not hollow:
            number = f"{value:+.3f}" if margin < 1 else f"{value:+.0f}"
            axes.annotate(
                number, (value, row - up), (0, 6),
                textcoords="offset points", ha="center", size=8, color=colour,
            )  # fmt: skip
    axes.set_yticks(range(len(differences)), [label.rpartition(":")[2] for label in differences])
    axes.set_ylim(len(differences) - 0.5, -0.6)


def explain_colours(figure: Figure) -> None:
    """Explain below a figure the colours of all verdicts that its panels show."""
    shown = {line.get_label() for axes in figure.axes for line in axes.lines}
    names = [name for name in COLOURS if name in shown]
    if names:
        dots = [Line2D([], [], marker="o", ls="", color=COLOURS[name]) for name in names]
        figure.legend(dots, names, loc="outside lower center", ncols=len(names), frameon=False)


def describe(axes: Axes, title: str, x: str, y: str = "") -> None:
    """Write a title and the names of the axes."""
    axes.set_title(title, loc="left", size=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def resampling(values: np.ndarray) -> str:
    """Write the first number, with the 95 % interval of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:.3g} [{low:.3g}, {high:.3g}]"


def signed(interval: Iterable[float], digits: int = 3) -> str:
    """Write a number that has a sign, and its interval."""
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*interval, d=digits)


def rank_correlation(x: pd.Series, y: pd.Series) -> tuple[float, float, float]:
    """Return Spearman's correlation with a 95 % interval from all resamplings of the arms."""
    n = len(x)
    samples = np.array(list(combinations_with_replacement(range(n), n)))
    counts = (samples[:, :, None] == np.arange(n)).sum(1)
    chances = stats.multinomial.pmf(counts, n, np.full(n, 1 / n))
    a = stats.rankdata(x.to_numpy()[samples], axis=1) - (n + 1) / 2
    b = stats.rankdata(y.to_numpy()[samples], axis=1) - (n + 1) / 2
    spread = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    defined = spread > 0  # where a resampling has only equal arms, there is no correlation
    values = (a * b).sum(1)[defined] / spread[defined]
    order = values.argsort()
    shares = chances[defined][order].cumsum() / chances[defined].sum()
    low, high = values[order][np.searchsorted(shares, [0.025, 0.975])]
    return stats.spearmanr(x, y)[0], low, high


def interval(values: Sequence[float], alpha: float) -> tuple[float, float, float]:
    """Return the mean of some runs with its Student-t interval."""
    low, high = stats.ttest_1samp(values, 0).confidence_interval(1 - alpha)
    return np.mean(values), low, high


def half_width(spread: float, pairs: int, comparisons: int) -> float:
    """Return half the width of a Student-t interval from the standard deviation of pairs, at 5 % shared by some."""
    return stats.t.ppf(1 - 0.025 / comparisons, pairs - 1) * spread / np.sqrt(pairs)


def table(cells: pd.DataFrame) -> str:
    """Write cells in Markdown, with the labels of the rows in the first column."""
    heads = [str(cells.index.name), *cells.columns]
    rows = [heads, ["---"] * len(heads), *([label, *row] for label, *row in cells.itertuples())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
