"""Writes the page of a comparison, first the verdict, last the raw tables; and the page of several runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from tokenrl.configuration import RECORDED
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.judgement import Family, digits
from tokenrl.lab.compare.plan import SCORES
from tokenrl.runs.console import ending, with_errors
from tokenrl.runs.files import check_place, flat, write_json, write_text
from tokenrl.runs.markup import write_page
from tokenrl.runs.metric_table import all_metrics
from tokenrl.runs.origin import versions
from tokenrl.runs.plots import Chart, Forest
from tokenrl.runs.reader import read_run
from tokenrl.runs.report import curve, is_shown

FROM_PYTHON = (
    "Started from Python: the same call of tokenrl.compare continues it, or shows it again."
)
INTERVALS = {
    "failure rates": "with exact limits, each of which holds with 95 %, and compared by Fisher's test",
    "intervals": "Student-t, of the mean difference paired by seed between runs that did not fail, at a level such "
    "that with 95 % all verdicts hold together.",
}
"""What the intervals of a comparison are, by heading."""
CAUTION = (
    "Each column is one run. A standard error is over the held-out prompts, pairs or episodes of that run; "
    "so a difference between two runs says nothing yet about their settings: repeat them with several seeds. "
    "Where runs differ in task, reward, env or data, their numbers do not measure the same."
)
TUNED = "mean over the tuning seeds on which the rate was tried, which the comparison does not use"
BY_STEP = (
    "By step (update; 0 is before training). Metrics with eval_ are held-out, others of training."
)
NOT_COMPARED = {*RECORDED, "output_dir", "overwrite", "quiet"}


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
    family = comparison.family
    write_text(folder / "runs.csv", runs.to_csv(index=False))
    write_text(folder / "comparisons.csv", comparison.judgement.table().to_csv(index=False))
    facts = {"plan": asdict(plan), "verdicts": comparison.words._asdict(), "versions": versions()}
    write_json(folder / "comparison.json", facts)
    context = pd.Series(plan.describe() | INTERVALS).rename(str.capitalize)
    compared = comparison.of("comparison").groupby("arm", sort=False)
    curves = {str(arm): pd.concat([*rows["curve"]]) for arm, rows in compared}
    mark = None if plan.solved is None else ("solved", plan.solved)
    sections: dict[str, dict[str, Any]] = {
        "What was compared": {"table": context.to_frame("")},
        "Differences": {"charts": [_forest(family, SCORES[plan.metric])]},
        "Learning": {
            "note": f"Held-out, by {plan.unit}: mean over seeds, band from the lowest to the highest.",
            "charts": _charts(curves, partial(_spread, by="samples"), mark),
        },
        "Arms": {"table": _arm_summary(comparison)},
    }
    tuning = {
        str(arm): _spread(rows, plan.metric, "learning_rate")
        for arm, rows in comparison.of("tuning").groupby("arm", sort=False)
    }
    if tuning:
        chart = Chart("Score by learning rate", TUNED, tuning, log=True)
        sections["Learning rates"] = {"charts": [chart]}
    return write_page(
        folder / "report.html",
        "comparison.html",
        title=f"Comparison of {len(plan.arms)} arms on {plan.problem}",
        verdict=comparison.words,
        sections=sections,
        details={
            "Every run": [runs.set_index("arm")],
            "To repeat": [plan.command or FROM_PYTHON, facts["versions"]],
            "The plan": [facts["plan"]],
        },
    )


def _spread(rows: pd.DataFrame, metric: str, by: str) -> pd.DataFrame:
    """Return the mean of a metric over the rows with the same value of a column, and its lowest and highest."""
    values = rows.reindex(columns=[by, metric]).astype(float).groupby(by)[metric]
    return values.agg(value="mean", low="min", high="max").dropna()


def _forest(family: Family, score: str) -> Forest:
    """Return the differences of a family as a forest plot."""
    words = (
        f"in the {score}, paired by seed, of runs that did not fail. Small dots are seeds, the large one is their "
        "mean; the bar is the interval that decides. "
    )
    if family.margin is not None:
        words += f"The band is the margin of equivalence, {digits(family.margin)}. "
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
    return Forest("Difference", words, pd.DataFrame(bars), family.margin)


def _charts(
    arms: Mapping[str, Any],
    curve_of: Callable[[Any, str], pd.DataFrame],
    mark: tuple[str, float] | None,
) -> list[Chart]:
    """Return a chart of each metric that has a panel, with a curve of each arm; the reward comes first.

    Args:
        arms: what `curve_of` makes the curve of a metric from, by the names of the arms.
        curve_of: returns the curve of a metric, which may be empty.
        mark: name and value of a horizontal line in the charts of rewards and accuracies.
    """
    charts: list[Chart] = []
    metrics = [metric for metric in all_metrics() if metric.panel]
    for metric in sorted(metrics, key=lambda metric: metric.name != "reward"):
        # Beside a reward a loss of policy gradients says nothing.
        if metric.panel == "loss" and charts and charts[0].name == "reward":
            continue
        line = mark if metric.panel in ("reward", "accuracy") else None
        for name in (metric.name, f"eval_{metric.name}"):
            curves = {arm: curve_of(rows, name) for arm, rows in arms.items()}
            curves = {arm: values for arm, values in curves.items() if len(values)}
            if is_shown(metric, curves):
                large = metric.panel != "health"
                charts.append(Chart(name, metric.caption, curves, large, line))
    return charts


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
    settings = {}
    for name, run in recorded.items():
        numbers[name] = {"title": run.title, "ended": ending(run.summary)}
        numbers[name] |= with_errors(run.summary.get("eval_after"))
        compared = {key: value for key, value in run.config.items() if key not in NOT_COMPARED}
        settings[name] = {key: str(value) for key, value in flat(compared).items()}
    differing = pd.DataFrame(settings).fillna("-")
    marks = {run.mark for run in recorded.values()}
    mark = marks.pop() if len(marks) == 1 else None
    rows = {name: run.metrics for name, run in recorded.items()}
    sections = {
        "Final numbers (± standard error)": {"table": pd.DataFrame(numbers)},
        "Settings that differ": {"table": differing[differing.nunique(axis=1) > 1]},
        "Learning curves": {"note": BY_STEP, "charts": _charts(rows, curve, mark)},
    }
    title = f"Comparison of {len(recorded)} runs"
    return write_page(output, "comparison.html", title=title, caution=CAUTION, sections=sections)
