"""Judges a table of scores: failures and paired differences by seed, with exact tests and verdicts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from tokenrl.errors import Refused, refusing
from tokenrl.lab.compare.intervals import (
    LEAST_PAIRS,
    Estimate,
    differences_by_seed,
    failures_differ,
    level_of,
    mean_interval,
)
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
    failure_below: float | None = None,
    all_pairs: bool = False,
    void: Mapping[tuple[str, str], str] | None = None,
) -> Judgement:
    """Judge scores of several arms over seeds; the scores may come from any tool.

    The unit is the run: its seed, not its prompts or episodes. A verdict has two parts. Failures are counted,
    with exact limits of their rate, and compared by Fisher's exact test. Runs that did not fail are compared
    by the seeds that both arms have; the Student-t interval of their mean difference decides, at the level of
    the family. The level is shared by the comparisons on a problem, and by the two parts where a run failed
    (Bonferroni).
    An arm that fails more often and is better otherwise is undecided. An interval of width zero decides
    nothing.

    Arms that are the same are called different in at most about 5 % of families. More often wrong are scores
    with long tails, and rare failures that are not declared: recipes/pages/explain/comparing.md has the rates.

    Args:
        table: rows with the columns `arm`, `seed` and `score`; `problem` (or `task`) if there are several,
            and `failed`, true for runs that failed, whose scores are not used and may be missing (nan). They
            are mappings, tuples (arm, seed, score) or (arm, seed, score, problem), a data frame of pandas, or
            the path of a CSV file.
        metric: name of the score. It is also the name of its column if there is no column `score`.
        reference: the arm that the others are compared with; None for the first.
        margin: smaller differences count as none. A number, or numbers by problem; None for no equivalence.
        failure_below: runs with a lower score failed too.
        all_pairs: compare all arms with each other, and not only with the reference.
        void: by problem and arm, the reason why its scores are not valid; they are shown without a verdict.
            Only what is known before training is such a reason, or that an arm cannot be run. Excluding an
            arm because of how its training went hides that it is worse.

    Returns:
        Families of comparisons, one per problem.

    Raises:
        Refused: a row cannot be read, or a score is not finite or given twice. Also if there is one arm only,
            two arms have no seed in common, or the reference or a problem of `margin` does not exist.

    Example:
        >>> from tokenrl.lab import judge_scores
        >>> rows = [("ppo", s, x) for s, x in enumerate(ppo)] + [("rloo", s, x) for s, x in enumerate(rloo)]
        >>> judge_scores(rows, margin=0.02, failure_below=0.5).families[0].differences[0].verdict
    """
    frame = _rows(table, metric)
    if failure_below is not None:
        frame["failed"] |= frame["score"] < failure_below
    problems = frame["problem"].unique()
    margins = margin if isinstance(margin, Mapping) else dict.fromkeys(problems, margin)
    for problem, size in margins.items():
        check_choice("the problem in margin", problem, problems)
        if size is not None:
            check_number("margin", size, above=0)
    families = []
    for problem in problems:
        arms = {}
        for arm, runs in frame[frame["problem"] == problem].groupby("arm", sort=False):
            scores = runs.set_index("seed")["score"]
            failed = runs.set_index("seed")["failed"]
            arms[str(arm)] = ArmScores(
                arm=str(arm),
                scores=scores[~failed].to_dict(),
                failed=tuple(scores[failed].index.tolist()),
                void=(void or {}).get((problem, arm), ""),
            )
        label = next(iter(arms)) if reference is None else reference
        pairs = _pairs(arms, label, all_pairs)
        size = margins.get(problem)
        differences = tuple(_compare_pair(*pair, size, len(pairs)) for pair in pairs)
        families.append(Family(problem, label, size, tuple(arms.values()), differences))
    return Judgement(metric, tuple(families))


def _pairs(
    arms: Mapping[str, ArmScores], reference: str, all_pairs: bool
) -> list[tuple[ArmScores, ArmScores]]:
    """Return each other arm with the reference, then all other pairs if they are asked for."""
    check_choice("reference", reference, arms)
    rivals = [scores for arm, scores in arms.items() if arm != reference]
    if not rivals:
        raise Refused(f"There is only the arm {reference!r}; give two arms or more.")
    pairs = [(arm, arms[reference]) for arm in rivals]
    if all_pairs:
        pairs += [(later, earlier) for earlier, later in combinations(rivals, 2)]
    return pairs


def _rows(table: Any, metric: str) -> pd.DataFrame:
    """Return a table with the columns problem, arm, seed, score and failed; see `judge_scores`."""
    frame = _as_frame(table)
    for column, synonym in (("score", metric), ("problem", "task")):
        if column not in frame:
            frame = frame.rename(columns={synonym: column})
    if frame.empty or not {"arm", "seed", "score"} <= set(frame):
        raise Refused(
            f"The table has {len(frame)} rows and the columns {', '.join(map(str, frame)) or 'none'}; it "
            f"needs a row for each run, with arm, seed and {metric}, and problem if there are several."
        )
    runs = frame.reindex(columns=["problem", "arm", "seed", "score", "failed"])
    runs = runs.reset_index(drop=True)
    runs["problem"] = runs["problem"].astype(object).fillna("").astype(str)
    runs["arm"] = runs["arm"].astype(str)
    for column in ("seed", "score"):
        runs[column] = pd.to_numeric(runs[column], errors="coerce").astype(float)
    runs["failed"] = runs["failed"].astype(str).str.lower().isin(["true", "1", "1.0", "yes"])
    mistakes = {
        "has no whole number as its seed": runs["seed"] % 1 != 0,
        "has no finite score; give the one at its end, or the column failed: leaving failed runs out would "
        "flatter the arm": ~np.isfinite(runs["score"]) & ~runs["failed"],
        "is there a second time; give each run once": runs.duplicated(["problem", "arm", "seed"]),
    }
    for mistake, rows in mistakes.items():
        if rows.any():
            run = runs[rows].iloc[0]
            raise Refused(f"Row {run.name}, arm {run['arm']!r}, seed {run['seed']:.0f}, {mistake}.")
    return runs.astype({"seed": int})


def _as_frame(table: Any) -> pd.DataFrame:
    """Make a data frame of a CSV file, or of rows."""
    if isinstance(table, str | os.PathLike):
        with refusing(f"The table {table} cannot be read", "Give a CSV file."):
            # "None" may be the name of an arm
            return pd.read_csv(table, dtype=str, keep_default_na=False)
    if isinstance(table, pd.DataFrame):
        return table
    columns = dict(enumerate(("arm", "seed", "score", "problem")))
    return pd.DataFrame(list(table)).rename(columns=columns)


def _compare_pair(
    arm: ArmScores, reference: ArmScores, margin: float | None, comparisons: int
) -> PairedDifference:
    """Compare an arm with the reference in two parts, failures and scores."""
    pairs = arm.seeds & reference.seeds
    if not pairs:
        raise Refused(
            f"The arms {arm.arm!r} and {reference.arm!r} have no seed in common to be paired by."
        )
    differences = differences_by_seed(arm.scores, reference.scores)
    values = np.array(list(differences.values()))
    parts = 2 if arm.failed or reference.failed else 1  # each of which can err
    level = level_of(comparisons * parts)
    adjusted = mean_interval(values, level)
    verdict = _verdict(adjusted, len(values), margin)
    p_failures = failures_differ(
        len(arm.failed), len(arm.seeds), len(reference.failed), len(reference.seeds)
    )
    more_failures = ""
    if p_failures <= 1 - level + 1e-12 and len(pairs) >= LEAST_PAIRS:
        more_failures = max(arm, reference, key=lambda scores: scores.failures.value).arm
        by_failures: VerdictWord = "worse" if more_failures == arm.arm else "better"
        contradicts = {by_failures, verdict} == {"better", "worse"}
        verdict = "undecided" if contradicts else by_failures
    return PairedDifference(
        arm=arm.arm,
        reference=reference.arm,
        differences=differences,
        mean=mean_interval(values),
        adjusted=adjusted,
        level=level,
        p_failures=p_failures,
        more_failures=more_failures,
        verdict="void" if arm.void or reference.void else verdict,
        unpaired=tuple(sorted(arm.seeds ^ reference.seeds)),
        margin=margin,
    )


def _verdict(interval: Estimate, pairs: int, margin: float | None) -> VerdictWord:
    """Return the verdict of runs that did not fail.

    An interval within the margin is equivalent also if it excludes 0: the difference exists, but it is too
    small to count.
    """
    if pairs < LEAST_PAIRS:
        return "descriptive"
    if interval.low == interval.high:
        return "undecided"
    if margin is not None and -margin <= interval.low and interval.high <= margin:
        return "equivalent"
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    return "undecided"
