"""Compute the number of ACEGEN's table from the molecules that runs of molopt.py wrote, beside MolScore's present one.

    python recipes/molecules/acegen_number.py                              the runs in runs/molopt
    python recipes/molecules/acegen_number.py runs/molopt other/molopt     those of two machines, in one table

ACEGEN's table is of MolScore up to 1.5.5, and of RDKit before 2024, which that release asks for. What its AUC of the
top 100 means differs from that of MolScore 1.9.5, which molopt.py prints, in two ways:

* Each row counts. A molecule that was written ten times is ten of the best hundred, and text that is no molecule is a
  row with the score 0.
* The pattern of Scaffold_hop has a character that is no bond of SMARTS. RDKit before 2024 reads it up to there, and so
  pays a third for each ether of a chain of three carbons; later ones refuse it, and nothing has the pattern.

A table of both numbers is written beside the runs. It needs neither release of MolScore.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[molecules]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

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
    ends = [*range(100, last, 100), last]
    means = [np.sort(scores[: end + 1])[-100:].mean() for end in ends]
    trapezia = np.diff([0, *ends]) * (np.array([0, *means[:-1]]) + means) / 2
    return (trapezia.sum() + (budget - last) * means[-1]) / budget


def has_ether(smiles: str) -> bool:
    """Whether a molecule has what their RDKit takes for the pattern of Scaffold_hop; False for other text."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return bool(molecule and molecule.HasSubstructMatch(Chem.MolFromSmarts(ETHER)))


def numbers(result: Path) -> dict[str, Any]:
    """Return both numbers of a run with its name, task, settings and seed, from its result and its molecules."""
    row = json.loads(result.read_text())
    rows = pd.read_csv(result.parent / "molscore" / "scores.csv")
    scores = rows.filter(regex="^(single|amean|gmean)$").iloc[:, 0].to_numpy()
    if row["task"] == "Scaffold_hop":
        # The pattern's third is 1 in place of MolScore's least value, 1e-6.
        scores = scores + rows["smiles"].map(has_ether) * (1 - 1e-6) / 3
    own = {name: row[name] for name in ("name", "settings", "task", "seed")}
    return own | {"1.5.5": area(np.array(scores), row["budget"]), "1.9.5": row[OWN]}


def summary(folders: tuple[Path, ...]) -> pd.DataFrame:
    """Return by task and name the means of both numbers, standard errors and counts of seeds, beside ACEGEN's means."""
    runs = [
        numbers(path) for folder in folders for path in sorted(folder.glob("*/*/*/result.json"))
    ]
    if not runs:
        raise SystemExit(
            f"No run in {', '.join(map(str, folders))} has a result; molopt.py makes them."
        )
    results = pd.DataFrame(runs).drop_duplicates(["name", "task", "seed"])
    if (results.groupby("name")["settings"].nunique() > 1).any():
        raise SystemExit("Results of one name have different settings; give these other names.")
    kinds = {"1.5.5": ["mean", "sem"], "1.9.5": ["mean", "sem"], "seed": "count"}
    table = results.pivot_table(index="task", columns="name", aggfunc=kinds)
    published = pd.read_csv(PUBLISHED, index_col="task")
    for name in ("REINFORCE", "PPO", "PPOD"):
        table["ACEGEN", "mean", name] = published[name]
    means = table.xs("mean", axis=1, level=1, drop_level=False).dropna(axis=1, how="all")
    table.loc["sum where all have a value"] = means.dropna().sum()
    return table


def main(folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/molopt"),)) -> None:
    table = summary(folders)
    table.to_csv(folders[0] / "table.csv")
    print("AUC of the top 100: of all rows (1.5.5, as ACEGEN's), and of distinct molecules (1.9.5)")
    print(table.to_string(na_rep="", float_format="{:.3f}".format))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
