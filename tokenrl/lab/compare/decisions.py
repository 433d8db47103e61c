"""Judges a table of scores: failures and paired differences by seed, with exact tests and verdicts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

import tokenrl.lab.compare.intervals as numbers
from tokenrl.errors import Refused
from tokenrl.lab.compare.intervals import Interval
from tokenrl.lab.compare.judgement import (
    ArmScores,
    Family,
    Judgement,
    PairedDifference,
    VerdictWord,
)
from tokenrl.settings import check_choice, check_number


def judge_scores(
    table: str | os.PathLike[str] | Iterable[Any],
    *,
    metric: str = "score",
    reference: str | None = None,
    margin: float | Mapping[str, float | None] | None = None,
    failed: Iterable[Sequence[Any]] = (),
    failure_below: float | None = None,
    all_pairs: bool = False,
    void: Mapping[tuple[str, str], str] | None = None,
) -> Judgement:
    """Judge scores of several arms over seeds; the scores may come from any tool.

    The unit is the run: its seed, not its prompts or episodes. A verdict has two parts. Failures are counted,
    with exact limits of their rate, and compared by Fisher's exact test. Runs that did not fail are compared
    by the seeds that both arms have; the Student-t interval of their mean difference decides, at the level of
    the family (Bonferroni over the comparisons on one problem, and over the two parts where a run failed).
    An arm that fails more often and is better otherwise is undecided. An interval of width zero decides
    nothing.

    Arms that are the same are called different in at most about 5 % of families. More often wrong are scores
    with long tails, and rare failures that are not declared: recipes/pages/verdicts.md has the rates.

    Args:
        table: rows with the columns `arm`, `seed` and `score`, if there are several `problem` (or `task`),
            and if you like `failed`: mappings, tuples (arm, seed, score) or (arm, seed, score, problem), a
            data frame, or the path of a CSV file.
        metric: name of the score, also the name of its column if there is no column `score`.
        reference: the arm that the others are compared with; None for the first.
        margin: differences below it count as none: a number, or one by problem; None for no equivalence.
        failed: runs that failed, as (arm, seed) or (problem, arm, seed), besides those that a column `failed`
            names. Their scores are not used and may be missing (nan).
        failure_below: runs with a lower score failed.
        all_pairs: compare all arms with each other, and not only with the reference.
        void: by problem and arm, the reason why its scores are not valid; they are shown without a verdict.

    Returns:
        Families of comparisons, one per problem.

    Raises:
        Refused: a row cannot be read, a score is not finite or given twice, there is one arm only, the
            reference or a problem of `margin` does not exist, or two arms have no seed in common.

    Example:
        >>> from tokenrl.lab import judge_scores
        >>> rows = [("ppo", s, x) for s, x in enumerate(ppo)] + [("rloo", s, x) for s, x in enumerate(rloo)]
        >>> judge_scores(rows, margin=0.02, failure_below=0.5).families[0].differences[0].verdict
    """
    frame = _rows(table, metric, {tuple(run) for run in failed}, failure_below)
    problems = list(dict.fromkeys(frame["problem"]))
    margins = margin if isinstance(margin, Mapping) else dict.fromkeys(problems, margin)
    for problem, limit in margins.items():
        check_choice("the problem in margin", problem, problems)
        if limit is not None:
            check_number("margin", limit, above=0)
    families = []
    for problem in problems:
        limit, arms = margins.get(problem), dict[str, ArmScores]()
        for name, runs in frame[frame["problem"] == problem].groupby("arm", sort=False):
            arm, sound = str(name), runs[~runs["failed"]]
            scores = dict(zip(sound["seed"].tolist(), sound["score"].tolist(), strict=True))
            lost = tuple(runs["seed"][runs["failed"]].tolist())
            arms[arm] = ArmScores(arm, scores, lost, (void or {}).get((problem, arm), ""))
        label = next(iter(arms)) if reference is None else reference
        check_choice("reference", label, arms)
        if len(arms) < 2:
            raise Refused(
                f"{problem or 'The table'} has only the arm {label!r}; give two arms or more."
            )
        against = [arm_scores for arm_scores in arms.values() if arm_scores.arm != label]
        pairs = [(arm_scores, arms[label]) for arm_scores in against]
        pairs += [
            (arm_scores, earlier) for earlier, arm_scores in combinations(against, 2) if all_pairs
        ]
        differences = tuple(_compare_pair(*pair, limit, len(pairs)) for pair in pairs)
        families.append(Family(problem, label, limit, tuple(arms.values()), differences))
    return Judgement(metric, tuple(families))


def _rows(
    table: Any, metric: str, failed: Set[tuple[Any, ...]], failure_below: float | None
) -> pd.DataFrame:
    """Return a table with the columns problem, arm, seed, score and failed; see `judge_scores`."""
    frame = _as_frame(table)
    other_names = {"score": metric, "problem": "task"}
    frame = frame.rename(
        columns={b: a for a, b in other_names.items() if a not in frame and b in frame}
    )
    if frame.empty or not {"arm", "seed", "score"} <= set(frame):
        raise Refused(
            f"The table has {len(frame)} rows and the columns {', '.join(map(str, frame)) or 'none'}; it "
            f"needs a row for each run, with arm, seed and {metric}, and problem if there are several."
        )
    blank = pd.Series("", frame.index)
    rows_read = pd.DataFrame(
        {
            "problem": frame.get("problem", blank).fillna("").astype(str),
            "arm": frame["arm"].astype(str),
            "seed": pd.to_numeric(frame["seed"], errors="coerce"),
            "score": pd.to_numeric(frame["score"], errors="coerce").astype(float),
            "failed": frame.get("failed", blank)
            .astype(str)
            .str.lower()
            .isin(["true", "1", "1.0", "yes"]),
        }
    ).reset_index(drop=True)
    keys = list(zip(rows_read["problem"], rows_read["arm"], rows_read["seed"], strict=True))
    if unknown := failed - {*keys, *(key[1:] for key in keys)}:
        raise Refused(
            f"failed names the run {min(unknown)}, which the table lacks; give (arm, seed)."
        )
    rows_read["failed"] |= np.array([key in failed or key[1:] in failed for key in keys])
    if failure_below is not None:
        rows_read["failed"] |= rows_read["score"] < failure_below
    unknown_score = ~np.isfinite(rows_read["score"]) & ~rows_read["failed"]
    wrong = {
        "has no whole number as its seed": rows_read["seed"] % 1 != 0,
        "has no finite score; give the one at its end, or say that it failed (failed): leaving failed runs "
        "out would flatter the arm": unknown_score,
        "is there a second time; give each run once": rows_read.duplicated(
            ["problem", "arm", "seed"]
        ),
    }
    for words, rows in wrong.items():
        if rows.any():
            run = rows_read[rows].iloc[0]
            raise Refused(f"Row {run.name}, arm {run['arm']!r}, seed {run['seed']:.0f}, {words}.")
    return rows_read.astype({"seed": int})


def _as_frame(table: Any) -> pd.DataFrame:
    """Make a data frame of a CSV file, of another library's table, or of rows."""
    if isinstance(table, str | os.PathLike):
        try:
            return pd.read_csv(
                table, dtype=str, keep_default_na=False
            )  # "None" may be the name of an arm
        except (OSError, ValueError) as error:
            raise Refused(
                f"The table {table} cannot be read ({error}); give a CSV file."
            ) from error
    if hasattr(table, "to_pandas"):
        return table.to_pandas()
    if isinstance(table, pd.DataFrame):
        return table
    return pd.DataFrame(list(table)).rename(
        columns=dict(enumerate(("arm", "seed", "score", "problem")))
    )


def _compare_pair(
    arm: ArmScores, reference: ArmScores, margin: float | None, comparisons: int
) -> PairedDifference:
    both = arm.seeds & reference.seeds
    if not both:
        raise Refused(
            f"The arms {arm.arm!r} and {reference.arm!r} have no seed in common to be paired by."
        )
    differences = numbers.paired_differences(arm.scores, reference.scores)
    values = np.array(list(differences.values()), dtype=np.float64)
    parts = 2 if arm.failed or reference.failed else 1  # each of which can err
    level = numbers.level_of(comparisons * parts)
    adjusted = numbers.mean_interval(values, level)
    verdict = _verdict(adjusted, len(values), margin)
    counts = [(len(scores.failed), len(scores.seeds)) for scores in (arm, reference)]
    p_failures, more_failures = numbers.failures_differ(*counts[0], *counts[1]), ""
    if p_failures <= 1 - level + 1e-12 and len(both) >= numbers.LEAST_PAIRS:
        is_worse = arm.failures.value > reference.failures.value
        by_failures: VerdictWord = "worse" if is_worse else "better"
        more_failures = arm.arm if is_worse else reference.arm
        verdict = "undecided" if {by_failures, verdict} == {"better", "worse"} else by_failures
    return PairedDifference(
        arm=arm.arm,
        reference=reference.arm,
        differences=differences,
        mean=numbers.mean_interval(values),
        adjusted=adjusted,
        level=level,
        p_failures=p_failures,
        more_failures=more_failures,
        verdict="void" if arm.void or reference.void else verdict,
        unpaired=tuple(sorted(arm.seeds ^ reference.seeds)),
        margin=margin,
    )


def _verdict(interval: Interval, pairs: int, margin: float | None) -> VerdictWord:
    """Return the verdict of runs that did not fail.

    An interval within the margin is equivalent also if it excludes 0: then there is a difference, and it is
    smaller than what counts as one.
    """
    if pairs < numbers.LEAST_PAIRS:
        return "descriptive"
    if interval.low == interval.high:
        return "undecided"
    if margin is not None and -margin <= interval.low and interval.high <= margin:
        return "equivalent"
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else "undecided"
