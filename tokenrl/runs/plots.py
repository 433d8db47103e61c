"""Draws the learning curve of a run as one PNG, with metrics of its health below the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tokenrl.runs.files import replacing
from tokenrl.runs.reader import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito: its colours differ for every kind of colour vision, and in grey by lightness.
_BLUE, _ORANGE, _GREEN, _INK, _GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8A8A8A"
_EVALUATIONS = (
    ("eval_reward", _BLUE, "s-", "held-out sampled"),
    ("eval_reward_greedy", _ORANGE, "o-", "held-out greedy"),
)
_LARGEST = 1e300  # a number that can be drawn
_LOSS = (("loss", "loss", "nats per token"),)
HEALTH = (
    ("entropy", "entropy", "nats per action"),
    ("completions/mean_length", "completion length", "tokens"),
    ("episode_length", "episode length", "steps"),
    ("explained_variance", "critic", "explained variance"),
    ("frac_reward_zero_std", "groups without signal", "fraction"),
    ("kl", "KL to the reference", "nats per completion"),
    ("grad_norm", "gradient norm", "before clipping"),
)


def drawable(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return `series` with values beyond 1e300 moved to there: means and ranges of axes would overflow."""
    steps, values = series(metrics, key)
    return steps, [min(max(value, -_LARGEST), _LARGEST) for value in values]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the centred running mean over `window` values (odd); the window shrinks at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def learning_curve(
    path: Path,
    metrics: Sequence[Mapping[str, Any]],
    *,
    title: str,
    solved: float | None = None,
    subtitle: str = "",
    curve: tuple[str, str] = ("reward", "mean reward"),
) -> Path:
    """Draw reward and evaluation by step, and below them the health metrics that were recorded.

    Args:
        path: where to write the PNG, of 1200 x 700 pixels.
        metrics: rows of metrics.jsonl; a missing key, null or NaN leaves a gap.
        title: heading of the figure.
        solved: the reward from which the task counts as solved, drawn as a line.
        subtitle: a line of small print below the title.
        curve: key and name of the metric in the large panel.
    """
    from matplotlib.figure import Figure

    trained = bool(series(metrics, curve[0])[0])  # else only evaluations are drawn, and the loss goes below
    health = [entry for entry in (*_LOSS[trained:], *HEALTH) if series(metrics, entry[0])[0]]
    figure = Figure(figsize=(12, 7), dpi=100, facecolor="white")
    figure.text(0.075, 0.94, _literal(title), fontsize=18, fontweight="bold", color=_INK)
    figure.text(0.075, 0.9, _literal(subtitle), fontsize=11.5, color="#555555")
    grid = figure.add_gridspec(1, 1, left=0.075, right=0.815, top=0.865, bottom=0.415 if health else 0.1)
    last = max((int(row["step"]) for row in metrics), default=0)
    _main_panel(figure.add_subplot(grid[0]), metrics, curve, solved, last)
    if health:
        grid = figure.add_gridspec(
            1, len(health), left=0.075, right=0.98, top=0.235, bottom=0.065, wspace=0.34
        )
        for column, (key, name, unit) in enumerate(health):
            _health_panel(figure.add_subplot(grid[column]), drawable(metrics, key), name, unit, last)
    save_figure(figure, path)
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's suffix, else PNG; the same figure gives the same bytes.

    Raises:
        Stopped: the figure could not be written; an old file is untouched.
    """
    kind = path.suffix[1:] or "png"
    with replacing(path) as partial:
        # Without this a PNG would name the version of matplotlib, and differ between versions.
        figure.savefig(partial, format=kind, metadata={"Software": None} if kind == "png" else None)


def _main_panel(
    axes: Axes,
    metrics: Sequence[Mapping[str, Any]],
    curve: tuple[str, str],
    solved: float | None,
    last: int,
) -> None:
    labels: list[tuple[float, str, str]] = []
    steps, rewards = drawable(metrics, curve[0])
    if steps:
        averaged = _draw_smoothed(axes, steps, rewards, color=_GREY, alpha=0.4, linewidth=2.2)
        labels.append((averaged[-1], "training", "#666666"))
    for key, colour, marker, name in _EVALUATIONS:
        steps, values = drawable(metrics, key)
        if steps:
            axes.plot(
                steps, values, marker, color=colour, markersize=7, linewidth=2.2, clip_on=False, zorder=5
            )
            labels.append((values[-1], name, colour))
    if solved is not None:
        axes.axhline(solved, color=_GREEN, linewidth=1.5, linestyle=(0, (6, 4)))
        place = ("axes fraction", "data")
        axes.annotate(f"solved: {solved:g}", (0.006, solved), xycoords=place, xytext=(0, 4), color=_GREEN,
                      textcoords="offset points", fontsize=11)  # fmt: skip
    _style(axes, last)
    axes.set_ylabel(curve[1], fontsize=12.5)
    axes.set_xlabel("step (policy updates; 0 is before training)", fontsize=12.5)
    axes.margins(y=0.08)
    _label_ends(axes, labels)


def _label_ends(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write name and last value of each curve at its right end, pushed apart so that no two overlap."""
    low, high = axes.get_ylim()
    places: list[float] = []
    for value, _, _ in sorted(labels):
        places.append(max([value, *(place + 0.075 * (high - low) for place in places[-1:])]))
    # All are shifted back by the mean distance that they were pushed; a single label stays at its value.
    shift = fmean([place - value for place, (value, _, _) in zip(places, sorted(labels), strict=True)] or [0])
    for place, (value, name, colour) in zip(places, sorted(labels), strict=True):
        axes.annotate(f"{value:.3g}  {name}", (1.018, place - shift), xycoords=("axes fraction", "data"),
                      va="center", color=colour, fontsize=11.5)  # fmt: skip


def _health_panel(axes: Axes, points: tuple[list[int], list[float]], name: str, unit: str, last: int) -> None:
    steps, values = points
    _draw_smoothed(axes, steps, values, color=_BLUE, alpha=0.25, linewidth=1.8)
    _style(axes, last, ticks=3)
    axes.set_title(name, fontsize=11.5, loc="left", color=_INK, pad=18)
    axes.text(0, 1.05, unit, transform=axes.transAxes, fontsize=9.5, color="#666666")
    if min(values) >= 0:
        axes.set_ylim(0, max(max(values) * 1.08, 1e-9))


def _draw_smoothed(
    axes: Axes, steps: list[int], values: list[float], *, color: str, alpha: float, linewidth: float
) -> list[float]:
    """Draw values faintly and their running mean above them; return the running mean."""
    averaged = smooth(values, 2 * (len(values) // 40) + 1)  # odd, and about a twentieth of the run
    marker = "o" if len(steps) == 1 else ""  # a line through one point would not be seen
    axes.plot(steps, values, color=color, alpha=alpha, linewidth=1, marker=marker, clip_on=False)
    axes.plot(steps, averaged, color=color, linewidth=linewidth)
    return averaged


def _style(axes: Axes, last: int, ticks: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5 if ticks > 3 else 3))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(colors="#444444", labelsize=11 if ticks > 3 else 9.5, length=3)
    axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)


def _literal(text: str) -> str:
    """Escape dollar signs, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")
