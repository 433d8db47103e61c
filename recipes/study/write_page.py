"""Writes the table and the figure of a page of the study from a comparison, whose raw tables it keeps.

    tokenrl compare --config recipes/study/1_countdown.yaml --output-dir runs/study/again
    python recipes/study/write_page.py runs/study/again

The raw tables go to `tables/` and the figure to `figures/`, by the name of the comparison. The table is printed, in
Markdown. Each problem is judged as in the report of `tokenrl compare`. Where every rate has a run on every unit, an
arm has the rate that is best on the other units instead, and all units are one family (`intervals.py`).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import tyro
from first_questions import TABLES, runs
from intervals import MARGIN, Interval, chosen
from later_questions import by_unit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from verify import manifest

from tokenrl.lab import judge_scores

COLOURS = {"better": "#007a58", "worse": "#c24e00", "equivalent": "#0072b2", "undecided": "#26262b"}


def keep_tables(comparison: Path) -> None:
    """Copy the raw tables of a comparison, without curves of runs for tuning, and list them in the manifest."""
    folder = TABLES / comparison.name
    if folder.exists():
        raise SystemExit(
            f"{folder} is there: remove it, or give the comparison another name. A finished page keeps its raw tables."
        )
    folder.mkdir()
    for name in ("runs.csv", "comparison.json"):
        shutil.copy(comparison / name, folder)
    curves = pd.read_csv(comparison / "curves.csv").query("role != 'tuning'")
    curves.to_csv(folder / "curves.csv", index=False)
    (TABLES / "manifest.csv").write_text(manifest(TABLES))


def judged(part: str, margin: float) -> pd.DataFrame:
    """Return a row for each problem and arm but the first: `gap`, the interval of its difference, and `verdict`."""
    rows = []
    if runs(part)["problem"].str.contains(", learning_rate=").all():
        for arm, gap in chosen(by_unit(part)).items():
            rows.append(("all units", arm, gap, gap.verdict(margin)))
    else:
        for family in judge_scores(runs(part), metric="area", margin=margin).families:
            for arm, gap in family.against_reference.items():
                rows.append((family.problem, arm, Interval(*gap.adjusted), gap.verdict))
    return pd.DataFrame(rows, columns=["problem", "arm", "gap", "verdict"])


def forest(axes: Axes, title: str, table: pd.DataFrame, margin: float) -> None:
    """Draw the differences of one problem below each other, in the colours of their verdicts."""
    axes.axvspan(-margin, margin, color="#e9e9ee", lw=0)
    axes.axvline(0, color="#b9b9c2", lw=1)
    table = table.reset_index()
    for verdict, rows in table.groupby("verdict"):
        means, lows, highs = zip(*rows["gap"], strict=True)
        colour = COLOURS.get(verdict, "black")
        axes.hlines(rows.index, lows, highs, color=colour, lw=2)
        axes.plot(means, rows.index, "o", color=colour, label=verdict)
    axes.set_yticks(table.index, table["arm"])
    axes.invert_yaxis()
    axes.set_title(title, loc="left", size=10)
    axes.set_xlabel("area minus that of the first arm (grey band: within the margin)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def markdown(table: pd.DataFrame) -> str:
    """Return a table with a row for each arm and a column for each problem."""
    cells = [
        f"{gap.numbers} {verdict}"
        for gap, verdict in zip(table["gap"], table["verdict"], strict=True)
    ]
    wide = table.assign(cell=cells).pivot(index="arm", columns="problem", values="cell").fillna("")
    lines = [["arm", *wide], ["---"] * (1 + wide.shape[1]), *wide.reset_index().to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(comparison: tyro.conf.Positional[Path], margin: float = MARGIN) -> None:
    """Write the table and the figure of a comparison.

    Args:
        comparison: the directory of its output.
        margin: a difference that counts as none.
    """
    keep_tables(comparison)
    problems = judged(comparison.name, margin).groupby("problem", sort=False)
    inches = len(problems) + 0.4 * len(problems.obj)
    figure = Figure((7, inches), layout="constrained")
    panels = figure.subplots(len(problems), squeeze=False).ravel()
    for axes, (problem, table) in zip(panels, problems, strict=True):
        forest(axes, problem, table, margin)
    path = TABLES.parent / "figures" / f"{comparison.name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(markdown(problems.obj), f"figure: {path}", sep="\n\n")


if __name__ == "__main__":
    tyro.cli(main)
