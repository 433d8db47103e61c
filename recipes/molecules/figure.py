"""Draw the learning curves of molopt.py's runs, and the best molecule of each task.

    python recipes/molecules/figure.py                                      all tasks that have a result
    python recipes/molecules/figure.py --tasks QED Deco_hop --output best.png

A curve is the mean score of the best 100 distinct molecules so far, against the texts that the budget counts: a
line for each run, a colour for each name of settings. Below is the best molecule of all runs of the task.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[molecules]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from io import BytesIO
from pathlib import Path

import pandas as pd
import tyro
from acegen_number import curve, read_runs, scored_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread


def draw_molecule(axes: Axes, row: pd.Series) -> None:
    """Draw the molecule of a row with its score."""
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    canvas = rdMolDraw2D.MolDraw2DCairo(800, 500)
    canvas.drawOptions().bondLineWidth = 3
    canvas.DrawMolecule(Chem.MolFromSmiles(row["smiles"]))
    canvas.FinishDrawing()
    axes.imshow(imread(BytesIO(canvas.GetDrawingText())))
    axes.set(title=f"score {row['score']:.3f}")
    axes.axis("off")


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/molopt"),),
    tasks: tuple[str, ...] = (),
    output: Path = Path("runs/molopt/best.png"),
) -> None:
    """Draw the tasks side by side."""
    runs = read_runs(folders)
    tasks = tasks or tuple(runs["task"].unique())
    colours = {name: f"C{i}" for i, name in enumerate(runs["name"].unique())}
    figure = Figure(figsize=(3.6 * len(tasks), 5.4), layout="constrained")
    above, below = figure.subplots(2, len(tasks), squeeze=False, height_ratios=(3, 2))
    for task, curves, molecule in zip(tasks, above, below, strict=True):
        best = []
        for run in runs[runs["task"] == task].itertuples():
            rows = scored_rows(run.result)
            distinct = rows["score"].where(rows["valid"] & rows["unique"], 0)
            curves.plot(*curve(distinct, run.budget), colours[run.name], label=run.name)
            best.append(rows.loc[distinct.idxmax()])
        curves.set(title=task, ylim=(0, 1), xlabel="texts")
        draw_molecule(molecule, max(best, key=lambda row: row["score"]))
    above[0].set(ylabel="mean score of the best 100")
    labels = dict(zip(*reversed(above[0].get_legend_handles_labels()), strict=True))
    above[0].legend(labels.values(), labels.keys())
    figure.savefig(output, dpi=150)
    print(f"{output}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
