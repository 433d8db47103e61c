"""Writes the tables and the page of a comparison: first the verdict, last the raw tables."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

import tokenrl.runs.markup as markup
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.judgement import Family, digits, joined
from tokenrl.lab.compare.plan import SCORES, Problem
from tokenrl.runs.files import write_json, write_text
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
COLOURS = {"better": 3, "worse": 2, "equivalent": 1}
"""Colours of the verdicts in the palette of the charts; the others are grey."""
COMPLETIONS = 4
"""How many completions of the first run of each arm are shown on each problem."""


def write_comparison(comparison: Comparison) -> Path:
    """Write the tables and report.html into the directory of a comparison; return the page.

    Raises:
        Stopped: a file could not be written.
    """
    write_tables(comparison)
    plan = comparison.plan
    packages = versions()
    runs = comparison.table.runs
    compared = runs.query("role == 'comparison'")
    subtitle = (
        f"{len(compared)} runs over {len(plan.seeds)} seeds, {compared['failed'].sum() or 'none'} of them failed; "
        f"made with tokenrl {packages['tokenrl']}"
    )
    labels = [problem.label for problem in plan.problems]
    origin = (plan.command or FROM_PYTHON, CITATION.format(**packages), packages)
    context = markup.table(["", ""], list(_context(comparison).items()), "words")
    sections = [markup.Section("", [markup.paragraph(subtitle, "soft")])]
    for label in labels:
        sections.append(markup.Section(f"Verdict on {label}", [_verdict(comparison, label)]))
    sections.append(markup.Section("What was compared", [context]))
    for problem in plan.problems:
        sections += _of_problem(comparison, problem)
    closed = {
        "Sample completions": [markup.completions(_completions(comparison))],
        "Every difference, in each metric": [_table(comparison.differences())],
        "Every run": [_table(runs)],
        "To repeat, and to cite": [markup.preformatted(part) for part in origin],
        "The plan": [markup.preformatted(asdict(plan))],
    }
    sections += [markup.Section(heading, blocks, closed=True) for heading, blocks in closed.items()]
    title = f"Comparison of {len(plan.arms)} arms on {', '.join(labels)}"
    return markup.write_page(comparison.output_dir / "report.html", title, sections)


def write_tables(comparison: Comparison) -> None:
    """Write runs.csv, comparisons.csv and comparison.json, which hold no times.

    Two comparisons with the same seeds can therefore be compared bit for bit.

    Raises:
        Stopped: a file cannot be written.
    """
    folder = comparison.output_dir
    write_text(folder / "runs.csv", comparison.table.runs.to_csv(index=False))
    write_text(folder / "comparisons.csv", comparison.differences().to_csv(index=False))
    families = comparison.judgement.families
    caveats = comparison.caveats.items()
    packages = versions()
    values = {
        "plan": asdict(comparison.plan),
        "headlines": {label: comparison.headline(label) for label in comparison.caveats},
        "sentences": {family.problem: family.sentences() for family in families},
        "caveats": {label: [caveat.text for caveat in group] for label, group in caveats},
        "thresholds": comparison.thresholds.to_dict("records"),
        "versions": packages,
        "citation": CITATION.format(**packages),
    }
    write_json(folder / "comparison.json", values)


def _verdict(comparison: Comparison, label: str) -> markup.Block:
    """Show the verdict on a problem in words, then each difference, and what the verdict does not mean."""
    sentences = comparison.judgement.of(label).sentences()
    plan = comparison.plan
    if len(plan.arms) > 2 and not plan.all_pairs:
        sentences.append(
            f"Each was compared with {plan.reference}; --all-pairs compares all pairs."
        )
    caveats = [caveat.text for caveat in comparison.caveats[label]]
    return markup.verdict(comparison.headline(label), sentences, caveats)


def _context(comparison: Comparison) -> dict[str, str]:
    """Return by heading what was compared, what counts as a failure, and how intervals are made."""
    context = {name.capitalize(): fact for name, fact in comparison.plan.describe().items()}
    failures = "runs that broke off"
    if comparison.plan.failure_below is not None:
        failures += f", or ended with a reward below {comparison.plan.failure_below:g}"
    levels = sorted({difference.level for difference in comparison.judgement.differences})
    at_levels = joined([f"{level:.2%}" for level in levels])
    return context | {
        "Failures": f"{failures}; their rates have exact limits, each of which holds with 95 %, and Fisher's "
        "test compares them",
        "Intervals": "Student-t, of the mean difference paired by seed between runs that did not fail. The "
        f"verdict is read from the interval at {at_levels}, so that with 95 % all verdicts on a problem hold "
        "together.",
    }


def _of_problem(comparison: Comparison, problem: Problem) -> list[markup.Section]:
    """Return the sections on one problem: differences, curves, a table of the arms, and tuned rates."""
    label = problem.label
    curves = comparison.table.curves_of(label)
    unit = f"held-out, sampled, over {problem.unit}; mean over seeds, band from the lowest to the highest"
    mark = None if problem.solved is None else ("solved", problem.solved)
    charts = [Chart("reward", unit, _curves(comparison, curves, "reward"), large=True, mark=mark)]
    for metric in all_metrics():
        is_shown = metric.name == "reward_greedy" or metric.panel == "health"
        if is_shown and metric.name in curves and curves[metric.name].nunique() > 1:
            drawn = _curves(comparison, curves, metric.name)
            charts.append(Chart(metric.name, metric.caption, drawn))
    blocks = {
        "Differences": markup.drawings([_forest(comparison, comparison.judgement.of(label))]),
        "Learning": markup.drawings(charts),
        "Arms": _table(_arm_summary(comparison, label), "wide fit"),
        "Learning rates": markup.drawings(_rate_charts(comparison, label)),
    }
    return [markup.Section(f"{heading} on {label}", [block]) for heading, block in blocks.items()]


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


def _curves(comparison: Comparison, curves: pd.DataFrame, metric: str) -> list[Curve]:
    """Return the mean of a metric over each arm's runs, with a band from the lowest to the highest run."""
    drawn = []
    for colour, arm in enumerate(comparison.plan.arms, start=1):
        by_samples = curves.query("arm == @arm.label").groupby("samples")[metric]
        points = by_samples.agg(["mean", "min", "max"]).dropna()
        mean, low, high = points.to_numpy().T.tolist()
        drawn.append(Curve(list(points.index), mean, arm.label, colour, True, (low, high)))
    return drawn


def _arm_summary(comparison: Comparison, label: str) -> pd.DataFrame:
    """Return each arm's failures, mean scores, share of clipped updates, and samples until a threshold."""
    runs = comparison.table.of(label)
    means = runs.query("not failed").groupby("arm").mean(numeric_only=True)
    failures = {}
    for arm in comparison.judgement.of(label).arms:
        failures[arm.arm] = f"{arm.count} [{arm.failures.low:.0%}, {arm.failures.high:.0%}]"
    frame = pd.DataFrame({"failed": failures}).rename_axis("arm")
    frame = frame.join(means.filter([*comparison.judgements, "grad_clipped", "learning_rate"]))
    reached = {}
    for row in comparison.thresholds.query("problem == @label").to_dict("records"):
        samples = "never for half of them"
        if math.isfinite(row["median_samples"]):
            samples = f"{row['median_samples']:,.0f}"
        reached[row["arm"]] = f"{row['reached']} of {row['runs']}, {samples}"
        column = "reach {threshold:.3g} ({chosen}), median".format(**row)
    if reached:
        frame[column] = pd.Series(reached)
    return frame.rename(columns=lambda name: str(name).replace("_", " ")).reset_index()


def _rate_charts(comparison: Comparison, label: str) -> list[Chart]:
    """Draw the scores by learning rate on the tuning seeds; nothing unless rates were tuned."""
    tuning = comparison.table.of(label, role="tuning")
    curves = []
    for colour, (arm, runs) in enumerate(tuning.groupby("arm", sort=False), start=1):
        means = runs.groupby("learning_rate")[comparison.plan.metric].mean().dropna()
        x = list(np.log2(means.index))
        curves.append(Curve(x, list(means), str(arm), colour, dots=True))
    if not curves:
        return []
    ticks = {math.log2(rate): f"{rate:.3g}" for rate in tuning["learning_rate"]}
    unit = (
        "mean over the tuning seeds on which the rate was tried, which the comparison does not use"
    )
    return [Chart("Score by learning rate", unit, curves, True, None, False, ticks, False)]


def _completions(comparison: Comparison) -> list[dict[str, object]]:
    """Return some completions of the first run of each arm on each problem, to sort and to filter."""
    runs = comparison.table.runs.query("role == 'comparison'").dropna(subset="samples")
    rows = []
    for run in runs.drop_duplicates(["problem", "arm"]).itertuples():
        completions = read_run(comparison.output_dir / str(run.path)).completions()
        stride = max(1, len(completions) // COMPLETIONS)
        for row in completions[::stride][:COMPLETIONS]:
            texts = {name: row.get(name) for name in ("prompt", "completion", "reward")}
            rows.append({"problem": run.problem, "arm": run.arm, **texts})
    return rows


def _table(frame: pd.DataFrame, style: str = "wide") -> markup.Block:
    rows = [list(map(_cell, row)) for row in frame.itertuples(index=False)]
    return markup.table(list(map(str, frame.columns)), rows, style)


def _cell(value: object) -> str:
    if pd.isna(value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
