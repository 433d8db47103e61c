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
    """Return the cells that compare two arms: the statistic with its verdict, then the interval over problems."""
    level = 0.05 / comparisons
    statistic = logrank(runs, reference)
    is_sure = 2 * stats.norm.sf(abs(statistic)) < level
    verdict = ("sooner" if statistic > 0 else "later") if is_sure else "undecided"
    means = [np.log10(x["formulas"]).groupby(x["problem"]).mean() for x in (runs, reference)]
    gaps = means[0] - means[1]
    low, high = stats.t.interval(1 - level, len(gaps) - 1, gaps.mean(), stats.sem(gaps))
    return f"{statistic:.2f} {verdict} | {gaps.mean():.2f} [{low:.2f}, {high:.2f}]"


def solved_cells(runs: pd.DataFrame) -> str:
    """Return the cells of an arm: solved runs of each problem, of all, and the geometric mean of formulas."""
    by_problem = " ".join(map(str, runs.groupby("problem")["solved"].sum()))
    return f"{runs['solved'].sum()} of {len(runs)}: {by_problem} | {stats.gmean(runs['formulas']):,.0f}"


def draw(race: pd.DataFrame, prior: pd.DataFrame, path: Path) -> None:
    """Draw the share of runs that are solved against the formulas that were sampled, from both starts."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    titles = {"random weights": race, "a prior of random formulas": prior}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, part) in zip(panels, titles.items(), strict=True):
        for arm, colour in zip(ARMS, COLOURS, strict=True):
            runs = part[part["arm"] == arm]
            if len(runs):
                times = np.sort(runs.loc[runs["solved"], "formulas"])
                shares = np.arange(len(times) + 1) / len(runs)
                ends = [1_000, *times, part["budget"].max()]
                axes.step(ends, [*shares, shares[-1]], where="post", color=colour, label=arm)
        axes.set(
            xscale="log",
            xlabel="formulas sampled",
            xlim=(1_000, 60_000),
            ylim=(0, 1),
            title=f"start: {title}",
        )
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of runs solved")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=160)


def main(table: Path = STUDY / "tables" / "17_formulas" / "runs.csv") -> None:
    """Print the tables, and draw the figure.

    Args:
        table: the rows of the runs.
    """
    race, prior, free, whole = (runs_of(part, table) for part in ("race", "prior", "free", "table"))
    arms, primed, freed = (dict([*x.groupby("arm")]) for x in (race, prior, free))
    for arm in ARMS:
        gap = f" {against(arms[arm], arms['dsr'], len(ARMS) - 1)} |" if arm != "dsr" else " | |"
        print(f"| {arm} | {solved_cells(arms[arm])} |{gap}")
    for label, part in {"prior": primed, "any token": freed}.items():
        print()
        for arm, runs in part.items():
            same = arms[arm][arms[arm]["seed"].isin(runs["seed"])]
            cells = [solved_cells(runs), against(runs, same, len(part))]
            if part is primed and arm != "dsr":
                cells.append(against(runs, primed["dsr"], len(part) - 1))
            print(f"| {arm}, {label} | {' | '.join(cells)} |")
    print()
    shares = 100 * whole.groupby("problem")["solved"].mean()
    for name, percents in {"here": [*shares], **PRINTED}.items():
        print(f"| {name} | {' | '.join(f'{x:g}' for x in percents)} | {np.mean(percents):.2f} |")
    draw(race, prior, STUDY / "figures" / "17_formulas.png")


if __name__ == "__main__":
    tyro.cli(main)
