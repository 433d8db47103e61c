"""Judges what exists already: runs, as a program made them, or scores of any program.

Who chose what to compare after a look at the runs has an exploratory verdict: its error is larger than the level says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tokenrl.errors import Refused, refusing
from tokenrl.files import write_json
from tokenrl.lab.compare.arguments import JudgeArguments
from tokenrl.lab.compare.comparison import judge_rows
from tokenrl.lab.compare.decisions import judge_scores
from tokenrl.lab.compare.equality import WITHIN_ARM
from tokenrl.lab.compare.judgement import Judgement, exit_code
from tokenrl.lab.compare.page import verdicts_of
from tokenrl.lab.compare.plan import SCORES
from tokenrl.lab.compare.table import Axis, points, rows_of
from tokenrl.runs import ENDED, differences, read_run
from tokenrl.settings import check_choice

BASELINE, CANDIDATE = "baseline", "candidate"


@dataclass(frozen=True)
class JudgedRuns:
    """The verdict on runs that exist.

    Attributes:
        judgement: that of the comparison of `candidate` with `baseline`.
        settings: the settings, and hashes of code, in which the two differ: a row for each, with a column for each of
            them.
    """

    judgement: Judgement
    settings: pd.DataFrame

    def record(self) -> dict[str, Any]:
        """Return what `--json` writes."""
        return verdicts_of(self.judgement) | {"settings": self.settings.to_dict("index")}


def judge_recorded(
    baseline: Sequence[str | os.PathLike[str]],
    candidate: Sequence[str | os.PathLike[str]],
    *,
    metric: str = "area",
    margin: float | None = None,
    failure_below: float | None = None,
) -> JudgedRuns:
    """Judge whether the runs of a candidate are better than those of a baseline, paired by seed.

    They are compared as the runs of a comparison are, by the evaluations at the same steps.

    Args:
        baseline: the directories of its runs, one for each seed.
        candidate: the same.
        metric: the score that decides, as of `tokenrl compare`.
        margin: smaller differences count as none; None for no equivalence.
        failure_below: runs that end with a lower sampled reward failed, like runs that broke off.

    Raises:
        Refused: a directory holds no run, or one that has not ended; the runs differ in what decides what is
            measured; or runs of one kind differ in more than their seed.
        Stopped: no run has the score.
    """
    check_choice("metric", metric, SCORES)
    if not baseline or not candidate:
        raise Refused(
            "Name the directories of runs of both: --baseline RUN ... --candidate RUN ..."
        )
    arms = [BASELINE] * len(baseline) + [CANDIDATE] * len(candidate)
    runs = [*map(read_run, (*baseline, *candidate))]
    first = runs[0].config  # with which all agree, or they are refused
    steps = points(int(first.get("max_steps") or 1), int(first.get("eval_every") or 0))
    known = [
        ({"arm": arm, "seed": run.config.get("seed")}, run.path, run)
        for arm, run in zip(arms, runs, strict=True)
    ]
    rows = rows_of(known, Axis("step", steps), metric, failure_below)
    for row, run in zip(rows, runs, strict=True):
        if row["state"] not in ENDED:
            raise Refused(
                f"{run.path} has not ended: {row['reason']} Judge it once it has; to leave out runs that take long, or "
                "that were stopped, would favour an arm."
            )
    judgement = judge_rows(pd.DataFrame(rows), metric, margin=margin)
    of_arms = {BASELINE: runs[0], CANDIDATE: runs[len(baseline)]}
    return JudgedRuns(judgement, differences(of_arms, left_out=WITHIN_ARM))


def judge(args: JudgeArguments) -> int:
    """Judge runs that exist, or scores of any program, and print the verdicts; return the exit code."""
    runs = args.baseline or args.candidate
    if bool(runs) == bool(args.scores):
        raise Refused(
            "Give --baseline RUN ... and --candidate RUN ..., or --scores FILE, and not both."
        )
    if runs:
        judged = judge_recorded(
            args.baseline,
            args.candidate,
            metric=args.metric or "area",
            margin=args.margin,
            failure_below=args.failure_below,
        )
        judgement = judged.judgement
        record = judged.record()
        print(judged.settings.to_string() if len(judged.settings) else "No setting differs.")
    else:
        judgement = _of_file(args)
        record = verdicts_of(judgement)
    codes = [exit_code(args.require, family) for family in judgement.families]
    for family in judgement.families:
        title = [family.problem] if family.problem else []
        print("", *title, family.table().to_string(), "", family.headline(), sep="\n")
        print("".join(f"- {sentence}\n" for sentence in family.sentences()), end="")
    if args.json:
        write_json(Path(args.json), record)
    return max(codes)


def _of_file(args: JudgeArguments) -> Judgement:
    """Judge the scores of a file in CSV."""
    options: dict[str, Any] = {"margin": args.margin, "failure_below": args.failure_below}
    fault = f"scores {args.scores!r} cannot be read"
    with refusing(fault, "Give a file in CSV with columns arm, seed and score."):
        table = pd.read_csv(str(args.scores), keep_default_na=False)
    return judge_scores(table, metric=args.metric or "score", **options)
