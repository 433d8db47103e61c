"""The tables and figures of the study, one function for each question, from the raw tables.

Each takes the axes to draw on and the part of the study, and returns the cells of a table. Differences are
judged by the code of `tokenrl compare`, as one family of comparisons for each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from choice import judged_at_best_rates
from judging import (
    BLUE,
    COLOURS,
    COPY,
    MARGIN,
    ORANGE,
    describe,
    forest,
    interval,
    judged_differences,
    judged_table,
    rank_correlation,
    resampling,
    score_cell,
    signed,
    verdict_cell,
)
from matplotlib.axes import Axes

STUDY = Path(__file__).parent
TABLES = STUDY / "tables"
COPIES = {
    "1_sort_digits": {"dr_grpo": "= rloo", "opo": "= rloo", "reinforce_pp": "≈ reinforce_baseline"},
    "1_reverse_text": {"dr_grpo": "= rloo", "reinforce_pp": "≈ reinforce_baseline"},
    "8_cartpole": {"dr_grpo": "= rloo", "reinforce_baseline": "= rloo"},
    "12_sort_digits": {"grpo_no_std": "= rloo"},
    "8_acrobot": {"dr_grpo": "= rloo", "reinforce_baseline": "= rloo"},
}
"""For each part the arms whose gradient is the gradient of another arm, times a constant (=) or times a number
for each step (≈). On sort_digits opo is a copy up to a few completions of another length. On reverse_text
reinforce_pp weights completions by their lengths in its mean."""


AGAINST_RLOO = "area minus the area of rloo (grey band: within the margin)"


class Part(NamedTuple):
    """The arms and the margin of a plan, and the raw tables of its comparison, without the runs for tuning."""

    arms: list[str]
    margin: float
    runs: pd.DataFrame
    curves: pd.DataFrame


@cache
def read(part: str) -> Part:
    """Read the plan and the raw tables of a comparison."""
    plan = yaml.safe_load((STUDY / f"{part}.yaml").read_text())
    runs = pd.read_csv(TABLES / part / "runs.csv").query("role == 'comparison'")
    curves = pd.read_csv(TABLES / part / "curves.csv").query("role == 'comparison' and samples > 0")
    return Part(plan["arms"], plan["margin"], runs, curves)


@cache
def judged(part: str, metric: str = "area") -> Any:
    """Judge the arms of a part against its first arm, as its plan says."""
    return judged_table(read(part).runs, metric, read(part).margin)


def mark_of(part: str, arm: str) -> str:
    """Return the mark of a copy, with a space before it; nothing for another arm."""
    mark = COPIES.get(part, {}).get(arm, "")
    return mark and f" {mark}"


def marked_score(part: str, family: Any, scores: Any, digits: int = 3) -> str:
    """Return the cell of an arm's difference to the reference, with the mark of a copy."""
    return score_cell(family, scores, digits) + mark_of(part, scores.arm)


def by_arm(rows: dict[str, list[str]], *heads: str) -> pd.DataFrame:
    """Return the cells of a table that has a row for each arm."""
    return by_name("arm", rows, *heads).rename(index="`{}`".format)


def by_name(index: str, rows: dict[str, list[str]], *heads: str) -> pd.DataFrame:
    """Return the cells of a table, whose rows have these names."""
    cells = pd.DataFrame.from_dict(rows, orient="index", columns=list(heads))
    return cells.rename_axis(index)


def rates(axes: Axes, part: str) -> pd.DataFrame:
    """Questions 1 and 8: differences to rloo, filled at each arm's own rate, hollow at one rate for all."""
    runs, margin = read(part).runs, read(part).margin
    family = judged(part)
    own = runs.groupby("arm")["learning_rate"].mean()
    digits = 3 if margin < 1 else 1
    rows = {}
    for scores in family.arms:
        verdict = marked_score(part, family, scores, digits)
        rows[scores.arm] = [f"{verdict}, at {own[scores.arm]:g}"]
    title = f"{part[2:].replace('shifted', 'sort_digits with rewards + 1')}: each arm at its own best rate"
    copies = COPIES.get(part, {})
    forest(axes, family.against_reference, margin, 0.14, copies=copies)
    if (TABLES / f"{part}_fixed").exists():
        fixed = judged(f"{part}_fixed").against_reference
        title += " (hollow: all at 2e-4)"
        forest(axes, fixed, margin, -0.14, hollow=True, copies=copies)
    axes.set_yticklabels([arm + mark_of(part, arm) for arm in family.against_reference])
    describe(axes, title, AGAINST_RLOO)
    if margin < 1:
        axes.set_xlim(-0.15, 0.09)  # the same for all tasks
    return by_arm(rows, "area against rloo, own rate")


def division(axes: Axes, part: str) -> pd.DataFrame:
    """Question 2: the area with the division by the standard deviation minus that without, in every cell."""
    areas: dict[str, pd.Series] = {}
    rows: dict[str, list[str]] = {}
    for kind in ("adamw_8", "adamw_2", "sgd_8", "sgd_2"):
        plan = read(f"2_{kind}")
        optimiser, _, size = kind.partition("_")
        rewards = plan.curves.pivot(index="path", columns="samples", values="reward")
        by_arm = plan.runs.set_index("seed").groupby(["problem", "arm"])
        for task in plan.runs["problem"].unique():
            cell = f"{optimiser}, G = {size}, {task.rpartition(':')[2]}"
            without, divided = (by_arm.get_group((task, arm)) for arm in plan.arms)
            areas[cell] = divided["area"] - without["area"]
            gaps = rewards.loc[divided["path"]].to_numpy() - rewards.loc[without["path"]].to_numpy()
            chosen = [f"{arm['learning_rate'].iloc[0]:g}" for arm in (without, divided)]
            rows[cell] = [*chosen, signed(interval(gaps[:, -1], 0.05 / 8))]
    judge_cells(axes, areas, rows, 2, "grpo minus grpo_no_std, each at its own rate")
    heads = ["rate without", "rate with", "area, with minus without"]
    heads.append("reward at the last evaluation, with minus without (exploratory)")
    return by_name("cell", rows, *heads)


def judge_cells(
    axes: Axes, areas: dict[str, pd.Series], rows: dict[str, list[str]], column: int, title: str
) -> None:
    """Draw the differences in area of all cells, and put the verdict of each into a column of its row."""
    differences = judged_differences(areas)
    for cell, cells in rows.items():
        cells.insert(column, verdict_cell(differences, cell))
    forest(axes, differences)
    describe(axes, title, "difference in area (grey band: within the margin)")


def entropy(axes: Axes, part: str) -> pd.DataFrame:
    """Question 3: one curve R = -a exp(H) + b for all arms, and what each arm leaves over."""
    curves = read(part).curves.dropna(subset="entropy")
    arms = [scores.arm for scores in judged(part).arms]
    a, b = fit_curve(curves)
    deviations = curves["reward"] - b + a * np.exp(curves["entropy"])
    residuals = deviations.groupby([curves["arm"], curves["path"]]).mean()
    error = np.sqrt((deviations**2).mean())
    slopes = {}
    for arm, of_arm in curves.groupby("arm"):
        slopes[arm] = np.array([fit_curve(run)[0] for _, run in of_arm.groupby("path")])
    grid = np.linspace(curves["entropy"].min(), curves["entropy"].max(), 100)
    axes.plot(grid, b - a * np.exp(grid), color="black", lw=1)
    rows = {}
    for arm in arms:
        left = interval(residuals[arm], 0.05 / len(arms))
        against = f"rloo has {slopes['rloo'].mean():.2f}"
        if arm != "rloo":
            against = signed(interval(slopes[arm] - slopes["rloo"], 0.05 / 8))
        rows[arm] = [f"{signed(left)} {curve_verdict(*left)}", against]
        means = curves[curves["arm"] == arm].groupby("samples")[["entropy", "reward"]].mean()
        name = arm + mark_of(part, arm)
        colour = COLOURS[COPY] if arm in COPIES[part] else None
        axes.plot(means["entropy"], means["reward"], "o-", ms=3, lw=1, label=name, color=colour)
    title = f"{part[2:]}: R = {b:.2f} - {a:.2f} exp(H), error {error:.3f}"
    describe(axes, title, "entropy H of a token, nats", "held-out sampled reward R")
    axes.legend(fontsize=8, frameon=False)
    return by_arm(rows, "reward left over", "a minus rloo's (exploratory)")


def curve_verdict(_: float, low: float, high: float) -> str:
    """Say whether an interval of residuals lies within the margin, beyond it, or across it."""
    if low > -MARGIN and high < MARGIN:
        return "on the curve"
    return "off the curve" if low > MARGIN or high < -MARGIN else "undecided"


def fit_curve(curves: pd.DataFrame) -> tuple[float, float]:
    """Return a and b of the curve R = -a exp(H) + b through evaluations, by least squares."""
    slope, b = np.polyfit(np.exp(curves["entropy"]), curves["reward"], 1)
    return -slope, b


def signs(axes: Axes, part: str) -> pd.DataFrame:
    """Question 4: area and pass@8 with positive and negative advantages weighted."""
    measured = pd.read_csv(TABLES / part / "pass8.csv")
    sampled = measured[measured["arm"] != "base"]
    pass_at_8 = judged_table(sampled, "pass@8")
    family = judged(part)
    last = at_the_end(read(part).curves).groupby("arm")["entropy"].mean()
    rows = {}
    for scores, passed in zip(family.arms, pass_at_8.arms, strict=True):
        cells = [score_cell(family, scores), score_cell(pass_at_8, passed)]
        rows[scores.arm.rpartition(":")[2]] = [*cells, f"{last[scores.arm]:.3f}"]
    forest(axes, family.against_reference, up=0.14)
    forest(axes, pass_at_8.against_reference, up=-0.14, hollow=True)
    title = f"{part[2:]}: area (filled) and pass@8 at the end (hollow)"
    describe(axes, title, "difference to rloo (grey band: within the margin)")
    return by_arm(rows, "area against rloo", "pass@8 against rloo", "entropy at the end")


CLIPS = ("none", ".2", ".2/.28", "CISPO", "sequence")
"""What the arms of each plan are called, in the plan's order: ways to clip, and none."""


def clipping(axes: Axes, part: str) -> pd.DataFrame:
    """Question 5: the area of each way to clip, minus that without a ratio."""
    areas: dict[str, pd.Series] = {}
    rows: dict[str, list[str]] = {}
    for updates in (2, 4, 8):
        plan = read(f"5_updates_{updates}")
        last = at_the_end(plan.curves).set_index("path")["entropy"]
        by_seed = plan.runs.assign(entropy=plan.runs["path"].map(last)).set_index("seed")
        named = zip(CLIPS, plan.arms, strict=True)
        clips = {name: by_seed[by_seed["arm"] == arm] for name, arm in named}
        for name, clip in clips.items():
            cell = f"{updates} updates, {name}"
            against = ""
            if name != ".2":
                against = signed(interval(clip["entropy"] - clips[".2"]["entropy"], 0.05))
            if name != "none":
                areas[cell] = clip["area"] - clips["none"]["area"]
            rows[cell] = [f"{clip['learning_rate'].iloc[0]:g}", against]
    judge_cells(axes, areas, rows, 1, "area minus that without a ratio, each at its own rate")
    heads = ["own rate", "area against none", "entropy against .2 (exploratory, 95 %)"]
    return by_name("cell", rows, *heads)


def noise(axes: Axes, part: str) -> pd.DataFrame:
    """Question 6: the noise of each arm beside its area, with the rank correlation over arms."""
    measured = pd.read_csv(TABLES / part / "noise.csv").set_index(["policy", "arm"])
    half_way = measured.loc["half way"]
    rows = {}
    for arm, area in areas(part).items():
        at_half = half_way.loc[arm]
        x = at_half["noise"]
        middle = "{noise:.3g} [{low:.3g}, {high:.3g}]".format(**at_half)
        rows[arm] = [f"{measured['noise']['start', arm]:.3g}", middle]
        colour = BLUE if at_half["bias"] == "exact" else ORANGE
        axes.plot(x, area, "o", color=colour)
        name = arm + mark_of(part, arm)
        axes.annotate(name, (x, area), (6, 3), textcoords="offset points", fontsize=8)
    correlation = correlations(half_way["noise"].round(9), areas(part), part)
    x_name = "noise after 50 steps (blue: unbiased, orange: biased)"
    title = f"{part[2:]}: rank correlation {correlation}"
    describe(axes, title, x_name, "area at its own rate")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    return by_arm(rows, "noise at the start", "noise after 50 steps")


def rank_of(arm: str) -> str:
    """Return the rank of the adapter of an arm, in words."""
    settings = dict(setting.split("=") for setting in arm.split(",")[1:])
    return f"rank {settings['lora_r']}" if "lora_r" in settings else "all weights"


def lora(axes: Axes, part: str) -> pd.DataFrame:
    """Question 7: the area over the rate for each rank, its peak, and the ends at the best rates."""
    first = read("7_lora").runs
    full = first[first["arm"].map(rank_of) == "all weights"]
    runs = pd.concat([full, read(part).runs]).drop_duplicates("path")
    ranks = runs["arm"].map(rank_of)
    samples = [np.arange(6), *np.random.default_rng(0).integers(0, 6, (10_000, 6))]  # six seeds
    arms: dict[str, np.ndarray] = {}
    peaks: dict[str, np.ndarray] = {}
    for rank, of_rank in runs.groupby(ranks, sort=False):
        by_rate = of_rank.pivot(index="learning_rate", columns="seed")
        areas = by_rate["area"]
        axes.plot(areas.index, areas.mean(axis=1), "o-", ms=4, lw=1, label=rank)
        values = areas.to_numpy()
        peaks[rank] = np.array([peak(areas.index, values[:, rows].mean(1)) for rows in samples])
        arms[rank] = np.array([areas, by_rate["reward"]])
    _, family = judged_at_best_rates({rank: scores[:1] for rank, scores in arms.items()})
    _, last = judged_at_best_rates(arms)
    alpha = "alpha = 32" if part == "7_lora_factor" else "alpha = 2 rank"
    rows = {}
    for rank, best in peaks.items():
        label = rank if rank == "all weights" else f"{rank}, {alpha}"
        ratio = resampling(best / peaks["all weights"])
        rows[label] = [resampling(best), ratio, family[rank], last[rank]]
    describe(axes, f"mean area at each rate, {alpha}", "learning rate", "area")
    axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False)
    heads = ["best rate (95 %)", "ratio to all weights", "area against all weights"]
    heads.append("reward at the end against all weights")
    return by_name("arm", rows, *heads)


def actions(axes: Axes, part: str) -> pd.DataFrame:
    """Question 8: the differences to rloo of an agent, and the rank correlation with sort_digits."""
    cells = rates(axes, part)
    if part.endswith("default"):
        return cells
    correlation = correlations(areas("1_sort_digits"), areas(part), "1_sort_digits", part)
    title = f"{part[2:]}: rank correlation with sort_digits {correlation}"
    axes.set_title(title, loc="left", size=10)
    return cells


def zero(axes: Axes, part: str) -> pd.DataFrame:
    """Question 9: on each base the difference to no baseline, over the noise of both arms at the start."""
    left, right, bottom, top = 0.12, 2, -0.18, 0.28
    axes.fill_between([left, 1], 0, top, color="#e3f1ea", lw=0)
    axes.fill_between([1, right], bottom, 0, color="#e3f1ea", lw=0)
    bases = pd.read_csv(TABLES / part / "bases.csv")
    pretrained = pd.read_csv(TABLES / part / "pretrained.csv")
    groups = [(f"six bases of {task}", of_task) for task, of_task in bases.groupby("task")]
    groups.append(("SmolLM2, 135 M weights", pretrained))
    for (label, group), colour in zip(groups, (ORANGE, BLUE, "black"), strict=True):
        x, y = group["ratio"], group["mean"]
        axes.errorbar(
            x, y, fmt="o", lw=1, color=colour, label=label,
            xerr=(x - group["low"], group["high"] - x),
            yerr=(y - group["mean_low"], group["mean_high"] - y),
        )  # fmt: skip
    old = pd.read_csv(TABLES / part / "old.csv")
    gaps = [-judged(name).against_reference["reinforce"].mean.value for name in old["part"]]
    axes.plot(old["ratio"], gaps, "o", mfc="white", color="black", label="bases of question 1")
    names = old["part"].str[2:].replace("shifted", "sort_digits, rewards + 1")
    points = [*zip(names, old["ratio"], gaps, strict=True)]
    points.append(("SmolLM2, rewards + 1", *pretrained.loc[1, ["ratio", "mean"]]))
    for name, *point in points:
        axes.annotate(name, point, (7, -3), textcoords="offset points", size=8)
    axes.text(0.3, 0.1, "rloo is quieter\nand learns more", ha="center", size=9)
    axes.text(1.4, -0.165, "no baseline is quieter\nand learns more", ha="center", size=9)
    axes.set(xscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.set_xticks([0.15, 0.2, 0.4, 0.7, 1, 1.4], ["0.15", "0.2", "0.4", "0.7", "1", "1.4"])
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    title = "The arm that is quieter at the start learns more, on most bases (green)"
    x_name = "variance of a step of rloo at the start, as a multiple of that without a baseline"
    describe(axes, title, x_name, "area of rloo minus that without a baseline")
    return predictions(bases)


def predictions(bases: pd.DataFrame) -> pd.DataFrame:
    """Write for each base what was measured and predicted beside the difference that came of it."""
    rows = {}
    for base in bases.itertuples():
        ratio = f"{base.ratio:.2f} [{base.low:.2f}, {base.high:.2f}]"
        area = signed((base.mean, base.mean_low, base.mean_high))
        outcome = {1: "right", 0: "open", -1: "wrong"}[base.predicted * base.observed]
        cells = [f"{base.reward:.2f}", f"{base.constant:.2f}", ratio, area]
        rows[f"{base.task} {base.base}"] = [*cells, outcome if base.predicted else "none made"]
    heads = ["reward at the start", "quietest constant", "noise of rloo / none (95 %)"]
    return by_name("base", rows, *heads, "area, rloo minus none (95 %)", "prediction")


def areas(part: str) -> pd.Series:
    """Return the mean area of each arm."""
    return pd.Series({scores.arm: scores.mean for scores in judged(part).arms})


def peak(rates: Sequence[float], areas: np.ndarray) -> float:
    """Return the rate at the top of the parabola through the best point and its neighbours, over log2."""
    top = int(np.argmax(areas))
    if top in (0, len(areas) - 1):
        return rates[top]
    before, highest, after = areas[top - 1 : top + 2]
    return rates[top] * 2 ** (0.5 * (before - after) / (before - 2 * highest + after))


def at_the_end(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the last evaluations of the runs."""
    return curves[curves["samples"] == curves["samples"].max()]


def correlations(x: pd.Series, y: pd.Series, *parts: str) -> str:
    """Write the planned rank correlation over all arms, and the one without copies below it."""
    shared = x.index.intersection(y.index)
    distinct = shared
    for part in parts:
        distinct = distinct.difference([a for a, mark in COPIES[part].items() if mark[0] == "="])
    planned = signed(rank_correlation(x[shared], y[shared]), 2)
    without = signed(rank_correlation(x[distinct], y[distinct]), 2)
    return f"{planned}\nwithout copies {without}, {len(distinct)} arms"
