"""Judges runs that exist already, as a program made them: is the candidate better than the baseline?

Who chose what to compare after a look at the runs has an exploratory verdict: its error is larger than the level says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from tokenrl.errors import Refused
from tokenrl.lab.compare.decisions import judge_scores
from tokenrl.lab.compare.judgement import Family, Judgement
from tokenrl.lab.compare.page import NOT_COMPARED, verdicts_of
from tokenrl.runs.findings import evaluations
from tokenrl.runs.reader import RecordedRun, read_run
from tokenrl.runs.signals import ended_by_itself

BASELINE, CANDIDATE = "baseline", "candidate"
EQUAL = ("kind", "task", "env", "hashes.data", "steps of evaluations")
"""What is the same in all runs that can be compared."""
SHOWING = {
    *NOT_COMPARED,
    *EQUAL,
    "seed",
    "hashes",
    "logging_steps",
    "log_completions",
    "report_to",
    "threads",
}
"""What is no setting that makes a run better."""


class JudgedRuns(NamedTuple):
    """The verdict on runs that exist.

    Attributes:
        judgement: that of the comparison of `candidate` with `baseline`.
        settings: the settings in which the two differ, a row for each, with a column for each of them.
    """

    judgement: Judgement
    settings: pd.DataFrame

    @property
    def family(self) -> Family:
        """The only comparison."""
        return self.judgement.families[0]

    def record(self) -> dict[str, Any]:
        """Return what `--json` writes."""
        return verdicts_of(self.judgement) | {"settings": self.settings.to_dict("index")}


def judge_recorded(
    baseline: Sequence[str | os.PathLike[str]],
    candidate: Sequence[str | os.PathLike[str]],
    *,
    margin: float | None = None,
    failure_below: float | None = None,
) -> JudgedRuns:
    """Judge whether the runs of a candidate are better than those of a baseline, paired by seed.

    The score of a run is its held-out sampled reward, averaged over its evaluations after training began.

    Args:
        baseline: the directories of its runs, one for each seed.
        candidate: the same.
        margin: smaller differences count as none; None for no equivalence.
        failure_below: runs with a lower score failed, like runs that broke off.

    Raises:
        Refused: a directory holds no run; runs differ in their data, or were evaluated at other steps; or runs of
            one kind differ in more than their seed.
    """
    if not baseline or not candidate:
        raise Refused(
            "Name the directories of runs of both: --baseline RUN ... --candidate RUN ..."
        )
    runs = [*map(read_run, (*baseline, *candidate))]
    kinds = [BASELINE] * len(baseline) + [CANDIDATE] * len(candidate)
    configs = pd.json_normalize([run.config | {"kind": run.kind} for run in runs]).astype(str)
    configs["steps of evaluations"] = [
        str([row["step"] for row in run.evaluations]) if ended_by_itself(run.summary) else None
        for run in runs  # one that broke off has fewer
    ]
    for name in configs.columns.intersection(EQUAL):
        if configs[name].nunique() > 1:
            values = ", ".join(configs[name].dropna().unique())
            raise Refused(f"The runs cannot be compared, as they differ in {name}: {values}.")
    names = [name for name in configs if name.partition(".")[0] not in SHOWING]
    by_kind = configs[names].groupby(kinds)
    mixed = by_kind.nunique().max() > 1
    if mixed.any():
        raise Refused(
            f"Runs of one kind differ in {', '.join(mixed.index[mixed][:5])}. Give runs that differ in their seeds "
            "alone."
        )
    settings = by_kind.first().T
    scores = pd.Series(map(_score, runs))
    failed = scores.isna() | configs["steps of evaluations"].isna()
    table = configs[["seed"]].assign(arm=kinds, score=scores, failed=failed)
    judged = judge_scores(table, margin=margin, failure_below=failure_below)
    return JudgedRuns(judged, settings[settings.nunique(axis=1) > 1])


def _score(run: RecordedRun) -> float:
    """Return the mean reward of the evaluations after training began; nan without any."""
    means = evaluations(run.evaluations, "reward")
    return float(pd.Series([mean.value for mean in means if mean.step], dtype=float).mean())
