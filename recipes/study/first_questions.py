"""The numbers of questions 1 to 8, computed from the raw tables with pandas and scipy.

The function of a page yields pairs. The first is the label of a row, and the second is the next cell of that row that
is not empty; or the label is empty, and the second is a part of a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from intervals import (
    MARGIN,
    Interval,
    at_best_rates_of_others,
    chosen,
    prose,
    rank_correlation,
    student,
)

TABLES = Path(__file__).parent / "tables"
RLOO = "rloo"
SORT, REVERSE, COUNTDOWN = "1_sort_digits", "1_reverse_text", "1_countdown"
SHIFTED = "1_shifted"
CLIPS = ("none", ".2", ".2/.28", "CISPO", "sequence")
"""The names of question 5 for its arms, in the order of the plans."""
Numbers = Iterator[tuple[str, str]]


@cache
def runs(part: str) -> pd.DataFrame:
    """Return the runs of a part without those for tuning; an arm keeps the settings that name it."""
    table = pd.read_csv(TABLES / part / "runs.csv").query("role == 'comparison'")
    arms = table["arm"].str.rpartition(":")[2]
    return table.assign(arm=arms.str.replace(",(optimizer|learning_rate)=.*", "", regex=True))


@cache
def curves(part: str) -> pd.DataFrame:
    """Return the evaluations of these runs but the first, with the arm and seed of each."""
    table = pd.read_csv(TABLES / part / "curves.csv").query("samples > 0").drop(columns="arm")
    return table.merge(runs(part)[["path", "arm", "seed"]], on="path")


def by_seed(table: pd.DataFrame, metric: str = "area") -> pd.DataFrame:
    """Return the scores of runs by seed, with a column for each arm in the order of the plan."""
    return table.pivot(index="seed", columns="arm", values=metric)[table["arm"].unique()]


def scores(part: str, metric: str = "area") -> pd.DataFrame:
    """Return the scores of a part's runs by seed and arm."""
    return by_seed(runs(part), metric)


def gaps(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the score of each arm but the first minus that of the first, by seed."""
    return scores.iloc[:, 1:].sub(scores.iloc[:, 0], axis="index")


def against(gaps: pd.DataFrame | Mapping[str, pd.Series]) -> dict[str, Interval]:
    """Return the interval of each difference; they are one family."""
    return {arm: student(gaps[arm], len(gaps.keys())) for arm in gaps}


def pair(scores: pd.DataFrame, arm: str, other: str, comparisons: int = 1) -> Interval:
    """Return the interval of an arm minus another."""
    return student(scores[arm] - scores[other], comparisons)


def column(scores: pd.DataFrame, margin: float = MARGIN, decimals: int = 3) -> dict[str, str]:
    """Return the cell of each arm: the mean of the first, the differences to it of the others."""
    first = scores.columns[0]
    cells = {first: f"reference, {scores[first].mean():.{decimals}f}"}
    return cells | {arm: gap.cell(margin) for arm, gap in against(gaps(scores)).items()}


def tuned(part: str, margin: float = MARGIN, decimals: int = 3) -> Numbers:
    """Yield the differences to rloo of a part, each arm at its own rate."""
    rates = scores(part, "learning_rate").mean()
    for arm, cell in column(scores(part), margin, decimals).items():
        yield arm, f"{cell}, at {rates[arm]:g}"


def tuned_rates() -> Numbers:
    """Question 1: the differences of all arms, and of pairs of arms."""
    for part in (SORT, REVERSE, COUNTDOWN, SHIFTED):
        yield from tuned(part)
    ahead, behind, reverse = (
        against(gaps(scores(part)))["reinforce"].by for part in (SORT, SHIFTED, REVERSE)
    )
    yield "", f"ahead {ahead} with rewards of 0 and 1, and behind {behind} with 1 added."
    yield "", f"It is behind {reverse} on reverse_text and equivalent on countdown."
    sort, text, greedy = scores(SORT), scores(REVERSE), scores(REVERSE, "area_greedy")
    mean, running = "reinforce_baseline", "reinforce_running_mean"
    yield "", f"mean of the step {pair(sort, running, mean, 21).by_interval}"
    yield "", f"REINFORCE++ {pair(sort, running, 'reinforce_pp', 21).by_interval}"
    yield "", f"OPO is ahead of the running mean {pair(text, 'opo', running, 21).by_interval}"
    moved = scores(SHIFTED) - 1 - sort
    yield "", f"area of `reinforce` {student(moved['reinforce']).by_interval} (95 %)"
    yield "", f"its greedy area is lower {pair(greedy, 'reinforce', RLOO, 8).by_interval} at own"
    greedy = scores(f"{SORT}_fixed", "area_greedy")
    ahead = pair(greedy, "reinforce", RLOO).by_interval
    yield "", f"`reinforce` is ahead {ahead} (95 %, six seeds)"
    sampled = scores(SORT, "reward").mean()
    ends = [prose(sampled[arm], 2) for arm in ("reinforce", RLOO)]
    yield "", "`reinforce` ends at {} sampled and RLOO at {};".format(*ends)


def division() -> Numbers:
    """Question 2: the area with the division by the standard deviation minus that without, in every cell."""
    tables = {}
    for kind in ("adamw_8", "adamw_2", "sgd_8", "sgd_2"):
        optimiser, _, size = kind.partition("_")
        for task, table in runs(f"2_{kind}").groupby("problem", sort=False):
            tables[f"{optimiser}, G = {size}, {task.rpartition(':')[2]}"] = table
    for label, table in tables.items():
        for rate in by_seed(table, "learning_rate").mean():
            yield label, f"{rate:g}"
    areas = against({label: gaps(by_seed(table))["grpo"] for label, table in tables.items()})
    for label, area in areas.items():
        yield label, area.cell()
        yield label, student(gaps(by_seed(tables[label], "reward"))["grpo"], 8).signed()
    moved = [prose(areas[f"sgd, G = 2, {task}"].mean) for task in ("like", "unlike")]
    yield "", "It still moves the area by {} and {} with SGD.".format(*moved)


def fit_curve(table: pd.DataFrame, reward: str = "reward") -> np.ndarray:
    """Return -a and b of the curve R = -a exp(H) + b through evaluations, by least squares."""
    return np.polyfit(np.exp(table["entropy"]), table[reward], 1)


def left_over(part: str, judged: str = "", reward: str = "reward") -> pd.DataFrame:
    """Return the evaluations of a part with what they leave over of one curve, fitted without the judged arm."""
    table = curves(part).dropna(subset="entropy")
    curve = fit_curve(table[table["arm"] != judged], reward)
    return table.assign(left=table[reward] - np.polyval(curve, np.exp(table["entropy"])))


def mean_left_over(part: str, arm: str, judged: str = "", reward: str = "reward") -> Interval:
    """Return the interval of what an arm leaves over, at 5 % shared by nine arms."""
    table = left_over(part, judged, reward).query("arm == @arm")
    return student(table.groupby("seed")["left"].mean(), 9)


def curve_verdict(left: Interval) -> str:
    """Say whether an interval lies within the margin, beyond it, or across it."""
    if max(-left.low, left.high) <= MARGIN:
        return "on the curve"
    return "off the curve" if max(left.low, -left.high) > MARGIN else "undecided"


def entropy() -> Numbers:
    """Question 3: what each arm leaves over of the one curve of all arms, and how its own slope differs."""
    for part in (SORT, REVERSE):
        runs_of_arms = left_over(part).groupby(["arm", "seed"])
        slopes = {run: -fit_curve(table)[0] for run, table in runs_of_arms}
        slopes = pd.Series(slopes).unstack(0)
        for arm in scores(part):
            left = mean_left_over(part, arm)
            yield arm, f"{left.signed()} {curve_verdict(left)}"
            slope = f"rloo has {slopes[RLOO].mean():.2f}"
            if arm != RLOO:
                slope = pair(slopes, arm, RLOO, 8).signed()
            yield arm, slope
    alone = {part: mean_left_over(part, "reinforce", "reinforce") for part in (SORT, REVERSE)}
    words = f"{alone[SORT].by_interval} on sort_digits and {alone[REVERSE].by_interval}"
    yield "", f"`reinforce` is below the others' curve {words} on reverse_text."
    sort = mean_left_over(SORT, "reinforce")
    greedy = mean_left_over(SORT, "reinforce", reward="reward_greedy")
    yield "", f"`reinforce` is below the curve {sort.by}, and {greedy.by} in greedy reward"


def pass_at_8(part: str) -> pd.DataFrame:
    """Return pass@8 by seed, with a column for each arm; `base` is the base model, drawn ten times."""
    table = pd.read_csv(TABLES / part / "pass8.csv")
    return by_seed(table.assign(arm=table["arm"].str.rpartition(":")[2]), "pass@8")


def last_entropy(part: str) -> pd.DataFrame:
    """Return the entropy at the last evaluation by seed and arm."""
    table = curves(part)
    last = table[table["samples"] == table["samples"].max()]
    return by_seed(last, "entropy")


def signs() -> Numbers:
    """Question 4: area and pass@8 with positive and negative advantages weighted."""
    for part in ("4_sort_digits", "4_countdown"):
        passed = pass_at_8(part)
        sampled = passed.drop(columns="base").dropna()
        for cells in (column(scores(part)), column(sampled)):
            yield from cells.items()
        for arm, last in last_entropy(part).mean().items():
            yield arm, f"{last:.3f}"
    countdown = against(gaps(sampled))
    raised, lowered = countdown["negatives_none"].by, countdown["positives_none"].by
    words = f"positive samples alone raise it {raised} over RLOO, negative samples alone lower it"
    yield "", f"{words} {lowered}."
    ends = [prose(passed[arm].mean(), 2) for arm in ("positives_none", "base")]
    yield "", "Negative samples alone end at {}, and the base model has {}.".format(*ends)


def named_clips(table: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of question 5 with the names of the ways to clip."""
    return table.set_axis(CLIPS, axis="columns")


def clipping() -> Numbers:
    """Question 5: the area of each way to clip, minus that without a ratio."""
    parts = {updates: f"5_updates_{updates}" for updates in (2, 4, 8)}
    areas = {updates: named_clips(scores(part)) for updates, part in parts.items()}
    labels = {}
    for updates, table in areas.items():
        labels |= {f"{updates} updates, {name}": gap for name, gap in gaps(table).items()}
    verdicts = against(labels)
    for updates, part in parts.items():
        rates = named_clips(scores(part, "learning_rate")).mean()
        ends = named_clips(last_entropy(part))
        for name in CLIPS:
            label = f"{updates} updates, {name}"
            yield label, f"{rates[name]:g}"
            yield label, verdicts[label].cell() if label in verdicts else "reference"
            if name != ".2":
                yield label, pair(ends, name, ".2").signed()
    against_clip = [pair(table, "CISPO", ".2", 3).text() for table in areas.values()]
    yield "", "At 2, 4 and 8 updates the difference is {}, {} and {}.".format(*against_clip)
    first = by_seed(runs("5_updates_1")).nunique(axis="columns")
    assert first.eq(1).all(), "with one update the areas of question 5 differ"


def noise() -> Numbers:
    """Question 6: the noise of each arm at two policies, and its rank correlation with the area."""
    correlations, pairs = [], []
    for part in (SORT, REVERSE):
        table = pd.read_csv(TABLES / part / "noise.csv").set_index(["policy", "arm"])
        half_way = table.loc["half way"]
        for arm in scores(part):
            yield arm, f"{table['noise']['start', arm]:.3g}"
            yield arm, "{noise:.3g} [{low:.3g}, {high:.3g}]".format(**half_way.loc[arm])
        correlation = rank_correlation(half_way["noise"].round(9), scores(part).mean())
        correlations.append(correlation.text(2))
        within = []
        for arms in combinations(scores(part), 2):
            if half_way.loc[[*arms], "noise"].max() >= 1.2 * half_way.loc[[*arms], "noise"].min():
                within.append(pair(scores(part), *arms).verdict() == "equivalent")
        pairs.append(f"{sum(within)} of {len(within)}")
    yield "", "{} on sort_digits and {} on reverse_text".format(*correlations)
    yield "", "lie within .02 in area**: {} and {} (95 % each)".format(*pairs)


def peak(rates: pd.Index, areas: np.ndarray) -> float:
    """Return the rate at the top of the parabola through the best point and its neighbours, over log2."""
    top = int(np.argmax(areas))
    if top in (0, len(areas) - 1):
        return rates[top]
    before, highest, after = areas[top - 1 : top + 2]
    return rates[top] * 2 ** (0.5 * (before - after) / (before - 2 * highest + after))


def resampled(values: np.ndarray) -> str:
    """Return the first number, with the 95 % interval of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:.3g} [{low:.3g}, {high:.3g}]"


def lora() -> Numbers:
    """Question 7: the best rate of each rank, and area and reward at the end against all weights."""
    samples = [np.arange(6), *np.random.default_rng(0).integers(0, 6, (10_000, 6))]  # six seeds
    full = runs("7_lora").query("arm == 'rloo'")
    for alpha, part in {"alpha = 2 rank": "7_lora", "alpha = 32": "7_lora_factor"}.items():
        arms, peaks = {}, {}
        table = pd.concat([full, runs(part)]).drop_duplicates("path")
        for arm, of_arm in table.groupby("arm", sort=False):
            by_rate = of_arm.pivot(index="learning_rate", columns="seed")
            settings = dict(setting.split("=") for setting in arm.split(",")[1:])
            label = f"rank {settings['lora_r']}, {alpha}" if settings else RLOO
            arms[label] = np.array([by_rate["area"], by_rate["reward"]])
            means = (arms[label][0][:, seeds].mean(1) for seeds in samples)
            peaks[label] = np.array([peak(by_rate.index, areas) for areas in means])
        by_area = chosen({arm: kinds[:1] for arm, kinds in arms.items()})
        areas = at_best_rates(arms[RLOO][:1], by_area)
        ends = at_best_rates(arms[RLOO], chosen(arms))
        for label, best in peaks.items():
            if label == RLOO and part != "7_lora":
                continue
            row = label.replace(RLOO, "all weights")
            for cell in (resampled(best), resampled(best / peaks[RLOO]), areas[label], ends[label]):
                yield row, cell


def at_best_rates(reference: np.ndarray, gaps: Mapping[str, Interval]) -> dict[str, str]:
    """Return the cells of rloo and of the other arms, at the rates that are best in other units."""
    mean = at_best_rates_of_others(reference).mean()
    return {RLOO: f"reference, {mean:.3f}"} | {arm: gap.cell() for arm, gap in gaps.items()}


def agents() -> Numbers:
    """Question 8: the differences to rloo of agents, and rank correlations with language tasks."""
    for part in ("8_cartpole", "8_acrobot", "8_cartpole_default", "8_acrobot_default"):
        yield from tuned(part, margin=25, decimals=1)
    pole, acrobot, sort, reverse = (
        scores(part).mean() for part in ("8_cartpole", "8_acrobot", SORT, REVERSE)
    )
    yield "", f"{rank_correlation(sort, pole).text(2)} on CartPole (20 seeds) and on Acrobot"
    with_reverse = [rank_correlation(reverse, area).text(2) for area in (pole, acrobot)]
    yield "", "is {} for CartPole and {} for Acrobot.".format(*with_reverse)
    copies = ["dr_grpo", "opo", "reinforce_baseline"]
    alone = rank_correlation(sort.drop(copies), pole)
    yield "", f"the correlation is {alone.text(2)} on both: undecided."
