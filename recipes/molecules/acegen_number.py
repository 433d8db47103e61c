"""Compute the number of ACEGEN's table from the molecules that runs of molopt.py wrote, beside MolScore's present one.

    python recipes/molecules/acegen_number.py                              the runs in runs/molopt
    python recipes/molecules/acegen_number.py runs/molopt other/molopt     those of two machines, in one table

ACEGEN's table is of MolScore up to 1.5.5, and of RDKit before 2024, which that release asks for. What its AUC of the
top 100 means differs from that of MolScore 1.9.5, which molopt.py prints, in two ways:

* Each row counts. A molecule that was written ten times is ten of the best hundred, and text that is no molecule is a
  row with the score 0.
* The pattern of Scaffold_hop has a character that is no bond of SMARTS. RDKit before 2024 reads it up to there, and so
  pays a third for each ether of a chain of three carbons; RDKit 2026.9 refuses it, and nothing has the pattern.

`sem` is the standard error of the first number over seeds. Below the rows are sums over the tasks of ACEGEN's table.
Neither release of MolScore is needed.
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
ETHER = "[#6]-[#6]-[#6]-[#8]-[#6]"
"""What RDKit before 2024 reads of the pattern of Scaffold_hop."""
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


def has_ether(smiles: str) -> bool:
    """Whether a molecule has what their RDKit takes for the pattern of Scaffold_hop."""
    from rdkit import Chem

    return Chem.MolFromSmiles(smiles).HasSubstructMatch(Chem.MolFromSmarts(ETHER))


def both_numbers(result: Path) -> dict:
    """Return the result of a run, and with it the number of 1.5.5 for its molecules."""
    row = json.loads(result.read_text())
    rows = pd.read_csv(result.parent / "molscore" / "scores.csv")
    scores = rows.filter(regex="^(single|amean|gmean)$").iloc[:, 0].to_numpy()
    if row["task"] == "Scaffold_hop":
        # The pattern's third is 1 in place of MolScore's least value, 1e-6.
        ethers = rows["smiles"].where(rows["valid"], "").map(has_ether)
        scores = scores + ethers.to_numpy() * (1 - 1e-6) / 3
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
