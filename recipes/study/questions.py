"""The tables and figures of the study, one function for each question, from the raw tables.

Each takes the axes to draw on and the part of the study, and returns a table in Markdown. Differences are
judged by the code of `tokenrl compare`, as one family of comparisons for each table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from scipy import stats

import tokenrl
from tokenrl.lab import judge_scores

STUDY = Path(__file__).parent
TABLES = STUDY / "tables"
MARGIN = 0.02
COLOURS = {"better": "#007a58", "worse": "#c24e00", "equivalent": "#0072b2", "undecided": "#77777f"}
COPIES = {
    "1_sort_digits": {"dr_grpo": "= rloo", "opo": "= rloo", "reinforce_pp": "≈ reinforce_baseline"},
    "1_reverse_text": {"dr_grpo": "= rloo", "reinforce_pp": "≈ reinforce_baseline"},
    "8_cartpole": {"dr_grpo": "= rloo", "reinforce_baseline": "= rloo"},
    "8_acrobot": {"dr_grpo": "= rloo", "reinforce_baseline": "= rloo"},
}
"""For each part the arms whose gradient is that of another arm, times one number (=), or times a number for
each step (≈). opo on sort_digits is one but for the few completions of another length; reinforce_pp on
reverse_text weights the completions in its mean by their lengths."""


class Part(NamedTuple):
    """The raw tables of a comparison, without the runs for tuning, and its margin."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    margin: float


@cache
def read(part: str) -> Part:
    """Read the raw tables of a comparison."""
    runs, curves = (pd.read_csv(TABLES / part / f"{name}.csv") for name in ("runs", "curves"))
    plan = yaml.safe_load((STUDY / f"{part}.yaml").read_text())
    ours, curves = (of[of["role"] == "comparison"] for of in (runs, curves))
    return Part(ours, curves[curves["samples"] > 0], plan["margin"])


@cache
def judged(part: str, metric: str = "area") -> Any:
    """Judge the arms of a part against its first arm, as its plan says."""
    (family,) = judge_scores(read(part).runs, metric=metric, margin=read(part).margin).families
    return family


def judged_differences(differences: Mapping[str, Mapping[int, float]]) -> Any:
    """Judge differences that have references of their own, by cell and seed, as one family."""
    rows = [("none", seed, 0.0) for seed in next(iter(differences.values()))]
    rows += [(cell, seed, value) for cell, of in differences.items() for seed, value in of.items()]
    return judge_scores(rows, margin=MARGIN).families[0].against_reference


def told(family: Any, scores: Any, digits: int = 3) -> list[str]:
    """Return three cells: the mean of an arm, its difference to the reference, and the verdict."""
    return [f"{scores.mean:.{digits}f}", *verdict(family.against_reference, scores.arm)]


def verdict(against: Mapping[str, Any], label: str) -> list[str]:
    """Return two cells: the difference of an arm or cell to the reference, and the verdict."""
    return (
        [against[label].interval, against[label].verdict] if label in against else ["", "reference"]
    )


def marked(part: str, arm: str, before: str = " ", tick: str = "`") -> str:
    """Return the name of an arm, and of which arm it is a copy."""
    return (tick + arm + tick + before + COPIES.get(part, {}).get(arm, "")).rstrip()


def forest(
    axes: Axes, against: Mapping[str, Any], margin: float, up: float = 0, hollow: bool = False
) -> None:
    """Draw differences with their intervals, one below the other."""
    axes.axvspan(-margin, margin, color="#dcdce0", lw=0)
    axes.axvline(0, color="#5f5f66", lw=1)
    for place, one in enumerate(against.values()):
        colour, ends = COLOURS.get(one.verdict, "black"), one.adjusted
        axes.plot([ends.low, ends.high], [place - up] * 2, color=colour, lw=1 if hollow else 2)
        axes.plot(
            one.mean.value, place - up, "o", color=colour, mfc="white" if hollow else colour, ms=7
        )
    axes.set_yticks(range(len(against)), [label.rpartition(":")[2] for label in against])
    axes.set_ylim(len(against) - 0.5, -0.5)


def rates(axes: Axes, part: str) -> str:
    """Questions 1 and 8: differences to rloo, filled at each arm's own rate, hollow at one rate for all."""
    parts = [name for name in (part, f"{part}_fixed") if (TABLES / name).exists()]
    (runs, _, margin), rows = read(part), []
    chosen, clipped = (
        runs.groupby("arm")[name].mean() for name in ("learning_rate", "grad_clipped")
    )
    greedy = judged(part, "area_greedy").against_reference
    for each in zip(*(judged(name).arms for name in parts), strict=True):
        arm = each[0].arm
        cells = [marked(part, arm), tokenrl.Estimator.preset(arm).bias_status]
        cells += [f"{chosen[arm]:g}", f"{clipped[arm]:.0%}"]
        for name, scores in zip(parts, each, strict=True):
            cells += told(judged(name), scores, 3 if margin < 1 else 1)
        rows.append([*cells, greedy[arm].interval if arm in greedy else ""])
    for name, up in zip(parts, (0.14, -0.14), strict=False):
        forest(axes, judged(name).against_reference, margin, up, hollow=name != part)
    axes.set_yticklabels([marked(part, arm, "\n", "") for arm in greedy])
    at_one = " (hollow: all at 2e-4)" * (len(parts) - 1)
    task = part[2:].replace("shifted", "sort_digits with rewards + 1")
    axes.set_title(f"{task}: each arm at its own best rate{at_one}", loc="left", size=10)
    if margin < 1:
        axes.set_xlim(-0.15, 0.09)  # the same for all tasks
    axes.set_xlabel("area minus that of rloo (grey: within the margin)")
    heads = [
        "arm",
        "declared bias",
        "own rate",
        "clipped updates",
        "area",
        "against rloo",
        "verdict",
    ]
    heads += ["area at 2e-4", "against rloo", "verdict"] * (len(parts) - 1)
    return table([*heads, "greedy area against rloo, own rate (exploratory)"], rows)


def division(axes: Axes, part: str) -> str:
    """Question 2: the area with the division by the standard deviation minus that without, in every cell."""
    areas, shown, ends = dict[str, Any](), dict[str, list[str]](), dict[str, list[str]]()
    for kind in ("adamw_8", "adamw_2", "sgd_8", "sgd_2"):
        runs, curves, _ = read(f"2_{kind}")
        at = curves.pivot(index="path", columns="samples", values="reward")
        for task, of in runs.groupby("problem"):
            optimiser, _, size = kind.partition("_")
            cell = f"{optimiser}, G = {size}, {task.rpartition(':')[2]}"
            presets, by_seed = of["arm"].str.split(",").str[0], of.set_index("seed")
            without, divided = (by_seed[(presets == a).to_numpy()] for a in ("grpo_no_std", "grpo"))
            chosen = [f"{one['learning_rate'].iloc[0]:g}" for one in (without, divided)]
            shown[cell] = [*chosen, f"{without['area'].mean():.3f}"]
            areas[cell] = (divided["area"] - without["area"]).to_dict()
            apart = (at.loc[one["path"]].to_numpy() for one in (divided, without))
            early_late = np.subtract(*apart)[:, [0, -1]].T
            ends[cell] = [signed(interval(values, 0.05 / 8)) for values in early_late]
    against = judged_differences(areas)
    forest(axes, against, MARGIN)
    axes.set_title("grpo minus grpo_no_std, each at its own rate", loc="left", size=10)
    axes.set_xlabel("difference in area (grey: within the margin)")
    rows = [[c, *shown[c], *verdict(against, c), *ends[c]] for c in areas]
    heads = ["cell", "rate without", "rate with", "area without", "with minus without", "verdict"]
    return table(
        [*heads, "reward at the first evaluation (exploratory)", "at the last (exploratory)"], rows
    )


def entropy(axes: Axes, part: str) -> str:
    """Question 3: one curve R = -a exp(H) + b for all arms, and what each arm leaves over."""
    curves = read(part).curves.query("entropy == entropy")
    labels = [arm.arm for arm in judged(part).arms]
    over = {}
    for score in ("reward_greedy", "reward"):
        a, b = through(curves, score)
        left = curves[score] - b + a * np.exp(curves["entropy"])
        over[score] = left.groupby([curves["arm"], curves["path"]]).mean()
    slopes = {
        arm: [through(run)[0] for _, run in of.groupby("path")] for arm, of in curves.groupby("arm")
    }
    heats = np.linspace(curves["entropy"].min(), curves["entropy"].max(), 100)
    axes.plot(heats, b - a * np.exp(heats), color="black", lw=1)
    error, rows = float(np.sqrt((left**2).mean())), []
    last = at_the_end(curves).groupby("arm")["entropy"].mean()
    for arm in labels:
        found = {score: interval(of[arm], 0.05 / len(labels)) for score, of in over.items()}
        _, low, high = found["reward"]
        says = "on the curve" if low > -MARGIN and high < MARGIN else "undecided"
        says = "off the curve" if low > MARGIN or high < -MARGIN else says
        words = {score: signed(one) for score, one in found.items()}
        apart = (
            signed(interval(np.subtract(slopes[arm], slopes["rloo"]), 0.05 / 8))
            if arm != "rloo"
            else ""
        )
        cells = [
            marked(part, arm),
            f"{last[arm]:.3f}",
            words["reward"],
            says,
            words["reward_greedy"],
        ]
        rows.append([*cells, f"{np.mean(slopes[arm]):.2f}", apart])
        each = curves[curves["arm"] == arm].groupby("samples")[["entropy", "reward"]].mean()
        axes.plot(
            each["entropy"], each["reward"], "o-", ms=3, lw=1, label=marked(part, arm, tick="")
        )
    axes.set_title(
        f"{part[2:]}: R = {b:.2f} - {a:.2f} exp(H), error {error:.3f}", loc="left", size=10
    )
    axes.set_xlabel("entropy H of a token, nats")
    axes.set_ylabel("held-out sampled reward R")
    axes.legend(fontsize=8, frameon=False)
    heads = ["arm", "entropy at the end", "reward left over", "verdict", "greedy reward left over"]
    return table([*heads, "a of each run, mean (exploratory)", "that minus that of rloo"], rows)


def through(curves: pd.DataFrame, score: str = "reward") -> tuple[float, float]:
    """Return a and b of the curve R = -a exp(H) + b through evaluations, by least squares."""
    slope, b = np.polyfit(np.exp(curves["entropy"]), curves[score], 1)
    return -slope, b


def signs(axes: Axes, part: str) -> str:
    """Question 4: area and pass@8 with positive and negative advantages weighted."""
    measured = pd.read_csv(TABLES / part / "pass8.csv")
    sampled, base = (measured[(measured["arm"] == "base") == is_base] for is_base in (False, True))
    (wide,) = judge_scores(sampled, metric="pass@8", margin=MARGIN).families
    bias = sampled.groupby("arm")["bias"].first()
    (runs, curves, _), family, rows = read(part), judged(part), []
    chosen = runs.groupby("arm")["learning_rate"].first()
    heat = at_the_end(curves).groupby("arm")["entropy"].mean()
    for one, other in zip(family.arms, wide.arms, strict=True):
        cells = [f"`{one.arm.rpartition(':')[2]}`", bias[one.arm], f"{chosen[one.arm]:g}"]
        for scores, of in ((one, family), (other, wide)):
            cells += told(of, scores)
        rows.append([*cells, f"{heat[one.arm]:.3f}"])
    mean, low, high = (base["pass@8"].agg(name) for name in ("mean", "min", "max"))
    draws = f"{len(base)} draws: {low:.3f} to {high:.3f}"
    rows.append(["the base model", *[""] * 5, f"{mean:.3f}", draws, "", ""])
    forest(axes, family.against_reference, MARGIN, 0.14)
    forest(axes, wide.against_reference, MARGIN, -0.14, hollow=True)
    axes.set_title(f"{part[2:]}: area (filled) and pass@8 at the end (hollow)", loc="left", size=10)
    axes.set_xlabel("minus that of rloo (grey: within the margin)")
    heads = ["arm", "measured bias", "own rate", "area", "against rloo", "verdict"]
    return table([*heads, "pass@8", "against rloo", "verdict", "entropy at the end"], rows)


CLIPS = {
    "none": "epsilon=1e-6",
    ".2": "token",
    ".2/.28": "0.28",
    "CISPO": "epsilon_high=4",
    "sequence": "product",
}


def clipping(axes: Axes, part: str) -> str:
    """Question 5: the area of each way to clip, minus that without a ratio."""
    areas, shown = dict[str, Any](), dict[str, list[str]]()
    for updates in (2, 4, 8):
        runs, curves, _ = read(f"5_updates_{updates}")
        last = at_the_end(curves).set_index("path")["entropy"]
        arms = dict(zip(CLIPS, runs["arm"].unique(), strict=True))
        assert all(CLIPS[name] in arm for name, arm in arms.items())
        of = {name: runs[runs["arm"] == arm].set_index("seed") for name, arm in arms.items()}
        heat = {name: mine["path"].map(last) for name, mine in of.items()}
        for name, mine in of.items():
            cell = f"{updates} updates, {name}"
            hotter = "" if name == ".2" else signed(interval(heat[name] - heat[".2"], 0.05))
            means = [f"{one.mean():.3f}" for one in (mine["area"], heat[name])]
            shown[cell] = [f"{mine['learning_rate'].iloc[0]:g}", *means, hotter]
            if name != "none":
                areas[cell] = (mine["area"] - of["none"]["area"]).to_dict()
    against = judged_differences(areas)
    forest(axes, against, MARGIN)
    axes.set_title("area minus that without a ratio, each at its own rate", loc="left", size=10)
    axes.set_xlabel("difference in area (grey: within the margin)")
    rows = [[c, *shown[c][:2], *verdict(against, c), *shown[c][2:]] for c in shown]
    heads = ["cell", "own rate", "area", "against none", "verdict", "entropy at the end"]
    return table([*heads, "that minus that of .2 (exploratory, 95 %)"], rows)


def noise(axes: Axes, part: str) -> str:
    """Question 6: the noise of each arm beside its area, with the rank correlation over arms."""
    family, rows = judged(part), []
    measured = pd.read_csv(TABLES / part / "noise.csv").set_index(["policy", "arm"])
    for arm in family.arms:
        here, before = measured.loc[("half way", arm.arm)], measured.loc[("start", arm.arm)]
        cells = [marked(part, arm.arm), here["bias"], f"{before['noise']:.3g}"]
        rows.append(
            [*cells, "{noise:.3g} [{low:.3g}, {high:.3g}]".format(**here), f"{arm.mean:.3f}"]
        )
        colour, copy = "#0072b2" if here["bias"] == "exact" else "#c24e00", arm.arm in COPIES[part]
        look = {"mfc": "none", "ms": 9} if copy else {}
        axes.plot(here["noise"], arm.mean, "o", color=colour, **look)
        shift = (5, -10 if copy else 4)
        axes.annotate(
            arm.arm, (here["noise"], arm.mean), shift, textcoords="offset points", fontsize=8
        )
    heard = measured["noise"].loc["half way"].round(9)
    found = correlations(heard, areas(part), part)
    axes.set_title(f"{part[2:]}: rank correlation {found}", loc="left", size=10)
    axes.set_xscale("log")
    axes.set_xlabel(
        "noise of a step's gradient after 50 steps (blue: unbiased; ring: a copy of another arm)"
    )
    axes.set_ylabel("area at its own rate")
    return table(
        ["arm", "declared bias", "noise at the start", "noise after 50 steps", "area"], rows
    )


def lora(axes: Axes, part: str) -> str:
    """Question 7: the area over the rate for each rank, its peak, and the ends at the best rates."""
    full = read("7_lora").runs.query("not arm.str.contains('lora_r')")
    runs = pd.concat([full, read(part).runs]).drop_duplicates("path")
    at_best, peaks = list[pd.DataFrame](), dict[str, np.ndarray]()
    ranks = runs["arm"].str.extract(r"lora_r=(\d+)")[0].radd("rank ").fillna("all weights")
    takes = np.random.default_rng(0).integers(
        0, runs["seed"].nunique(), (10_000, runs["seed"].nunique())
    )
    for rank, of in runs.groupby(ranks, sort=False):
        areas = of.pivot(index="seed", columns="learning_rate", values="area")
        axes.plot(areas.columns, areas.mean(), "o-", ms=4, lw=1, label=rank)
        means = [areas.to_numpy().mean(0), *(areas.to_numpy()[take].mean(0) for take in takes)]
        peaks[rank] = np.array([peak(areas.columns.to_numpy(), mean) for mean in means])
        others = of["seed"].map({seed: areas.drop(seed).mean().idxmax() for seed in areas.index})
        at_best.append(of[of["learning_rate"] == others].assign(arm=rank))
    scores, rows = pd.concat(at_best), []
    family, last = (
        judge_scores(scores, metric=name, margin=MARGIN).families[0] for name in ("area", "reward")
    )
    for arm, end in zip(family.arms, last.arms, strict=True):
        best, ratio = peaks[arm.arm], peaks[arm.arm] / peaks["all weights"]
        ends = [
            "{:.3g} [{:.3g}, {:.3g}]".format(x[0], *np.quantile(x[1:], [0.025, 0.975]))
            for x in (best, ratio)
        ]
        rows.append([arm.arm, *ends, *told(family, arm), *told(last, end)])
    axes.set_xscale("log")
    alpha = "alpha = 32" if part == "7_lora_factor" else "alpha = 2 rank"
    axes.set_title(f"mean area at each rate, {alpha}", loc="left", size=10)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("area")
    axes.legend(fontsize=8, frameon=False)
    heads = ["arm", "best rate (95 %)", "divided by that of all weights", "area at its own rate"]
    heads += [
        "against all weights",
        "verdict",
        "reward at the end",
        "against all weights",
        "verdict",
    ]
    return table(heads, rows)


def actions(axes: Axes, part: str) -> str:
    """Question 8: the differences to rloo of an agent, and the rank correlation with sort_digits."""
    text = rates(axes, part)
    found = correlations(areas("1_sort_digits"), areas(part), "1_sort_digits", part)
    axes.set_title(f"{part[2:]}: rank correlation with sort_digits {found}", loc="left", size=10)
    return text


def areas(part: str) -> pd.Series:
    """Return the mean area of each arm."""
    return pd.Series({arm.arm: arm.mean for arm in judged(part).arms})


def peak(rates: np.ndarray, areas: np.ndarray) -> float:
    """Return the rate at the top of the parabola through the best point and its neighbours, over log2."""
    top = int(np.argmax(areas))
    if top in (0, len(areas) - 1):
        return float(rates[top])
    left, middle, right = areas[top - 1 : top + 2]
    return float(rates[top] * 2 ** (0.5 * (left - right) / (left - 2 * middle + right)))


def at_the_end(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the last evaluations of the runs."""
    return curves[curves["samples"] == curves["samples"].max()]


def signed(found: Iterable[float], digits: int = 3) -> str:
    """Write a number that has a sign, and its interval."""
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*found, d=digits)


def correlations(x: pd.Series, y: pd.Series, *parts: str) -> str:
    """Write the rank correlation over all arms, as planned, and below it that without copies."""
    shared = x.index.intersection(y.index)
    copies = [arm for part in parts for arm, mark in COPIES[part].items() if mark[0] == "="]
    few = shared.difference(copies)
    planned, without = (signed(rank_correlation(x[arms], y[arms]), 2) for arms in (shared, few))
    return f"{planned}\nwithout copies {without}, {len(few)} arms"


def rank_correlation(x: pd.Series, y: pd.Series) -> tuple[float, float, float]:
    """Return Spearman's correlation with a 95 % interval from all resamplings of the arms."""
    n = len(x)
    takes = np.array(list(combinations_with_replacement(range(n), n)))
    chances = stats.multinomial.pmf(
        (takes[:, :, None] == np.arange(n)).sum(1), n, np.full(n, 1 / n)
    )
    a, b = (stats.rankdata(of.to_numpy()[takes], axis=1) - (n + 1) / 2 for of in (x, y))
    spread = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    found = (a * b).sum(1) / np.where(spread, spread, np.inf)
    chances = np.where(
        spread, chances, 0
    )  # no correlation where all arms of a resampling are the same
    order = found.argsort()
    low, high = np.searchsorted(chances[order].cumsum() / chances.sum(), [0.025, 0.975])
    return float(stats.spearmanr(x, y)[0]), float(found[order[low]]), float(found[order[high]])


def interval(values: Sequence[float], alpha: float) -> tuple[float, float, float]:
    """Return the mean of some runs with its Student-t interval."""
    low, high = stats.ttest_1samp(values, 0).confidence_interval(1 - alpha)
    return float(np.mean(values)), float(low), float(high)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])
