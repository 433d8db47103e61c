"""Computes the cells of question 17 again: how soon searches for formulas are solved.

It shares nothing with `recipes/formulas`, whose program printed them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from intervals import student
from scipy.stats import hypergeom, norm

FAMILIES = {"race": 5, "prior": 3}
"""Comparisons with dsr in each part."""
STARTS = {"prior": 4, "free": 2}
"""Comparisons of each part with the same arms and seeds of the race."""
LABELS = {"race": "", "prior": ", prior", "free": ", any token"}


def reached(runs: pd.DataFrame) -> pd.Series:
    """Return the formulas until each run was solved, or its budget."""
    return runs["formulas"].fillna(runs["budget"])


def statistic(own: pd.DataFrame, other: pd.DataFrame) -> float:
    """Return the log-rank statistic, stratified by problem: above 0 where the own runs are solved sooner.

    At each number of formulas at which a run is solved, the own runs among the solved are a draw from those that are
    not solved so far, without replacement.
    """
    excess = variance = 0.0
    for problem in own["problem"].unique():
        here, there = (x[x["problem"] == problem] for x in (own, other))
        for time in pd.concat([here, there])["formulas"].dropna().unique():
            waiting = [int((reached(x) >= time).sum()) for x in (here, there)]
            solved = [int((x["formulas"] == time).sum()) for x in (here, there)]
            counts = np.arange(sum(solved) + 1)
            chances = hypergeom.pmf(counts, sum(waiting), waiting[0], sum(solved))
            mean = chances @ counts
            excess += solved[0] - mean
            variance += chances @ (counts - mean) ** 2
    return excess / variance**0.5


def compared(own: pd.DataFrame, other: pd.DataFrame, comparisons: int) -> Iterator[str]:
    """Yield the statistic with its verdict, and the difference of log10 of the formulas over problems."""
    z = statistic(own, other)
    verdict = "undecided"
    if norm.cdf(-abs(z)) < 0.05 / comparisons / 2:
        verdict = "sooner" if z > 0 else "later"
    yield f"{z:.2f} {verdict}"
    means = (np.log10(reached(x)).groupby(x["problem"]).mean() for x in (own, other))
    yield student(next(means) - next(means), comparisons).text(".2f")


def solved(runs: pd.DataFrame) -> Iterator[str]:
    """Yield how many runs are solved, of all and of each problem, and the geometric mean of formulas."""
    counts = runs.pivot_table(index="problem", values="formulas", aggfunc="count")["formulas"]
    yield f"{counts.sum()} of {len(runs)}: {' '.join(map(str, counts))}"
    yield f"{np.exp(np.log(reached(runs)).mean()):,.0f}"


def formulas(table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Question 17: each arm against dsr, from a prior against random weights, and without allowed tokens."""
    arms = dict([*table.groupby(["part", "arm"])])
    for part, label in LABELS.items():
        for arm in table.loc[table["part"] == part, "arm"].unique():
            runs = arms[part, arm]
            cells = [*solved(runs)]
            if part in STARTS:
                same = arms["race", arm]
                cells += compared(runs, same[same["seed"].isin(runs["seed"])], STARTS[part])
            if part in FAMILIES and arm != "dsr":
                cells += compared(runs, arms[part, "dsr"], FAMILIES[part])
            yield from ((arm + label, cell) for cell in cells)
    by_problem = table[table["part"] == "table"].groupby("problem")["formulas"]
    shares = 100 * by_problem.count() / by_problem.size()
    yield from (("here", f"{share:g}") for share in shares)
    yield "here", f"{shares.mean():.2f}"
