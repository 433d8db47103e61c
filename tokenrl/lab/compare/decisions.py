"""Judges a table of scores: failures and paired differences by seed, with exact tests and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from tokenrl.errors import Refused
from tokenrl.lab.compare.intervals import (
    ALPHA,
    LEAST_PAIRS,
    differences_by_seed,
    failures_differ,
    mean_interval,
)
from tokenrl.lab.compare.judgement import (
    ArmScores,
    Family,
    Judgement,
    PairedDifference,
    VerdictWord,
    verdict_of_scores,
)
from tokenrl.lab.compare.looks import check_looks, levels_of_looks
from tokenrl.settings import check_choice, check_number

TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": False}
"""What a table may say of a run in its column failed, in small letters."""


def judge_scores(
    table: Iterable[Any],
    *,
    metric: str = "score",
    reference: str | None = None,
    margin: float | None = None,
    failure_below: float | None = None,
    all_pairs: bool = False,
    looks: Sequence[int] = (),
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
        table: rows with the columns `arm`, `seed` and `score`; `problem` if there are several,
            and `failed`, True for runs that failed, whose scores are not used and may be missing (nan), and
            else False or missing. They are mappings, tuples (arm, seed, score) or (arm, seed, score, problem), or
            a data frame of pandas.
        metric: name of the score. It is also the name of its column if there is no column `score`.
        reference: the arm that the others are compared with; None for the first.
        margin: smaller differences count as none; None for no equivalence.
        failure_below: runs with a lower score failed too.
        all_pairs: compare all arms with each other, and not only with the reference.
        looks: numbers of seeds, in the order of the seeds, after which the arms were looked at, fixed before the
            first run; the last is that of all seeds. The first look with a verdict decides, and all share the
            error (see `looks`). None for a single look at all.

    Returns:
        Families of comparisons, one per problem.

    Raises:
        Refused: a row cannot be read, or a score is not finite or given twice. Also if there is one arm only,
            two arms have no seed in common, the reference does not exist, or looks do not rise.

    Example:
        >>> from tokenrl.lab import judge_scores
        >>> rows = [("ppo", s, x) for s, x in enumerate(ppo)] + [("rloo", s, x) for s, x in enumerate(rloo)]
        >>> judge_scores(rows, margin=0.02, failure_below=0.5).families[0].differences[0].verdict
    """
    if margin is not None:
        check_number("margin", margin, above=0)
    looks = check_looks("looks", looks) if len(looks) else ()
    frame = _rows(table, metric)
    if failure_below is not None:
        frame["failed"] |= frame["score"] < failure_below
    families = [
        _family(str(problem), runs, reference, margin, all_pairs, looks)
        for problem, runs in frame.groupby("problem", sort=False)
    ]
    return Judgement(metric, tuple(families))


def _family(
    problem: str,
    runs: pd.DataFrame,
    reference: str | None,
    margin: float | None,
    all_pairs: bool,
    looks: tuple[int, ...],
) -> Family:
    """Judge the runs on one problem: each other arm with the reference, then all other pairs if asked for."""
    arms = {}
    for arm, of_arm in runs.set_index("seed").groupby("arm", sort=False):
        scores = of_arm["score"][~of_arm["failed"]].to_dict()
        failed = of_arm.index[of_arm["failed"]].tolist()
        arms[str(arm)] = ArmScores(str(arm), scores, tuple(failed))
    label = next(iter(arms)) if reference is None else reference
    check_choice("reference", label, arms)
    rivals = [arm for arm in arms if arm != label]
    if not rivals:
        raise Refused(f"There is only the arm {label!r}; give two arms or more.")
    pairs = [(arm, label) for arm in rivals]
    if all_pairs:
        pairs += [(later, earlier) for earlier, later in combinations(rivals, 2)]
    alpha = ALPHA / len(pairs)
    seeds = sorted(runs["seed"].unique())
    differences = [
        _compare_at_looks(arms[a], arms[b], margin, alpha, looks, seeds) for a, b in pairs
    ]
    return Family(problem, label, margin, tuple(arms.values()), tuple(differences))


def _rows(table: Any, metric: str) -> pd.DataFrame:
    """Return a table with the columns problem, arm, seed, score and failed; see `judge_scores`."""
    frame = pd.DataFrame(table)
    frame = frame.rename(columns=dict(enumerate(("arm", "seed", "score", "problem"))))
    if "score" not in frame:
        frame = frame.rename(columns={metric: "score"})
    if frame.empty or not {"arm", "seed", "score"} <= set(frame):
        raise Refused(
            f"The table has {len(frame)} rows and the columns {', '.join(map(str, frame)) or 'none'}; it "
            f"needs a row for each run, with arm, seed and {metric}, and problem if there are several."
        )
    runs = frame.reindex(columns=["problem", "arm", "seed", "score", "failed"])
    runs = runs.reset_index(drop=True).astype(object)
    runs = runs.where(runs.notna(), "").map(str)
    for column in ("seed", "score"):
        runs[column] = pd.to_numeric(runs[column], errors="coerce").astype(float)
    failed = runs["failed"].str.lower().map(TRUTHS)
    mistakes = {
        "has no arm": runs["arm"] == "",
        "has no whole number as its seed": runs["seed"] % 1 != 0,
        "has neither True nor False in its column failed": failed.isna(),
        "has no finite score; give the one at its end, or the column failed: leaving failed runs out would "
        "flatter the arm": ~np.isfinite(runs["score"]) & ~failed.eq(True),
        "is there a second time; give each run once": runs.duplicated(["problem", "arm", "seed"]),
    }
    for mistake, rows in mistakes.items():
        if rows.any():
            run = runs[rows].iloc[0]
            raise Refused(f"Row {run.name}, arm {run['arm']!r}, seed {run['seed']:.0f}, {mistake}.")
    return runs.assign(failed=failed.astype(bool)).astype({"seed": int})


def _compare_at_looks(
    arm: ArmScores,
    reference: ArmScores,
    margin: float | None,
    alpha: float,
    looks: tuple[int, ...],
    seeds: Sequence[int],
) -> PairedDifference:
    """Compare an arm with the reference at the first look that decides, or at the last that both have reached."""
    if len(looks) < 2:
        return _compare_pair(arm, reference, margin, alpha)
    testing = tuple(look for look in looks if look >= LEAST_PAIRS) or looks
    difference = None
    for look in looks:
        first = {*seeds[:look]}
        is_reached = len(first) == look and first <= arm.seeds & reference.seeds
        if difference is not None and (difference.is_decided or not is_reached):
            break
        number = testing.index(max(look, testing[0]))
        parts = arm.on(first), reference.on(first)
        difference = replace(_compare_pair(*parts, margin, alpha, testing, number), look=look)
    assert difference is not None  # as there are looks
    return difference


def _compare_pair(
    arm: ArmScores,
    reference: ArmScores,
    margin: float | None,
    alpha: float,
    looks: tuple[int, ...] = (1,),
    number: int = 0,
) -> PairedDifference:
    """Compare an arm with the reference in two parts, failures and scores, which share the error alpha.

    Args:
        arm: the scores of the arm.
        reference: those of the reference.
        margin: smaller differences count as none.
        alpha: the error of the comparison, over all its looks.
        looks: the numbers of pairs at its looks; a single one, whatever its number, has all of the error.
        number: which of them this is.
    """
    pairs = arm.seeds & reference.seeds
    if not pairs:
        raise Refused(
            f"The arms {arm.arm!r} and {reference.arm!r} have no seed in common to be paired by."
        )
    differences = differences_by_seed(arm.scores, reference.scores)
    values = np.array(list(differences.values()))
    parts = 2 if arm.failed or reference.failed else 1  # each of which can err
    error = levels_of_looks(looks, alpha / parts)[number]
    level = 1 - error
    adjusted = mean_interval(values, level)
    verdict = verdict_of_scores(adjusted, len(values), margin)
    p_failures = failures_differ(
        len(arm.failed), len(arm.seeds), len(reference.failed), len(reference.seeds)
    )
    more_failures = ""
    if p_failures <= error and len(pairs) >= LEAST_PAIRS:
        more_failures = max(arm, reference, key=lambda scores: scores.failures.value).arm
        by_failures: VerdictWord = "worse" if more_failures == arm.arm else "better"
        contradicts = {by_failures, verdict} == {"better", "worse"}
        verdict = "undecided" if contradicts else by_failures
    return PairedDifference(
        arm=arm.arm,
        reference=reference.arm,
        differences=differences,
        adjusted=adjusted,
        level=level,
        p_failures=p_failures,
        more_failures=more_failures,
        verdict=verdict,
        unpaired=tuple(sorted(arm.seeds ^ reference.seeds)),
        margin=margin,
    )
