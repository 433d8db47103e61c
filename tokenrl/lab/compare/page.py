"""Writes the page of a comparison, first the verdict, last the raw tables; and the page of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.equality import differences
from tokenrl.lab.compare.intervals import ALPHA
from tokenrl.lab.compare.judgement import Family, Judgement
from tokenrl.lab.compare.plan import SCORES
from tokenrl.runs.files import canonical, check_place, write_json, write_text
from tokenrl.runs.markup import write_page
from tokenrl.runs.origin import versions
from tokenrl.runs.output import ending, with_errors
from tokenrl.runs.plots import Chart, Forest
from tokenrl.runs.reader import read_run
from tokenrl.runs.report import charts, curve

SCHEMA = 1
"""The version of comparison.json; it rises when a field gets another meaning or goes."""


def write_comparison(comparison: Comparison) -> Path:
    """Write runs.csv, comparisons.csv, comparison.json and report.html into the directory of a comparison.

    None of them holds times, so two comparisons with the same seeds can be compared bit for bit.

    Returns:
        The page.

    Raises:
        Stopped: a file could not be written.
    """
    folder = comparison.output_dir
    plan = comparison.plan
    runs = comparison.runs.drop(columns="curve")
    write_text(folder / "runs.csv", runs.to_csv(index=False))
    write_text(folder / "comparisons.csv", comparison.judgement.table().to_csv(index=False))
    facts = record(comparison)
    write_json(folder / "comparison.json", facts)

    def drawn(name: str) -> dict[str, dict[str, pd.DataFrame]]:
        """Return the curves of a metric over the seeds, by arm."""
        return {
            name: {arm: _spread(rows, name, "samples") for arm, rows in comparison.curves.items()}
        }

    tuning = {
        str(arm): _spread(rows, plan.metric, "learning_rate")
        for arm, rows in comparison.of("tuning").groupby("arm", sort=False)
    }
    return write_page(
        folder / "report.html",
        "comparison.html",
        title=f"Comparison of {len(plan.arms)} arms on {plan.problem}",
        comparison=comparison,
        described=pd.Series(plan.describe()).rename(str.capitalize).to_frame(""),
        forest=_forest(comparison.family, SCORES[plan.metric]),
        learning=[*charts(drawn, None if plan.solved is None else ("solved", plan.solved))],
        arms=_arm_summary(comparison),
        tuning=[Chart("Score by learning rate", plan.metric, tuning, log=True)] if tuning else [],
        runs=runs.set_index("arm"),
        facts=facts,
    )


def record(comparison: Comparison) -> dict[str, Any]:
    """Return what comparison.json holds, for programs; recipes/pages/guides/compare.md has its fields."""
    plan = comparison.plan
    settings = asdict(plan) | {"command": ""}
    return verdicts_of(comparison.judgement) | {
        "runs": comparison.counts,
        "verdicts": comparison.words._asdict(),
        "settings": sha256(canonical(settings).encode()).hexdigest(),
        "plan": asdict(plan),
        "versions": versions(),
    }


def verdicts_of(judgement: Judgement) -> dict[str, Any]:
    """Return the verdicts for programs, with the version of their form and the error that all are allowed."""
    comparisons = judgement.table().to_dict("records")
    return {"schema": SCHEMA, "error": ALPHA, "comparisons": comparisons}


def _spread(rows: pd.DataFrame, metric: str, by: str) -> pd.DataFrame:
    """Return the mean of a metric over the rows with the same value of a column, and its lowest and highest."""
    values = rows.reindex(columns=[by, metric]).astype(float).groupby(by)[metric]
    return values.agg(value="mean", low="min", high="max").dropna()


def _forest(family: Family, score: str) -> Forest:
    """Return the differences of a family as a forest plot."""
    bars = [
        {
            "name": f"{difference.arm} - {difference.reference}",
            "result": f"{difference.verdict}, {difference.interval}",
            "verdict": difference.verdict,
            "points": list(difference.differences.values()),
            **difference.adjusted._asdict(),
        }
        for difference in family.differences
    ]
    return Forest("Difference", f"in the {score}", pd.DataFrame(bars), family.margin)


def _arm_summary(comparison: Comparison) -> pd.DataFrame:
    """Return each arm's failures, mean scores, share of clipped updates and learning rate."""
    sound = comparison.of("comparison").query("not failed").groupby("arm").mean(numeric_only=True)
    means = sound.filter([*SCORES, "entropy", "grad_clipped", "learning_rate"])
    frame = comparison.family.table()[["failed"]].join(means.dropna(axis=1, how="all"))
    return frame.rename(columns=lambda name: str(name).replace("_", " "))


def compare_runs(runs: Sequence[str | Path], output: str | Path = "comparison.html") -> Path:
    """Write a page that shows runs side by side: final numbers, settings that differ, and learning curves.

    Args:
        runs: the directories of the runs, finished or not. Runs of different commands have few numbers in
            common.
        output: the file to write.

    Returns:
        The file.

    Raises:
        Refused: a directory holds no run, or the file cannot be written there.
        Stopped: the file could not be written.
    """
    recorded = {str(run): read_run(run) for run in runs}
    output = Path(output)
    check_place(output)
    numbers = {}
    for name, run in recorded.items():
        numbers[name] = {
            "title": run.title,
            "ended": ending(run.summary),
            **with_errors(run.summary.get("eval_after")),
        }
    marks = {run.mark for run in recorded.values()}
    loss = all(run.learns_by_loss for run in recorded.values())

    def drawn(name: str) -> dict[str, dict[str, pd.DataFrame]]:
        """Return the curves of a metric in training and of evaluations, by run."""
        return {
            metric: {label: curve(run.metrics, metric) for label, run in recorded.items()}
            for metric in (name, f"eval_{name}")
        }

    return write_page(
        output,
        "comparison.html",
        title=f"Comparison of {len(recorded)} runs",
        numbers=pd.DataFrame(numbers),
        settings=differences(recorded),
        learning=[*charts(drawn, marks.pop() if len(marks) == 1 else None, loss)],
    )
