"""Draws every preset by how far its expected gradient points from that of J, and how noisy it is.

`tokenrl lab exact --figure map.png` draws all estimators of the lab, numbered; this map has the presets
alone, by name, on one small problem: two prompts, four completions of each, rewards of any size. Every step
that can be drawn is enumerated. Noise is `tr Var g / |E g|^2`, which no constant factor of the loss changes.

Look for: the exact presets differ only in noise, and RLOO has the least of them here. The few presets with
less noise have an angle; GRPO is both noisier and biased. Where a point lies depends on the problem; that the
exact ones lie at 0 degrees does not.
"""

import math
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.core import PRESETS
from tokenrl.lab import Moments, exact_moments, tabular_problem

COLOURS = {  # Okabe and Ito, by the declared status; `tokenrl lab exact` checks the declarations
    "exact": "#009E73",
    "exact_up_to_scale": "#0072B2",
    "exact_per_prompt": "#CC79A7",
    "asymptotic": "#E69F00",
    "biased": "#D55E00",
}
MEANING = {
    "exact": "exact",
    "exact_up_to_scale": "exact up to one factor",
    "exact_per_prompt": "exact for each prompt by itself",
    "asymptotic": "exact in the limit of many rows a step",
    "biased": "biased",
}


def angle(moments: Moments) -> float:
    """Degrees between E[g] and grad J."""
    return math.degrees(math.acos(max(-1.0, min(1.0, moments.cosine))))


def merged(measured: dict[str, Moments]) -> list[tuple[float, float, str, str]]:
    """Give (angle, noise, status, names) of every place; names at one place share it."""
    places: dict[tuple[float, float, str], list[str]] = {}
    for name, moments in measured.items():
        place = (round(angle(moments), 2), float(f"{moments.noise:.3g}"), Estimator.preset(name).bias_status)
        places.setdefault(place, []).append(name)
    return [(*place, ", ".join(names)) for place, names in places.items()]


def spread(heights: list[float], gap: float) -> list[float]:
    """Push sorted heights apart until neighbours are `gap` from each other, and keep their mean."""
    groups: list[list[float]] = []  # runs of labels that touch: their wanted centres, one a label
    for height in heights:
        groups.append([height])
        while (
            len(groups) > 1
            and centre(groups[-1]) - centre(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [centre(g) + gap * (i - (len(g) - 1) / 2) for g in groups for i in range(len(g))]


def centre(group: list[float]) -> float:
    return sum(group) / len(group)


def draw(places: list[tuple[float, float, str, str]]) -> Figure:
    figure = Figure(figsize=(11, 6.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.6), sharey=True)
    for axes, chosen, gap in (
        (left, [p for p in places if p[0] < 0.01], 0.036),
        (right, [p for p in places if p[0] >= 0.01], 0.03),
    ):
        chosen = sorted(chosen, key=lambda place: place[1])
        heights = [math.log10(noise) for _, noise, _, _ in chosen]
        for (degrees, noise, status, names), height in zip(chosen, spread(heights, gap), strict=True):
            x = 0.0 if axes is left else degrees
            axes.scatter([x], [noise], color=COLOURS[status], s=55, zorder=3, edgecolors="white")
            shift = 0.25 if axes is left else 0.55
            axes.plot([x, x + shift], [noise, 10**height], color=COLOURS[status], linewidth=0.7, zorder=2)
            axes.annotate(names, (x + shift, 10**height), (2, 0), textcoords="offset points", va="center",
                          fontsize=9, color=COLOURS[status])  # fmt: skip
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#EAEAEA", linewidth=0.8)
    left.set_xlim(-0.2, 3)
    left.set_xticks([0], ["0"])
    right.set_xlim(0, 36)
    left.set_yticks([0.7, 1, 1.5, 2, 3, 4], ["0.7", "1", "1.5", "2", "3", "4"])
    left.set_yticks([], minor=True)
    left.set_ylabel("noise: tr Var g / |E g|²")
    right.set_xlabel("angle between the expected gradient and that of J, degrees")
    for status, colour in COLOURS.items():
        right.scatter([], [], color=colour, s=45, label=MEANING[status])
    right.legend(frameon=False, loc="upper right", fontsize=9)
    left.set_title("The right direction", loc="left")
    right.set_title("Another direction", loc="left")
    return figure


def main(output: Path = Path("map.png"), estimators: tuple[str, ...] = tuple(PRESETS)) -> None:
    problem = tabular_problem(1, prompts=2, group_size=4, vocabulary=2, rewards="continuous")
    measured = {name: exact_moments(Estimator.preset(name), problem) for name in estimators}
    for name, moments in sorted(measured.items(), key=lambda item: angle(item[1])):
        print(f"{name:24} angle {angle(moments):6.2f}   noise {moments.noise:6.3f}   "
              f"{Estimator.preset(name).bias_status}")  # fmt: skip
    draw(merged(measured)).savefig(output)
    print(f"figure: {output}")


if __name__ == "__main__":
    tyro.cli(main)
