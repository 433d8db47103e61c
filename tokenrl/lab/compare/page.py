"""Writes the page of a comparison, first the verdict, last the raw tables; and the page of several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

import tokenrl.runs.markup as markup
from tokenrl.configuration import RECORDED
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.judgement import Family, digits
from tokenrl.lab.compare.plan import SCORES, Problem
from tokenrl.runs.console import ending, with_errors
from tokenrl.runs.files import check_place, flat, write_json, write_text
from tokenrl.runs.metric_table import all_metrics
from tokenrl.runs.origin import versions
from tokenrl.runs.plots import Bars, Chart, Curve, Forest
from tokenrl.runs.reader import read_run

CITATION = """@software{{tokenrl,
  title = {{tokenrl: policy gradients on language models, with declared bias}},
  version = {{{tokenrl}}},
  year = {{2026}},
}}"""
FROM_PYTHON = (
    "Started from Python: the same call of tokenrl.compare continues it, or shows it again."
)
INTERVALS = {
    "failure rates": "with exact limits, each of which holds with 95 %, and compared by Fisher's test",
    "intervals": "Student-t, of the mean difference paired by seed between runs that did not fail. The thin "
    "interval decides: its level is such that with 95 % all verdicts on a problem hold together.",
}
"""What the intervals of a comparison are, by heading."""
COLOURS = {"better": 3, "worse": 2, "equivalent": 1}
"""Colours of the verdicts in the palette of the charts; the others are grey."""
MOST_DOTS = 50
"""A curve of more points is drawn as its running mean."""
CAUTION = (
    "Each column is one run. A standard error is over the held-out prompts, pairs or episodes of that run; "
    "so a difference between two runs says nothing yet about their settings: repeat them with several seeds. "
    "Where runs differ in task, reward, env or data, their numbers do not measure the same."
)
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
    runs = comparison.table.runs
    write_text(folder / "runs.csv", runs.to_csv(index=False))
    write_text(folder / "comparisons.csv", comparison.judgement.table().to_csv(index=False))
    packages = versions()
    citation = CITATION.format(**packages)
    verdicts = {label: words._asdict() for label, words in comparison.words.items()}
    values = {
        "plan": asdict(plan),
        "verdicts": verdicts,
        "versions": packages,
        "citation": citation,
    }
    write_json(folder / "comparison.json", values)
    sections = [
        markup.Section(f"Verdict on {label}", [markup.verdict(*words)])
        for label, words in comparison.words.items()
    ]
    context = (plan.describe() | INTERVALS).items()
    table = markup.table(["", ""], [[name.capitalize(), fact] for name, fact in context], "words")
    sections.append(markup.Section("What was compared", [table]))
    for problem in plan.problems:
        sections += _of_problem(comparison, problem)
    closed: dict[str, list[object]] = {
        "To repeat, and to cite": [plan.command or FROM_PYTHON, citation, packages],
        "The plan": [asdict(plan)],
    }
    sections.append(markup.Section("Every run", [_table(runs)], closed=True))
    for heading, parts in closed.items():
        blocks = [markup.preformatted(part) for part in parts]
        sections.append(markup.Section(heading, blocks, closed=True))
    title = f"Comparison of {len(plan.arms)} arms on {', '.join(plan.margins)}"
    return markup.write_page(folder / "report.html", title, sections)


def _of_problem(comparison: Comparison, problem: Problem) -> list[markup.Section]:
    """Return the sections on one problem: differences, curves, a table of the arms, and tuned rates."""
    label = problem.label
    mark = None if problem.solved is None else ("solved", problem.solved)
    words = f"Held-out, by {problem.unit}: mean over seeds, band from the lowest to the highest."
    of_problem = comparison.table.curves.query("problem == @label and role == 'comparison'")
    curves = markup.drawings(_charts(of_problem, mark))
    tuning = comparison.table.of(label, "tuning")
    unit = (
        "mean over the tuning seeds on which the rate was tried, which the comparison does not use"
    )
    ticks = {math.log2(rate): f"{rate:.3g}" for rate in tuning["learning_rate"]}
    by_rate = tuning.assign(samples=np.log2(tuning["learning_rate"]))
    lines = _curves(by_rate, comparison.plan.metric)  # none unless rates were tuned
    rates = Chart("Score by learning rate", unit, lines, True, None, False, ticks, False)
    blocks = {
        "Differences": [markup.drawings([_forest(comparison, comparison.judgement.of(label))])],
        "Learning": [markup.paragraph(words, "soft"), curves],
        "Arms": [_table(_arm_summary(comparison, label), "wide fit")],
        "Learning rates": [markup.drawings([rates])],
    }
    return [markup.Section(f"{heading} on {label}", parts) for heading, parts in blocks.items()]


def _forest(comparison: Comparison, family: Family) -> Forest:
    """Draw the differences of a family."""
    words = (
        f"in the {SCORES[comparison.plan.metric]}, paired by seed, of runs that did not fail. Small dots are "
        "seeds, the dot is their mean, the thick bar its 95 % interval, the thin one decides. "
    )
    if family.margin is not None:
        words += f"The band is the margin of equivalence, {digits(family.margin)}. "
    bars = []
    for difference in family.differences:
        values = list(difference.differences.values())
        if not values:
            continue
        name = difference.arm
        if difference.reference != family.reference:
            name += f" - {difference.reference}"
        line = Bars(
            name=name,
            result=f"{difference.verdict}, {difference.interval}",
            value=difference.mean.value,
            inner=difference.mean[1:],
            outer=difference.adjusted[1:],
            points=values,
            colour=COLOURS.get(difference.verdict, 0),
        )
        bars.append(line)
    return Forest(f"Difference to {family.reference}", words, bars, family.margin)


def _charts(curves: pd.DataFrame, mark: tuple[str, float] | None) -> list[Chart]:
    """Draw each metric that has a panel, the reward first; those of health only where they change.

    Args:
        curves: rows with `arm`, `samples` and metrics. A curve is the mean over the rows of an arm, with a
            band from the lowest to the highest.
        mark: name and value of a horizontal line in the charts of rewards and accuracies.
    """
    metrics = [metric for metric in all_metrics() if metric.panel]
    if "reward" in curves:  # beside which a loss of policy gradients says nothing
        metrics = [metric for metric in metrics if metric.panel != "loss"]
    charts = []
    for metric in sorted(metrics, key=lambda metric: metric.name != "reward"):
        is_health = metric.panel == "health"
        for name in (metric.name, f"eval_{metric.name}"):
            if name not in curves or curves[name].nunique() <= is_health:
                continue
            line = mark if metric.panel in ("reward", "accuracy") else None
            drawn = _curves(curves, name)
            charts.append(Chart(name, metric.caption, drawn, large=not is_health, mark=line))
    return charts


def _curves(curves: pd.DataFrame, metric: str) -> list[Curve]:
    """Return the curve of a metric for each arm."""
    drawn = []
    for colour, (arm, rows) in enumerate(curves.groupby("arm", sort=False), start=1):
        points = rows.groupby("samples")[metric].agg(["mean", "min", "max"]).dropna()
        mean, low, high = points.to_numpy().T.tolist()
        band = (low, high) if low != high else None
        dots = len(points) <= MOST_DOTS
        drawn.append(Curve(list(points.index), mean, str(arm), colour, dots, band))
    return drawn


def _arm_summary(comparison: Comparison, label: str) -> pd.DataFrame:
    """Return each arm's failures, mean scores, share of clipped updates and learning rate."""
    sound = comparison.table.of(label).query("not failed")
    means = sound.groupby("arm").mean(numeric_only=True)
    failures = {
        arm.arm: f"{arm.count} [{arm.failures.low:.0%}, {arm.failures.high:.0%}]"
        for arm in comparison.judgement.of(label).arms
    }
    frame = pd.DataFrame({"failed": failures}).rename_axis("arm")
    numbers = means.filter([*SCORES, "entropy", "grad_clipped", "learning_rate"])
    frame = frame.join(numbers.dropna(axis=1, how="all"))
    return frame.rename(columns=lambda name: str(name).replace("_", " ")).reset_index()


def _table(frame: pd.DataFrame, style: str = "wide") -> markup.Block:
    rows = [list(map(_cell, row)) for row in frame.itertuples(index=False)]
    return markup.table(list(map(str, frame.columns)), rows, style)


def _cell(value: object) -> str:
    if pd.isna(value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    curves = []
    for name, run in recorded.items():
        numbers[name] = {"title": run.title, "ended": ending(run.summary)}
        numbers[name] |= with_errors(run.summary.get("eval_after"))
        compared = {key: value for key, value in run.config.items() if key not in NOT_COMPARED}
        settings[name] = {key: str(value) for key, value in flat(compared).items()}
        curves.append(
            pd.DataFrame(run.metrics).rename(columns={"step": "samples"}).assign(arm=name)
        )
    differing = pd.DataFrame(settings).fillna("-")
    differing = differing[differing.nunique(axis=1) > 1]
    marks = {run.mark for run in recorded.values()}
    charts = _charts(pd.concat(curves), marks.pop() if len(marks) == 1 else None)
    sections = {
        "": [markup.paragraph(CAUTION, "soft")],
        "Final numbers (± standard error)": [_table(_named(pd.DataFrame(numbers)))],
        "Settings that differ": [_table(_named(differing))],
        "Learning curves": [markup.paragraph(BY_STEP, "soft"), markup.drawings(charts)],
    }
    title = f"Comparison of {len(recorded)} runs"
    return markup.write_page(output, title, [markup.Section(*part) for part in sections.items()])


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the names of its rows as its first column."""
    return frame.rename_axis("").reset_index()
