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
from tokenrl.lab.compare.judgement import Judgement
from tokenrl.lab.compare.overall import overall
from tokenrl.lab.compare.plan import SCORES, Plan
from tokenrl.lab.compare.scores import RunTable, thresholds
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
        judgements: failures, paired differences and verdicts by score; that of the plan decides.
        caveats: by problem, what the numbers do not mean.
        thresholds: by problem and arm, how many runs reach a reward, and the median of the samples to it.
        overall: by arm, all problems together; empty for a single one, or without declared ranges.
    """

    output_dir: Path
    plan: Plan
    table: RunTable
    judgements: dict[str, Judgement]
    caveats: dict[str, list[Caveat]]
    thresholds: pd.DataFrame
    overall: dict[str, Any]

    @property
    def judgement(self) -> Judgement:
        """The judgement in the metric that decides."""
        return self.judgements[self.plan.metric]

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run of the comparison failed; failures on tuning seeds only make a rate a bad one."""
        runs = self.table.runs
        return int((runs["state"] != "finished")[runs["role"] != "tuning"].any())

    def headline(self, problem: str) -> str:
        """Return the verdicts on a problem in a sentence or two, with what qualifies them."""
        family = self.judgement.of(problem)
        decided = any(d.verdict in ("better", "worse", "equivalent") for d in family.differences)
        qualified = dict.fromkeys(c.headline for c in self.caveats[problem] if c.headline and decided)
        return family.headline(list(qualified))

    def differences(self) -> pd.DataFrame:
        """Return every difference in each metric; the column `decides` marks those that give the verdicts."""
        found = pd.concat([judgement.table() for judgement in self.judgements.values()])
        decides = (found["metric"] == self.plan.metric) & ~found["arm"].str.endswith(" itself")
        return found.assign(decides=decides.map({True: "yes", False: "no"}))


def judge_runs(output_dir: Path, plan: Plan, table: RunTable) -> Comparison:
    """Judge the runs of a comparison; those that have not been made are left out.

    Args:
        output_dir: its directory.
        plan: the plan.
        table: what was read from the runs, of all roles.

    Raises:
        Stopped: on a problem no run has the score that decides.
    """
    made, metric = table.runs[table.runs["state"] != "missing"], plan.metric
    ours, again = made[made["role"] == "comparison"], made[(made["role"] == "itself") & ~made["failed"]]
    found: dict[str, dict[str, list[Finding]]] = {problem.label: {} for problem in plan.problems}
    void = {}
    for problem, arm in product(plan.problems, plan.arms):
        runs = ours[ours["problem"] == problem.label]
        if runs[metric].isna().all():
            why = " ".join(f"{r.arm}, seed {r.seed}: {r.reason}" for r in runs[:1].itertuples())
            raise Stopped(f"Nothing can be judged on {problem.label}: no run has the score {metric}. {why}")
        each = findings(arm, problem, runs[runs["arm"] == arm.label])
        found[problem.label][arm.label] = each
        void[problem.label, arm.label] = " ".join(one.text for one in each if one.weight == "void")
    sound = ours[~ours["failed"]]
    known = [name for name in (*SCORES, "entropy") if name in sound and sound[name].notna().all()]
    judgements = {
        name: judge_scores(
            ours,
            metric=name,
            reference=plan.reference,
            margin=plan.margins if name == metric else None,
            all_pairs=plan.all_pairs,
            void=void,
            itself={str(p): of.set_index("seed")[name].to_dict() for p, of in again.groupby("problem")},
        )
        for name in dict.fromkeys([metric, *known])
    }
    ranges = {problem.label: problem.reward_range for problem in plan.problems}
    return Comparison(
        output_dir=output_dir,
        plan=plan,
        table=table,
        judgements=judgements,
        caveats={p.label: caveats(plan, p, table, judgements, found[p.label]) for p in plan.problems},
        thresholds=pd.concat([thresholds(problem, table) for problem in plan.problems]),
        overall=overall(ours.assign(score=ours[metric]), ranges, judgements[metric]),
    )


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
            "overall": found.overall,
            "versions": packages,
            "citation": CITATION.format(**packages),
        },
    )
