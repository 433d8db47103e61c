"""Judges the runs of a comparison, and holds and writes what was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from tokenrl.errors import Stopped
from tokenrl.lab.compare.caveats import Caveat, caveats, findings
from tokenrl.lab.compare.judge import judge_scores
from tokenrl.lab.compare.judgement import Family, Judgement
from tokenrl.lab.compare.overall import overall
from tokenrl.lab.compare.plan import Plan, Problem
from tokenrl.lab.compare.scores import SCORES, RunTable, thresholds
from tokenrl.runs.files import write_json, write_text
from tokenrl.runs.findings import Finding
from tokenrl.runs.origin import versions

CITATION = """@software{{tokenrl,
  title = {{tokenrl: policy gradients on language models, with declared bias}},
  version = {{{tokenrl}}},
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
        overall: by arm, all problems together; empty for a single one, or without declared ranges.
    """

    output_dir: Path
    plan: Plan
    table: RunTable
    judgement: Judgement
    beside: dict[str, Judgement]
    caveats: dict[str, list[Caveat]]
    thresholds: pd.DataFrame
    overall: dict[str, Any]

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
        return family.headline([c.headline for c in self.caveats[problem] if c.headline and decided])

    def sentences(self, problem: str) -> list[str]:
        """Return the verdict of each difference on a problem, then why arms are not valid."""
        return self.family(problem).sentences()

    def differences(self) -> pd.DataFrame:
        """Return every difference in each metric; the column `decides` marks those that give the verdicts."""
        first = self.judgement.table()
        decides = first["arm"].str.endswith(" itself").map({True: "no", False: "yes"})
        others = [judgement.table().assign(decides="no") for judgement in self.beside.values()]
        return pd.concat([first.assign(decides=decides), *others])


def judge_runs(output_dir: Path, plan: Plan, table: RunTable) -> Comparison:
    """Judge the runs of a comparison; those that have not been made are left out.

    Args:
        output_dir: its directory.
        plan: the plan.
        table: what was read from the runs, of all roles.

    Raises:
        Stopped: on a problem no run has the score that decides.
    """
    ours = table.runs[(table.runs["role"] == "comparison") & (table.runs["state"] != "missing")]
    found: dict[str, dict[str, list[Finding]]] = {problem.label: {} for problem in plan.problems}
    for problem, arm in product(plan.problems, plan.arms):
        runs = ours[ours["problem"] == problem.label]
        if runs[plan.metric].isna().all():
            raise _nothing(problem, plan.metric, runs)
        found[problem.label][arm.label] = findings(arm, problem, runs[runs["arm"] == arm.label])
    void = {
        (problem, arm): " ".join(one.text for one in each if one.weight == "void")
        for problem, by_arm in found.items()
        for arm, each in by_arm.items()
    }
    again = table.runs[(table.runs["role"] == "itself") & ~table.runs["failed"]]
    judgements = {}
    for name in dict.fromkeys((plan.metric, *SCORES, "entropy")):
        if name == plan.metric or (name in ours and ours.loc[~ours["failed"], name].notna().all()):
            itself = {
                str(p): dict(zip(of["seed"], of[name], strict=True)) for p, of in again.groupby("problem")
            }
            judgements[name] = judge_scores(
                ours[["problem", "arm", "seed", "failed"]].assign(score=ours[name]),
                metric=name,
                reference=plan.reference,
                margin=plan.margins if name == plan.metric else None,
                all_pairs=plan.all_pairs,
                void=void,
                itself=itself,
            )
    scores = ours.assign(score=ours[plan.metric])
    ranges = {problem.label: problem.reward_range for problem in plan.problems}
    return Comparison(
        output_dir=output_dir,
        plan=plan,
        table=table,
        judgement=judgements[plan.metric],
        beside={name: one for name, one in judgements.items() if name != plan.metric},
        caveats={p.label: caveats(plan, p, table, judgements, found[p.label]) for p in plan.problems},
        thresholds=pd.concat([thresholds(problem, table) for problem in plan.problems]),
        overall=overall(scores, ranges, judgements[plan.metric]),
    )


def _nothing(problem: Problem, metric: str, runs: pd.DataFrame) -> Stopped:
    """Say why nothing can be judged on a problem."""
    why = "Its runs do not measure that; give another --metric."
    for run in runs[runs["reason"] != ""].head(1).itertuples():
        why = f"{run.arm}, seed {run.seed}: {run.reason} Mend that, and give the same command again, which "
        why += "keeps the other runs."
    return Stopped(f"Nothing can be judged on {problem.label}: no run has the score {metric}. {why}")


def write_tables(found: Comparison) -> None:
    """Write runs.csv, comparisons.csv and comparison.json, which hold no times.

    Two comparisons with the same seeds can therefore be compared bit for bit.

    Raises:
        Stopped: a file cannot be written.
    """
    write_text(found.output_dir / "runs.csv", found.table.runs.to_csv(index=False))
    write_text(found.output_dir / "comparisons.csv", found.differences().to_csv(index=False))
    labels, packages = [problem.label for problem in found.plan.problems], versions()
    write_json(
        found.output_dir / "comparison.json",
        {
            "plan": asdict(found.plan),
            "headlines": {label: found.headline(label) for label in labels},
            "sentences": {label: found.sentences(label) for label in labels},
            "caveats": {label: [c.text for c in found.caveats[label]] for label in labels},
            "thresholds": found.thresholds.to_dict("records"),
            "overall": found.overall,
            "versions": packages,
            "citation": CITATION.format(**packages),
        },
    )
