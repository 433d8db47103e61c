"""Writes the tables and the page of a comparison: first the verdict, last the raw tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

import tokenrl.runs.markup as html
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.judgement import Family, digits, joined
from tokenrl.lab.compare.plan import SCORES, Problem
from tokenrl.runs.files import write_json, write_text
from tokenrl.runs.origin import versions
from tokenrl.runs.plots import Bars, Chart, Curve, Forest
from tokenrl.runs.reader import read_run
from tokenrl.runs.report import DIAGNOSTICS

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
GREEDY = {"reward_greedy": ("greedy reward", "held-out, of the most probable completion or action")}
COMPLETIONS = 4
"""How many completions of the first run of each arm are shown on each problem."""


def write_comparison(comparison: Comparison) -> Path:
    """Write the tables and report.html into the directory of a comparison; return the page.

    Raises:
        Stopped: a file could not be written.
    """
    write_tables(comparison)
    plan, packages = comparison.plan, versions()
    runs = comparison.table.runs[comparison.table.runs["role"] == "comparison"]
    subtitle = (
        f"{len(runs)} runs over {len(plan.seeds)} seeds, {runs['failed'].sum() or 'none'} of them failed; "
        f"made with tokenrl {packages['tokenrl']}"
    )
    origin = (plan.command or FROM_PYTHON, CITATION.format(**packages), packages)
    on = {p.label: f" on {p.label}" if len(plan.problems) > 1 else "" for p in plan.problems}
    sections = [
        html.Section("", [html.paragraph(subtitle, "soft")]),
        *(html.Section(f"Verdict{on[label]}", [_verdict(comparison, label)]) for label in on),
        html.Section("", [html.paragraph(comparison.proposal[0])] if comparison.proposal else []),
        html.Section(
            "What was compared", [html.table(["", ""], list(_context(comparison).items()), "words")]
        ),
        *(
            part
            for problem in plan.problems
            for part in _of_problem(comparison, problem, on[problem.label])
        ),
        html.Section(
            "Sample completions", [html.completions(_completions(comparison))], closed=True
        ),
        html.Section(
            "Every difference, in each metric", [_table(comparison.differences())], closed=True
        ),
        html.Section("Every run", [_table(comparison.table.runs)], closed=True),
        html.Section(
            "To repeat, and to cite", [html.preformatted(part) for part in origin], closed=True
        ),
        html.Section("The plan", [html.preformatted(asdict(plan))], closed=True),
    ]
    title = f"Comparison of {len(plan.arms)} arms on {', '.join(on)}"
    return html.write_page(comparison.output_dir / "report.html", title, sections)


def write_tables(comparison: Comparison) -> None:
    """Write runs.csv, comparisons.csv and comparison.json, which hold no times.

    Two comparisons with the same seeds can therefore be compared bit for bit.

    Raises:
        Stopped: a file cannot be written.
    """
    write_text(comparison.output_dir / "runs.csv", comparison.table.runs.to_csv(index=False))
    write_text(
        comparison.output_dir / "comparisons.csv", comparison.differences().to_csv(index=False)
    )
    packages, families = versions(), comparison.judgement.families
    write_json(
        comparison.output_dir / "comparison.json",
        {
            "plan": asdict(comparison.plan),
            "headlines": {
                family.problem: comparison.headline(family.problem) for family in families
            },
            "sentences": {family.problem: family.sentences() for family in families},
            "caveats": {
                label: [c.text for c in each] for label, each in comparison.caveats.items()
            },
            "thresholds": comparison.thresholds.to_dict("records"),
            "versions": packages,
            "citation": CITATION.format(**packages),
        },
    )


def _verdict(comparison: Comparison, label: str) -> html.Block:
    """Show the verdict on a problem in words, then each difference, and what the verdict does not mean."""
    sentences = comparison.judgement.of(label).sentences()
    if len(comparison.plan.arms) > 2 and not comparison.plan.all_pairs:
        sentences.append(
            f"Each was compared with {comparison.plan.reference}; --all-pairs compares all pairs."
        )
    return html.verdict(
        comparison.headline(label), sentences, [caveat.text for caveat in comparison.caveats[label]]
    )


def _context(comparison: Comparison) -> dict[str, str]:
    below = comparison.plan.failure_below
    low = "" if below is None else f", or ended with a reward below {below:g}"
    levels = sorted(
        {d.level for family in comparison.judgement.families for d in family.differences}
    )
    return {
        **{name.capitalize(): fact for name, fact in comparison.plan.describe().items()},
        "Failures": f"runs that broke off{low}; their rates have exact limits, each of which holds with "
        "95 %, and Fisher's test compares them",
        "Intervals": "Student-t, of the mean difference paired by seed between runs that did not fail. The "
        f"verdict is read from the interval at {joined([f'{level:.2%}' for level in levels])}, so that with "
        "95 % all verdicts on a problem hold together.",
    }


def _of_problem(comparison: Comparison, problem: Problem, on: str) -> Iterator[html.Section]:
    """Yield the sections on one problem, whose headings end in `on`."""
    curves = comparison.table.curves_of(problem.label)
    unit = f"held-out, sampled, over {problem.unit}; mean over seeds, band from the lowest to the highest"
    mark = None if problem.solved is None else ("solved", problem.solved)
    reward = Chart("reward", unit, _curves(comparison, curves, "reward"), large=True, mark=mark)
    small = [
        Chart(name, unit, _curves(comparison, curves, metric))
        for metric, (name, unit) in (GREEDY | DIAGNOSTICS).items()
        if metric in curves and curves[metric].nunique() > 1
    ]
    yield html.Section(
        f"Differences{on}",
        [html.drawings([_forest(comparison, comparison.judgement.of(problem.label))])],
    )
    yield html.Section(f"Learning{on}", [html.drawings([reward, *small])])
    yield html.Section(f"Arms{on}", [_table(_arm_summary(comparison, problem.label), "wide fit")])
    yield html.Section(
        f"Learning rates{on}", [html.drawings(_rate_charts(comparison, problem.label))]
    )


def _forest(comparison: Comparison, family: Family) -> Forest:
    """Draw the differences of a family."""
    words = (
        f"in the {SCORES[comparison.plan.metric]}, paired by seed, of runs that did not fail. Small dots are "
        "seeds, the dot is their mean, the thick bar its 95 % interval, the thin one decides. "
    )
    if family.margin is not None:
        words += f"The band is the margin of equivalence, {digits(family.margin)}. "
    rows = {
        f"{difference.arm} - {difference.reference}"
        if difference.reference != family.reference
        else difference.arm: difference
        for difference in family.differences
    }
    bars = []
    for name, difference in rows.items():
        values = list(difference.differences.values())
        word = difference.verdict
        ends = difference.mean.value, difference.mean[1:], difference.adjusted[1:]
        if values:
            bars.append(
                Bars(name, f"{word}, {difference.apart}", *ends, values, COLOURS.get(word, 0))
            )
    return Forest(f"Difference to {family.reference}", words, bars, family.margin)


def _curves(comparison: Comparison, curves: pd.DataFrame, metric: str) -> list[Curve]:
    """Return the mean of a metric over each arm's runs, with a band from the lowest to the highest run."""
    drawn = []
    for number, arm in enumerate(comparison.plan.arms, start=1):
        of_arm = (
            curves[curves["arm"] == arm.label]
            .groupby("samples")[metric]
            .agg(["mean", "min", "max"])
        )
        x, (y, *band) = list(of_arm.dropna().index), of_arm.dropna().to_numpy().T.tolist()
        drawn.append(Curve(x, y, arm.label, colour=number, dots=True, band=(band[0], band[1])))
    return drawn


def _arm_summary(comparison: Comparison, label: str) -> pd.DataFrame:
    """Return each arm's failures, mean scores, share of clipped updates, and samples until a threshold."""
    runs, arms = comparison.table.of(label), comparison.judgement.of(label).arms
    means = runs[~runs["failed"]].groupby("arm").mean(numeric_only=True)
    rows = {
        arm.arm: f"{arm.count} [{arm.failures.low:.0%}, {arm.failures.high:.0%}]" for arm in arms
    }
    frame = pd.DataFrame({"failed": rows}).rename_axis("arm")
    frame = frame.join(means.filter([*comparison.judgements, "grad_clipped", "learning_rate"]))
    thresholds = comparison.thresholds[comparison.thresholds["problem"] == label].set_index("arm")
    if len(thresholds):
        reached = thresholds["reached"].astype(str) + " of " + thresholds["runs"].astype(str) + ", "
        median = (
            thresholds["median_samples"]
            .map("{:,.0f}".format)
            .replace("inf", "never for half of them")
        )
        frame["reach {threshold:.3g} ({chosen}), median".format(**thresholds.iloc[0])] = (
            reached + median
        )
    return frame.rename(columns=lambda name: str(name).replace("_", " ")).reset_index()


def _rate_charts(comparison: Comparison, label: str) -> list[Chart]:
    """Draw the scores by learning rate on the tuning seeds; nothing unless rates were tuned."""
    tuning, curves = comparison.table.of(label, role="tuning"), []
    for number, (arm, of_arm) in enumerate(tuning.groupby("arm", sort=False), start=1):
        means = of_arm.groupby("learning_rate")[comparison.plan.metric].mean().dropna()
        curves.append(
            Curve(list(np.log2(means.index)), list(means), str(arm), colour=number, dots=True)
        )
    ticks = {math.log2(rate): f"{rate:.3g}" for rate in tuning["learning_rate"]}
    words = (
        "mean over the tuning seeds on which the rate was tried, which the comparison does not use"
    )
    chart = Chart(
        "Score by learning rate", words, curves, True, whole=False, ticks=ticks, last=False
    )
    return [chart] if curves else []


def _completions(comparison: Comparison) -> list[dict[str, object]]:
    """Return some completions of the first run of each arm on each problem, to sort and to filter."""
    runs, rows = comparison.table.runs, list[dict[str, object]]()
    runs = runs[(runs["role"] == "comparison") & runs["samples"].notna()]
    for run in runs.drop_duplicates(["problem", "arm"]).itertuples():
        completions = read_run(comparison.output_dir / str(run.path)).completions()
        for row in completions[:: max(1, len(completions) // COMPLETIONS)][:COMPLETIONS]:
            texts = {name: row.get(name) for name in ("prompt", "completion", "reward")}
            rows.append({"problem": run.problem, "arm": run.arm, **texts})
    return rows


def _table(frame: pd.DataFrame, style: str = "wide") -> html.Block:
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return html.table(list(map(str, frame.columns)), rows, style)


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
