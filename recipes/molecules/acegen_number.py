"""Compute the number of ACEGEN's table from the molecules that runs of molopt.py wrote, beside MolScore's present one.

    python recipes/molecules/acegen_number.py                              the runs in runs/molopt
    python recipes/molecules/acegen_number.py runs/molopt other/molopt     those of two machines, in one table

ACEGEN's table is of MolScore up to 1.5.5. Its AUC of the top 100 counts each row: a molecule that was written ten
times is ten of the best hundred, and text that is no molecule is a row with the score 0. MolScore 1.9.5, whose number
molopt.py prints, counts distinct molecules. That release is not needed.

`sem` is the standard error of the first number over seeds. Below the rows are sums over the tasks of ACEGEN's table.
`--output` writes what the table is made from, a row for each run.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[molecules]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy.integrate import trapezoid

OWN = "Top-100 AUC Score"
"""The AUC of the top 100 in MolScore 1.9.5, of distinct molecules."""
PUBLISHED = Path(__file__).with_name("acegen.csv")
"""The AUC of the top 100 by task in ACEGEN's README, means of five seeds with 10,000 molecules."""


def curve(scores: np.ndarray, budget: int) -> tuple[list[int], list[float]]:
    """Return the numbers of each 100th row and the last one, from 0 on, and the mean of the best 100 rows so far.

    Args:
        scores: one of each row, in the order of scoring; those behind the budget are left out.
        budget: the most rows that count.
    """
    last = min(len(scores), budget) - 1
    ends = [0, *range(100, last, 100), last]
    return ends, [0, *(np.sort(scores[: end + 1])[-100:].mean() for end in ends[1:])]


def area(scores: np.ndarray, budget: int) -> float:
    """Return the area under the curve by the budget; where rows are fewer, the last mean is that of the rest."""
    ends, means = curve(scores, budget)
    return (trapezoid(means, ends) + (budget - ends[-1]) * means[-1]) / budget


def scored_rows(result: Path) -> pd.DataFrame:
    """Return the rows that a run scored, with the columns `smiles`, `valid`, `unique` and `score`."""
    rows = pd.read_csv(result.parent / "molscore" / "scores.csv")
    return rows.rename(columns=dict.fromkeys(("single", "amean", "gmean"), "score"))


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """Return a row for each run that has a result: what molopt.py says of it, and its file.

    Raises:
        SystemExit: There is none.
    """
    results = [path for base in folders for path in sorted(base.glob("*/*/*/result.json"))]
    if not results:
        raise SystemExit("No run has a result; molopt.py makes them.")
    runs = pd.DataFrame([json.loads(result.read_text()) for result in results])
    return runs.assign(result=results)


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/molopt"),),
    output: Path | None = None,
) -> pd.DataFrame:
    """Print and return means over seeds by name, settings and task, how many seeds there are, and ACEGEN's columns."""
    runs = read_runs(folders)
    scores = [scored_rows(result)["score"].to_numpy() for result in runs["result"]]
    theirs = [area(*pair) for pair in zip(scores, runs["budget"], strict=True)]
    runs["1.5.5"] = theirs
    if output:
        runs.drop(columns="result").to_csv(output, index=False, float_format="%.4g")
    seeds = runs.groupby(["name", "settings", "task"])
    table = seeds[["1.5.5", OWN]].mean().rename(columns={OWN: "1.9.5"})
    table = table.assign(sem=seeds["1.5.5"].sem(), seeds=seeds["seed"].nunique())
    table = table.join(pd.read_csv(PUBLISHED, index_col="task")).droplevel("settings")
    print("AUC of the top 100: of all rows (1.5.5, as ACEGEN's), and of distinct molecules (1.9.5)")
    for rows in (table, table.drop(columns="sem").dropna().groupby("name").sum()):
        print(rows.to_string(na_rep="", float_format="{:.3f}".format))
    return table


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
