"""Judges the race to formulas: writes its tables and its figure from the rows of its runs.

    python recipes/formulas/verdict.py

The plan, `recipes/study/plans/17_formulas.txt`, says what is judged.
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
import tyro
from matplotlib.figure import Figure
from race import ARMS
from scipy import stats

STUDY = Path(__file__).parents[1] / "study"
PRINTED = {
    "DSR": (100, 100, 100, 100, 72, 100, 35, 96, 100, 100, 100, 0),
}
"""Percent of 100 runs that recover each problem within 2,000,000 formulas (Petersen et al. 2021)."""
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#8A8A8A")


def logrank(runs: pd.DataFrame, reference: pd.DataFrame) -> float:
    """Return the stratified log-rank statistic of runs against those of a reference (Mantel 1966).

    It is about normal with variance 1 where both solve equally soon, and below 0 where the runs solve later. The
    strata are problems. Runs that are not solved have `formulas` at their budget and are not `solved`.
    """
    excess, variance = 0.0, 0.0
    for problem, own in runs.groupby("problem"):
        other = reference[reference["problem"] == problem]
        both = pd.concat([own, other])
        for time in both.loc[both["solved"], "formulas"].unique():
            at_risk, at_risk_own = (both["formulas"] >= time).sum(), (own["formulas"] >= time).sum()
            events = ((both["formulas"] == time) & both["solved"]).sum()
            share = at_risk_own / at_risk
            excess += ((own["formulas"] == time) & own["solved"]).sum() - events * share
            if at_risk > 1:
                correction = (at_risk - events) / (at_risk - 1)
                variance += events * share * (1 - share) * correction
    return excess / np.sqrt(variance) if variance else 0.0


def runs_of(part: str, table: Path) -> pd.DataFrame:
    """Return the runs of a part, whose `formulas` are their budget where they are not `solved`."""
    runs = pd.read_csv(table).query("part == @part")
    solved = runs["formulas"].notna()
    return runs.assign(solved=solved, formulas=runs["formulas"].fillna(runs["budget"]))


def against(runs: pd.DataFrame, reference: pd.DataFrame, comparisons: int) -> str:
    """Return the cells that compare two arms: test and verdict, then the interval over problems."""
    level = 0.05 / comparisons
    statistic = logrank(runs, reference)
    p = 2 * stats.norm.sf(abs(statistic))
    verdict = "undecided" if p >= level else "sooner" if statistic > 0 else "later"
    means = [np.log10(x["formulas"]).groupby(x["problem"]).mean() for x in (runs, reference)]
    gaps = means[0] - means[1]
    low, high = stats.t.interval(1 - level, len(gaps) - 1, gaps.mean(), stats.sem(gaps))
    return f"{statistic:.2f}, p {p:.2g}, {verdict} | {gaps.mean():.2f} [{low:.2f}, {high:.2f}]"


def solved_cells(runs: pd.DataFrame) -> str:
    """Return the cells of an arm: solved runs of each problem, of all, and the geometric mean of formulas."""
    cells = [*runs.groupby("problem")["solved"].sum(), f"{runs['solved'].sum()} of {len(runs)}"]
    return " | ".join(map(str, [*cells, f"{stats.gmean(runs['formulas']):,.0f}"]))


def draw(race: pd.DataFrame, path: Path) -> None:
    """Draw the share of runs that are solved against the formulas that were sampled."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for arm, colour in zip(ARMS, COLOURS, strict=True):
        runs = race[race["arm"] == arm]
        times = np.sort(runs.loc[runs["solved"], "formulas"])
        shares = np.arange(1, len(times) + 1) / len(runs)
        last = len(times) / len(runs)
        axes.step(
            [100, *times, race["budget"].max()],
            [0, *shares, last],
            where="post",
            color=colour,
            label=arm,
        )
    axes.set(xscale="log", xlabel="formulas sampled", ylabel="share of runs solved", ylim=(0, 1))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main(table: Path = STUDY / "tables" / "17_formulas" / "runs.csv") -> None:
    """Print the tables, and draw the figure.

    Args:
        table: the rows of the runs.
    """
    race = runs_of("race", table)
    arms = {arm: race[race["arm"] == arm] for arm in ARMS}
    for arm, runs in arms.items():
        print(f"| {arm} | {solved_cells(runs)} |")
    for arm, runs in [*arms.items()][1:]:
        print(f"| {arm} | {against(runs, arms['dsr'], len(arms) - 1)} |")
    free = runs_of("free", table)
    for arm, runs in free.groupby("arm"):
        with_rule = arms[arm][arms[arm]["seed"].isin(runs["seed"])]
        print(f"| {arm}, free | {solved_cells(runs)} | {against(runs, with_rule, 2)} |")
    whole = runs_of("table", table)
    shares = 100 * whole.groupby("problem")["solved"].mean()
    for name, percents in {"ours": [*shares], **PRINTED}.items():
        print(f"| {name} | {' | '.join(f'{x:g}' for x in percents)} | {np.mean(percents):.2f} |")
    draw(race, STUDY / "figures" / "17_formulas.png")


if __name__ == "__main__":
    tyro.cli(main)
