"""The questions that the study's second edition adds, drawn and written like those of `questions.py`."""

from __future__ import annotations

from itertools import count

import numpy as np
import pandas as pd
from choice import half_widths, judged_at_best_rates
from judging import (
    BLUE,
    ORANGE,
    describe,
    forest,
    half_width,
    interval,
    judged_differences,
    judged_table,
    signed,
    verdict_cell,
)
from matplotlib.axes import Axes
from questions import (
    AGAINST_RLOO,
    COPIES,
    TABLES,
    by_arm,
    by_name,
    judged,
    mark_of,
    marked_score,
    read,
)

WEIGHTS = (0.001, 0.1)
"""The weights of the KL in question 11: one that only measures it, and one that holds it back."""
ARM_COLOURS = {
    "rloo": "black",
    "reinforce": ORANGE,
    "reinforce_running_mean": "#009e73",
    "a2c": BLUE,
}
"""The colours of the arms of question 11."""


def unclipped(axes: Axes, part: str) -> pd.DataFrame:
    """Question 10: differences to rloo without clipping (filled) and with it (hollow), and what became of each."""
    before = f"1_{part.replace('sgd', 'sort_digits')[3:]}"
    runs = read(part).runs.copy()
    runs["arm"] = runs["arm"].str.partition(",")[0]
    family, clipped = judged_table(runs, "area"), judged(before)
    own = runs.groupby("arm")["learning_rate"].mean()
    moved = (differences(runs) - differences(read(before).runs)).dropna(axis=1, how="all").dropna()
    copies = COPIES[before]
    rows = {}
    for scores in family.arms:
        arm = scores.arm
        verdict = marked_score(before, family, scores)
        rows[arm] = [f"{verdict}, at {own[arm]:g}", "", ""]
        if arm != "rloo":
            verdicts = [judgement.against_reference[arm].verdict for judgement in (clipped, family)]
            rows[arm][1:] = [fate(*verdicts), signed(interval(moved[arm], 0.05 / 8))]
    forest(axes, family.against_reference, up=0.14, copies=copies)
    old = {arm: clipped.against_reference[arm] for arm in family.against_reference}
    forest(axes, old, up=-0.14, hollow=True, copies=copies)
    optimizer = "SGD" if part == "10_sgd" else "AdamW"
    title = f"{before[2:]}, {optimizer} unclipped (hollow: AdamW, clipped)"
    describe(axes, title, AGAINST_RLOO)
    heads = ["area against rloo, own rate", "verdict of question 1", "minus that with clipping"]
    table = by_arm(rows, *heads)
    return table if part != "10_sgd" else table[heads[:2]]


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the area of each arm minus that of rloo by seed."""
    by_seed = runs.pivot(index="seed", columns="arm", values="area")
    return by_seed.sub(by_seed["rloo"], axis=0)


def fate(before: str, after: str) -> str:
    """Say whether a verdict stays, changed or is open, as the plan of question 10 has it."""
    if after == "undecided":
        return "open"
    return "stays" if after == before else "changed"


def learned(axes: Axes, part: str) -> pd.DataFrame:
    """Question 11: gold over the square root of the KL; gold at the end, and where gold is greatest."""
    curves = pd.read_csv(TABLES / part / "curves.csv")
    kl = curves["kl"].clip(lower=1e-4)  # an estimate of a KL near 0 can be negative
    curves["d"] = np.sqrt(kl)
    draw_gold(axes, curves)
    runs = curves.groupby(["beta", "arm", "seed"], sort=False)
    ends = runs["gold"].apply(lambda gold: gold.iloc[-2:].mean()).unstack("seed")
    turns = curves.loc[runs["gold"].idxmax()].set_index(["beta", "arm", "seed"])
    against = {}
    for beta, arm in ends.index:
        if arm != "rloo":
            against[f"{arm}, {beta:g}"] = ends.loc[beta, arm] - ends.loc[beta, "rloo"]
    verdicts = judged_differences(against, margin=0.25)
    rows = {}
    for beta, arm in ends.index:
        name = f"{arm}, {beta:g}"
        cells = [f"{ends.loc[beta, arm].mean():.2f}", verdict_cell(verdicts, name), "", "", "", ""]
        if arm != "rloo":
            cells[2] = str(pairs_needed(against[name]))
        if beta == WEIGHTS[0]:
            cells[3] = turn_cell(turns["step"].unstack("seed").loc[beta], arm, 1)
            cells[4] = turn_cell(turns["d"].unstack("seed").loc[beta], arm, 2)
        else:
            gap = interval(ends.loc[beta, arm] - ends.loc[WEIGHTS[0], arm], 0.05 / 4)
            cells[5] = signed(gap, 2)
        rows[name] = cells
    heads = ["gold at the end", "against rloo", "pairs for ± .25", "step of the greatest gold"]
    heads += ["sqrt(KL) there", "gold at the end, minus that with .001"]
    return by_name("arm, weight of the KL", rows, *heads)


def turn_cell(by_arm: pd.DataFrame, arm: str, digits: int) -> str:
    """Return an arm's mean over seeds, and its difference to that of rloo at a level of 5 % shared by six."""
    mean = f"{by_arm.loc[arm].mean():.3g}"
    if arm == "rloo":
        return mean
    gap = interval(by_arm.loc[arm] - by_arm.loc["rloo"], 0.05 / 6)
    return f"{mean}, {signed(gap, digits)}"


def pairs_needed(differences: pd.Series) -> int:
    """Return how many pairs of this spread give intervals of .25 to either side, where six share 5 %."""
    for pairs in count(2):
        if half_width(differences.std(), pairs, 6) <= 0.25:
            break
    return pairs


def draw_gold(axes: Axes, curves: pd.DataFrame) -> None:
    """Draw the mean gold of each arm over the square root of the KL: solid with the small weight, dashed else."""
    for (beta, arm), of_arm in curves.groupby(["beta", "arm"], sort=False):
        means = of_arm.groupby("step")[["d", "gold"]].mean()
        style = "-" if beta == WEIGHTS[0] else "--"
        axes.plot(
            means["d"], means["gold"], style, color=ARM_COLOURS[arm], label=f"{arm}, {beta:g}"
        )
    axes.legend(fontsize=8, frameon=False)
    title = "Gold reward on the way, mean of six seeds (dashed: with a KL weight of .1)"
    describe(
        axes, title, "square root of the KL to the base", "gold, in standard deviations of the base"
    )


def by_unit(part: str) -> dict[str, np.ndarray]:
    """Return for each arm its area by rate and unit (a base, or a task), the mean of its runs, [1, rates, units]."""
    runs = read(part).runs
    runs = runs.assign(unit=runs["problem"].str.rpartition(", ")[0])
    arms = {}
    for arm, of_arm in runs.groupby("arm", sort=False):
        arms[arm] = of_arm.pivot_table("area", "learning_rate", "unit").to_numpy()[None]
    return arms


def bases(axes: Axes, part: str) -> pd.DataFrame:
    """Questions 12 and 13: differences to rloo by base or task, and at which ends of the grid rates are best."""
    arms = by_unit(part)
    against, verdicts = judged_at_best_rates(arms)
    forest(axes, against, copies=COPIES.get(part, {}))
    describe(axes, f"{part[3:]}: mean over all units", AGAINST_RLOO)
    twice = dict(zip(against, half_widths(arms.values(), times=2), strict=True))
    rows = {}
    for arm, scores in arms.items():
        wider = f"± {twice[arm]:.3f}" if "undecided" in verdicts[arm] else ""
        best = scores[0].argmax(0)
        ends = f"{(best == 0).sum()} + {(best == len(scores[0]) - 1).sum()}"
        rows[f"{arm}, {part[3:]}"] = [verdicts[arm] + mark_of(part, arm), wider, ends]
    heads = ["area against rloo, by unit", "with twice as many", "best rate least + greatest"]
    return by_name("arm, task", rows, *heads)


molecules = bases
