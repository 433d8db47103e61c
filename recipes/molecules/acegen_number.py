"""Compute the number of ACEGEN's table from the molecules that runs of molopt.py wrote, beside MolScore's present one.

    python recipes/molecules/acegen_number.py                              the runs in runs/molopt
    python recipes/molecules/acegen_number.py runs/molopt other/molopt     those of two machines, in one table

ACEGEN's table is of MolScore up to 1.5.5. Its AUC of the top 100 counts each row: a molecule that was written ten
times is ten of the best hundred, and text that is no molecule is a row with the score 0. MolScore 1.9.5, whose number
molopt.py prints, counts distinct molecules. That release is not needed.

`sem` is the standard error of the first number over seeds. Below the rows are sums over the tasks of ACEGEN's table.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[molecules]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy.integrate import trapezoid

OWN = "Top-100 AUC Score"
"""The AUC of the top 100 in MolScore 1.9.5, of distinct molecules."""
PUBLISHED = Path(__file__).with_name("acegen.csv")
"""The AUC of the top 100 by task in ACEGEN's README, means of five seeds with 10,000 molecules."""


def area(scores: np.ndarray, budget: int) -> float:
    """Return the area under the mean of the best 100 rows so far, at each 100th row and the last one, from 0 on.

    Args:
        scores: one of each row, in the order of scoring; those behind the budget are left out.
        budget: the last row of the area; where there are fewer rows, the last mean is that of the rest.
    """
    last = min(len(scores), budget) - 1
    ends = [0, *range(100, last, 100), last]
    means = [0, *(np.sort(scores[: end + 1])[-100:].mean() for end in ends[1:])]
    return (trapezoid(means, ends) + (budget - last) * means[-1]) / budget


def both_numbers(result: Path) -> dict:
    """Return the result of a run, and with it the number of 1.5.5 for its molecules."""
    row = json.loads(result.read_text())
    rows = pd.read_csv(result.parent / "molscore" / "scores.csv")
    scores = rows.filter(regex="^(single|amean|gmean)$").iloc[:, 0].to_numpy()
    return row | {"1.5.5": area(scores, row["budget"]), "1.9.5": row[OWN]}


def main(folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/molopt"),)) -> pd.DataFrame:
    """Print and return means over seeds by name, settings and task, how many seeds there are, and ACEGEN's columns."""
    runs = [both_numbers(path) for base in folders for path in base.glob("*/*/*/result.json")]
    if not runs:
        raise SystemExit("No run has a result; molopt.py makes them.")
    seeds = pd.DataFrame(runs).groupby(["name", "settings", "task"])
    table = seeds[["1.5.5", "1.9.5"]].mean()
    table = table.assign(sem=seeds["1.5.5"].sem(), seeds=seeds["seed"].nunique())
    table = table.join(pd.read_csv(PUBLISHED, index_col="task")).droplevel("settings")
    print("AUC of the top 100: of all rows (1.5.5, as ACEGEN's), and of distinct molecules (1.9.5)")
    for rows in (table, table.drop(columns="sem").dropna().groupby("name").sum()):
        print(rows.to_string(na_rep="", float_format="{:.3f}".format))
    return table


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
