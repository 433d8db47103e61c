"""Judges the runs of a comparison, and holds and writes what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokenrl.errors import Stopped
from tokenrl.lab.compare.caveats import Caveat, caveats, findings
from tokenrl.lab.compare.judge import judge_scores
from tokenrl.lab.compare.judgement import Family, Judgement
from tokenrl.lab.compare.overall import improvement_overall, overall
from tokenrl.lab.compare.plan import Plan, Problem
from tokenrl.lab.compare.scores import RunTable, to_threshold
from tokenrl.lab.compare.tuning import Sensitivity
from tokenrl.lab.compare.words import headline, sentence
from tokenrl.runs.directory import versions
from tokenrl.runs.files import write_json, write_text

BESIDE = ("area", "reward", "area_greedy", "reward_greedy", "entropy")
"""Scores that are shown beside the one that decides."""
CITATION = """@software{{tokenrl,
  title = {{tokenrl: policy gradients on language models, with declared bias}},
  version = {{{version}}},
  year = {{2026}},
}}"""


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; its directory holds the same in files.

    Attributes:
        output_dir: the directory.
        plan: what was planned before anything was run.
        table: what was read from each run, of all roles.
        judgement: failures, paired differences and verdicts in the metric of the plan.
        beside: the same in other metrics, by name, which decide nothing.
        caveats: by problem, what the numbers do not mean.
        thresholds: by problem and arm, how many runs reach a reward, and the median of the samples to it.
        sensitivity: by problem and arm, the scores by learning rate on the tuning seeds; empty unless tuned.
        overall: by arm, all problems together; empty for a single one, or without declared ranges.
        versions: versions of the packages.
    """

    output_dir: Path
    plan: Plan
    table: RunTable
    judgement: Judgement
    beside: dict[str, Judgement]
    caveats: dict[str, list[Caveat]]
    thresholds: pd.DataFrame
    sensitivity: Sensitivity
    overall: dict[str, Any]
    versions: dict[str, str]

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run of the comparison failed; failures on tuning seeds only make a rate a bad one."""
        runs = self.table.runs
        return int((runs["state"] != "finished")[runs["role"] != "tuning"].any())

    def family(self, problem: str) -> Family:
        """Return the comparisons on a problem, in the metric that decides."""
        return next(family for family in self.judgement.families if family.problem == problem)

    def headline(self, problem: str) -> str:
        """Return the verdicts on a problem in a sentence or two, with what qualifies them."""
        family = self.family(problem)
        decided = any(d.verdict in ("better", "worse", "equivalent") for d in family.differences)
        return headline(family, [c.headline for c in self.caveats[problem] if c.headline and decided])

    def sentences(self, problem: str) -> list[str]:
        """Return the verdict of each difference on a problem, then why arms are not valid."""
        family = self.family(problem)
        void = [f"{arm.arm} is not valid: {arm.void}" for arm in family.arms if arm.void]
        return [*(sentence(one, family) for one in family.differences), *void]

    def differences(self) -> pd.DataFrame:
        """Return every difference in each metric; the column `decides` marks those that give the verdicts."""
        first = self.judgement.table()
        own = ~first["arm"].str.endswith(" itself")
        others = [judgement.table().assign(decides="no") for judgement in self.beside.values()]
        return pd.concat([first.assign(decides=own.map({True: "yes", False: "no"})), *others])


def judge_runs(output_dir: Path, plan: Plan, table: RunTable, sensitivity: Sensitivity) -> Comparison:
    """Judge the runs of a comparison; those that have not been made are left out.

    Args:
        output_dir: its directory.
        plan: the plan.
        table: what was read from the runs, of all roles.
        sensitivity: scores by learning rate on the tuning seeds.

    Raises:
        Stopped: on a problem no run has the score that decides.
    """
    ours = table.runs[(table.runs["role"] == "comparison") & (table.runs["state"] != "missing")]
    for problem in plan.problems:
        runs = ours[ours["problem"] == problem.label]
        if runs[plan.metric].isna().all():
            reasons = [f"{r.arm}, seed {r.seed}: {r.reason}" for r in runs.itertuples() if r.reason]
            mend = (
                f"{reasons[0]} Mend that, and give the same command again, which keeps the other runs."
                if reasons
                else "Its runs do not measure that; give another --metric."
            )
            raise Stopped(
                f"Nothing can be judged on {problem.label}: no run has the score {plan.metric}. {mend}"
            )
    void = {}
    for problem, arm in product(plan.problems, plan.arms):
        runs = ours[(ours["problem"] == problem.label) & (ours["arm"] == arm.label)]
        reasons = [one.text for one in findings(arm, problem, runs) if one.weight == "void"]
        if reasons:
            void[problem.label, arm.label] = " ".join(reasons)
    measured = [name for name in BESIDE if name in ours and ours.loc[~ours["failed"], name].notna().all()]
    judgements = {
        name: _judge(plan, table.runs, ours, name, void) for name in dict.fromkeys((plan.metric, *measured))
    }
    judgement = judgements[plan.metric]
    rates = {
        p.label: {arm: t for (label, arm), t in sensitivity.items() if label == p.label}
        for p in plan.problems
    }
    return Comparison(
        output_dir=output_dir,
        plan=plan,
        table=table,
        judgement=judgement,
        beside={name: one for name, one in judgements.items() if name != plan.metric},
        caveats={p.label: caveats(plan, p, table, judgements, rates[p.label]) for p in plan.problems},
        thresholds=pd.DataFrame(
            [row for problem in plan.problems for row in _thresholds(plan, problem, table)]
        ),
        sensitivity=sensitivity,
        overall=_overall(plan, ours, judgement),
        versions=versions(),
    )


def _judge(
    plan: Plan, runs: pd.DataFrame, ours: pd.DataFrame, metric: str, void: Mapping[tuple[str, str], str]
) -> Judgement:
    """Judge one metric; only the one that decides has a margin."""
    again = runs[(runs["role"] == "itself") & ~runs["failed"] & runs[metric].notna()]
    itself = {
        str(problem): dict(zip(of["seed"], of[metric], strict=True))
        for problem, of in again.groupby("problem")
    }
    return judge_scores(
        ours[["problem", "arm", "seed", "failed"]].assign(score=ours[metric]),
        metric=metric,
        reference=plan.reference,
        margin=plan.margins if metric == plan.metric else None,
        all_pairs=plan.all_pairs,
        void=void,
        itself=itself,
    )


def _thresholds(plan: Plan, problem: Problem, table: RunTable) -> list[dict[str, Any]]:
    """Measure the way to the reward that counts as solved, else to half of what the best arm gains."""
    runs = table.of(problem.label)
    curves = table.curves[table.curves["path"].isin(runs["path"])]
    if curves.empty:
        return []
    start, best = runs["before"].mean(), runs.groupby("arm")["reward"].mean().max()
    threshold = problem.solved if problem.solved is not None else (start + best) / 2
    if problem.solved is None and not best > start:
        return []
    needed = to_threshold(curves, threshold)
    rows = []
    for arm in plan.arms:
        each = needed.reindex(runs["path"][runs["arm"] == arm.label], fill_value=np.inf)
        rows.append({"problem": problem.label, "arm": arm.label, "threshold": threshold,
                     "chosen": "solved" if problem.solved is not None else "half of the best arm's gain",
                     "runs": len(each), "reached": int(np.isfinite(each).sum()),
                     "median_samples": float(each.median()) if len(each) else np.inf})  # fmt: skip
    return rows


def _overall(plan: Plan, ours: pd.DataFrame, judgement: Judgement) -> dict[str, Any]:
    ranges = {p.label: p.reward_range for p in plan.problems if p.reward_range is not None}
    scored = ours[ours[plan.metric].notna()]
    complete = scored.groupby(["problem", "arm"]).ngroups == len(plan.problems) * len(plan.arms)
    if len(plan.problems) < 2 or len(ranges) < len(plan.problems) or not complete:
        return {}
    found = overall(scored.assign(score=scored[plan.metric]), ranges)
    improved = improvement_overall(judgement)
    return {arm: {**one, "improvement": improved.get(arm)} for arm, one in found.items()}


def write_tables(found: Comparison) -> None:
    """Write runs.csv, comparisons.csv and comparison.json, which hold no times.

    Two comparisons with the same seeds can therefore be compared bit for bit.

    Raises:
        Stopped: a file cannot be written.
    """
    write_text(found.output_dir / "runs.csv", found.table.runs.to_csv(index=False))
    write_text(found.output_dir / "comparisons.csv", found.differences().to_csv(index=False))
    labels = [problem.label for problem in found.plan.problems]
    sensitivity = [
        {"problem": problem, "arm": arm, "rate": rate, "scores": scores}
        for (problem, arm), tried in found.sensitivity.items()
        for rate, scores in tried.items()
    ]
    write_json(
        found.output_dir / "comparison.json",
        {
            "plan": asdict(found.plan),
            "headlines": {label: found.headline(label) for label in labels},
            "sentences": {label: found.sentences(label) for label in labels},
            "caveats": {label: [c.text for c in found.caveats[label]] for label in labels},
            "thresholds": found.thresholds.to_dict("records"),
            "sensitivity": sensitivity,
            "overall": {
                arm: {k: list(v) if v else v for k, v in one.items()} for arm, one in found.overall.items()
            },
            "versions": found.versions,
            "command": found.plan.command,
            "citation": CITATION.format(version=found.versions.get("tokenrl", "")),
        },
    )
