"""Writes the tables and the page of a comparison: first the verdict, last the raw tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

import tokenrl.runs.html as html
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.judgement import Family, listed, shown
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
FROM_PYTHON = "Started from Python: the same call of tokenrl.compare goes on with it, or shows it again."
COLOURS = {"better": 3, "worse": 2, "equivalent": 1}
"""Colours of the verdicts in the palette of the charts; the others are grey."""
GREEDY = {"reward_greedy": ("greedy reward", "held-out, of the most probable completion or action")}
COMPLETIONS = 4
"""Completions of each arm on each problem, from its first run."""


def write_comparison(found: Comparison) -> Path:
    """Write the tables and report.html into the directory of a comparison; return the page.

    Raises:
        Stopped: a file could not be written.
    """
    write_tables(found)
    plan, packages = found.plan, versions()
    runs = found.table.runs[found.table.runs["role"] == "comparison"]
    subtitle = (
        f"{len(runs)} runs over {len(plan.seeds)} seeds, {runs['failed'].sum() or 'none'} of them failed; "
        f"made with tokenrl {packages['tokenrl']}"
    )
    origin = (plan.command or FROM_PYTHON, CITATION.format(**packages), packages)
    on = {one.label: f" on {one.label}" if len(plan.problems) > 1 else "" for one in plan.problems}
    sections = [
        html.Section("", [html.paragraph(subtitle, "soft")]),
        *(html.Section(f"Verdict{on[label]}", [_verdict(found, label)]) for label in on),
        html.Section("What was compared", [html.table(["", ""], list(_facts(found).items()), "words")]),
        *(part for problem in plan.problems for part in _of_problem(found, problem, on[problem.label])),
        html.Section("Sample completions", [html.completions(_completions(found))], closed=True),
        html.Section("Every difference, in each metric", [_frame(found.differences())], closed=True),
        html.Section("Every run", [_frame(found.table.runs)], closed=True),
        html.Section("To repeat, and to cite", [html.preformatted(one) for one in origin], closed=True),
        html.Section("The plan", [html.preformatted(asdict(plan))], closed=True),
    ]
    title = f"Comparison of {len(plan.arms)} arms on {', '.join(on)}"
    return html.write_page(found.output_dir / "report.html", title, sections)


def write_tables(found: Comparison) -> None:
    """Write runs.csv, comparisons.csv and comparison.json, which hold no times.

    Two comparisons with the same seeds can therefore be compared bit for bit.

    Raises:
        Stopped: a file cannot be written.
    """
    write_text(found.output_dir / "runs.csv", found.table.runs.to_csv(index=False))
    write_text(found.output_dir / "comparisons.csv", found.differences().to_csv(index=False))
    packages, families = versions(), found.judgement.families
    write_json(
        found.output_dir / "comparison.json",
        {
            "plan": asdict(found.plan),
            "headlines": {family.problem: found.headline(family.problem) for family in families},
            "sentences": {family.problem: family.sentences() for family in families},
            "caveats": {label: [c.text for c in each] for label, each in found.caveats.items()},
            "thresholds": found.thresholds.to_dict("records"),
            "versions": packages,
            "citation": CITATION.format(**packages),
        },
    )


def _verdict(found: Comparison, label: str) -> html.Block:
    """Say in plain words what was found on a problem, then each difference, and what to keep in mind."""
    sentences = found.judgement.of(label).sentences()
    if len(found.plan.arms) > 2 and not found.plan.all_pairs:
        sentences.append(
            f"Each was compared with {found.plan.reference}; --all-pairs compares them with each other."
        )
    return html.verdict(found.headline(label), sentences, [caveat.text for caveat in found.caveats[label]])


def _facts(found: Comparison) -> dict[str, str]:
    below = found.plan.failure_below
    also = "" if below is None else f", or ended with a reward below {below:g}"
    levels = sorted({one.level for family in found.judgement.families for one in family.differences})
    return {
        **{name.capitalize(): fact for name, fact in found.plan.in_words().items()},
        "Failures": f"runs that broke off{also}; their rates have exact limits, each of which holds with "
        "95 %, and Fisher's test compares them",
        "Intervals": "Student-t, of the mean difference paired by seed between runs that did not fail. The "
        f"verdict is read from the interval at {listed([f'{level:.2%}' for level in levels])}, so that with "
        "95 % all verdicts on a problem hold together.",
    }


def _of_problem(found: Comparison, problem: Problem, on: str) -> Iterator[html.Section]:
    """Yield the sections on one problem, whose headings end in `on`."""
    curves = found.table.curves_of(problem.label)
    unit = f"held-out, sampled, over {problem.unit}; mean over seeds, band from the lowest to the highest"
    mark = None if problem.solved is None else ("solved", problem.solved)
    reward = Chart("reward", unit, _curves(found, curves, "reward"), large=True, mark=mark)
    small = [
        Chart(name, unit, _curves(found, curves, metric))
        for metric, (name, unit) in (GREEDY | DIAGNOSTICS).items()
        if metric in curves and curves[metric].nunique() > 1
    ]
    yield html.Section(
        f"Differences{on}", [html.drawings([_forest(found, found.judgement.of(problem.label))])]
    )
    yield html.Section(f"Learning{on}", [html.drawings([reward, *small])])
    yield html.Section(f"Arms{on}", [_frame(_arms(found, problem.label), "wide fit")])
    yield html.Section(f"Learning rates{on}", [html.drawings(_rates(found, problem.label))])


def _forest(found: Comparison, family: Family) -> Forest:
    """Draw the differences of a family, and below them the reference against itself."""
    words = (
        f"in the {SCORES[found.plan.metric]}, paired by seed, of runs that did not fail. Small dots are "
        "seeds, the dot is their mean, the thick bar its 95 % interval, the thin one decides. "
    )
    if family.margin is not None:
        words += f"The band is the margin of equivalence, {shown(family.margin)}. "
    rows = {
        f"{d.arm} - {d.reference}" if d.reference != family.reference else d.arm: d
        for d in family.differences
    }
    if family.itself:
        words += "The last line shows what no difference looks like."
        rows[f"{family.reference} against itself"] = family.itself
    bars = []
    for name, one in rows.items():
        said, values = "same arm" if one is family.itself else one.verdict, list(one.differences.values())
        ends = one.mean.value, one.mean[1:], one.adjusted[1:]
        if values:
            bars.append(Bars(name, f"{said}, {one.apart}", *ends, values, COLOURS.get(said, 0)))
    return Forest(f"Difference to {family.reference}", words, bars, family.margin)


def _curves(found: Comparison, curves: pd.DataFrame, metric: str) -> list[Curve]:
    """Return the mean of a metric over each arm's runs, with a band from the lowest to the highest run."""
    drawn = []
    for number, arm in enumerate(found.plan.arms, start=1):
        of_arm = curves[curves["arm"] == arm.label].groupby("samples")[metric].agg(["mean", "min", "max"])
        x, (y, *band) = list(of_arm.dropna().index), of_arm.dropna().to_numpy().T.tolist()
        drawn.append(Curve(x, y, arm.label, colour=number, dots=True, band=(band[0], band[1])))
    return drawn


def _arms(found: Comparison, label: str) -> pd.DataFrame:
    """Return each arm's failures, mean scores, share of clipped updates, and its way to a threshold."""
    runs, arms = found.table.of(label), found.judgement.of(label).arms
    means = runs[~runs["failed"]].groupby("arm").mean(numeric_only=True)
    rows = {arm.arm: f"{arm.count} [{arm.failures.low:.0%}, {arm.failures.high:.0%}]" for arm in arms}
    frame = pd.DataFrame({"failed": rows}).rename_axis("arm")
    frame = frame.join(means.filter([*found.judgements, "grad_clipped", "learning_rate"]))
    way = found.thresholds[found.thresholds["problem"] == label].set_index("arm")
    if len(way):
        reached = way["reached"].astype(str) + " of " + way["runs"].astype(str) + ", "
        median = way["median_samples"].map("{:,.0f}".format).replace("inf", "never for half of them")
        frame["reach {threshold:.3g} ({chosen}), median".format(**way.iloc[0])] = reached + median
    return frame.rename(columns=lambda name: str(name).replace("_", " ")).reset_index()


def _rates(found: Comparison, label: str) -> list[Chart]:
    """Draw the scores by learning rate on the tuning seeds; nothing unless rates were tuned."""
    tried, curves = found.table.of(label, role="tuning"), []
    for number, (arm, of_arm) in enumerate(tried.groupby("arm", sort=False), start=1):
        means = of_arm.groupby("learning_rate")[found.plan.metric].mean().dropna()
        curves.append(Curve(list(np.log2(means.index)), list(means), str(arm), colour=number, dots=True))
    places = {math.log2(rate): f"{rate:.3g}" for rate in tried["learning_rate"]}
    words = "mean over the tuning seeds on which the rate was tried, which the comparison does not use"
    chart = Chart("Score by learning rate", words, curves, True, whole=False, ticks=places, last=False)
    return [chart] if curves else []


def _completions(found: Comparison) -> list[dict[str, object]]:
    """Return some completions of the first run of each arm on each problem, to sort and to filter."""
    runs, rows = found.table.runs, list[dict[str, object]]()
    runs = runs[(runs["role"] == "comparison") & runs["samples"].notna()]
    for run in runs.drop_duplicates(["problem", "arm"]).itertuples():
        kept = read_run(found.output_dir / str(run.path)).completions()
        for one in kept[:: max(1, len(kept) // COMPLETIONS)][:COMPLETIONS]:
            texts = {name: one.get(name) for name in ("prompt", "completion", "reward")}
            rows.append({"problem": run.problem, "arm": run.arm, **texts})
    return rows


def _frame(frame: pd.DataFrame, style: str = "wide") -> html.Block:
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return html.table(list(map(str, frame.columns)), rows, style)


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
