"""Judges a table of scores: paired differences by seed, with intervals, tests and verdicts, by family."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenrl.errors import Refused, suggest
from tokenrl.lab.compare.statistics.found import ArmScores, Difference, Family, Judgement, Verdict
from tokenrl.lab.compare.statistics.paired import (
    LEAST_PAIRS,
    Array,
    holm,
    improvement,
    interval,
    least_p,
    sign_flip,
    verdict,
)
from tokenrl.lab.compare.statistics.power import level_of, pairs_needed
from tokenrl.settings import check_number

Scores = dict[str, dict[str, dict[int, float]]]
"""Score by problem, arm and seed."""


def judge_scores(
    table: str | os.PathLike[str] | Iterable[Any],
    *,
    metric: str = "score",
    reference: str | None = None,
    margin: float | Mapping[str, float | None] | None = None,
    void: Mapping[tuple[str, str], str] | None = None,
    itself: Mapping[str, Mapping[int, float]] | None = None,
) -> Judgement:
    """Judge scores of several arms over seeds; the scores may come from any tool.

    The unit is the run: its seed, not its prompts or episodes. Arms are compared with the reference by the
    seeds that both have. The intervals that decide are Student-t intervals of the mean difference at the
    level of the family (Bonferroni over the comparisons on one problem).

    In simulations with 6, 10 and 20 seeds, arms that are the same are found different in at most 5 % of the
    families, also with skewed scores. Arms with the same mean are found different in 10 to 28 % where the
    reference hardly varies and rare runs of the others end far from the rest: look at the single runs too.

    Args:
        table: rows with the columns `arm`, `seed` and `score`, and if there are several `problem` (or
            `task`): mappings, tuples in this order, or the path of a CSV file with these columns.
        metric: name of the score, also the name of its column if there is no column `score`.
        reference: the arm that the others are compared with; None for the first.
        margin: differences below it count as none: a number, or one by problem; None for no equivalence.
        void: by problem and arm, why its scores are not valid; they are shown, without a verdict.
        itself: by problem, scores of the reference on other seeds, to show how far it lies from itself.

    Returns:
        Families of comparisons, one per problem.

    Raises:
        Refused: a row cannot be read, a score is not finite or given twice, there is one arm only, the
            reference or a problem of `margin` does not exist, or two arms have no seed in common.

    Example:
        >>> from tokenrl.lab import judge_scores
        >>> rows = [("ppo", s, x) for s, x in enumerate(ppo)] + [("rloo", s, x) for s, x in enumerate(rloo)]
        >>> judge_scores(rows, margin=0.02).families[0].differences[0].verdict
    """
    scores = read_scores(table, metric)
    for problem in margin if isinstance(margin, Mapping) else ():
        if problem not in scores:
            raise Refused(
                f"margin names the problem {problem!r}, which has no scores.{suggest(problem, scores)}"
            )
    families = []
    for problem, arms in scores.items():
        limit = margin.get(problem) if isinstance(margin, Mapping) else margin
        if limit is not None:
            check_number("margin", limit, above=0)
        first = next(iter(arms)) if reference is None else reference
        if first not in arms:
            raise Refused(f"reference was given as {first!r}, which is no arm.{suggest(first, arms)}")
        if len(arms) < 2:
            raise Refused(f"{problem or 'The table'} has only the arm {first!r}; give two arms or more.")
        invalid = {arm: (void or {}).get((problem, arm), "") for arm in arms}
        other = (itself or {}).get(problem)
        families.append(_family(problem, arms, first, limit, invalid, other))
    return Judgement(metric, tuple(families))


def read_scores(table: str | os.PathLike[str] | Iterable[Any], metric: str = "score") -> Scores:
    """Read a table of scores; see `judge_scores`.

    Raises:
        Refused: the file or a row cannot be read, or a score is not finite or given twice.
    """
    if isinstance(table, str | os.PathLike):
        try:
            with open(Path(table), encoding="utf-8-sig", newline="") as file:
                rows: Iterable[Any] = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise Refused(f"The table {table} cannot be read ({error}); give a CSV file.") from error
    else:
        rows = table.to_dict("records") if hasattr(table, "to_dict") else table
    found: Scores = {}
    for number, row in enumerate(rows):
        problem, arm, seed, score = _row(row, number, metric)
        seeds = found.setdefault(problem, {}).setdefault(arm, {})
        if seed in seeds:
            raise Refused(f"Row {number} gives arm {arm!r}, seed {seed} a second time; give each run once.")
        seeds[seed] = score
    if not found:
        raise Refused("The table has no rows; give one for each run, with arm, seed and score.")
    return found


def _row(row: Any, number: int, metric: str) -> tuple[str, str, int, float]:
    """Return problem, arm, seed and score of a row."""
    if isinstance(row, Mapping):
        named = dict(row)
        score = named.get("score", named.get(metric))
        problem = named.get("problem", named.get("task", ""))
        values: tuple[Any, ...] = (problem, named.get("arm"), named.get("seed"), score)
    elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) in (3, 4):
        values = (*row[3:], *row[:3]) if len(row) == 4 else ("", *row)
    else:
        values = (None, None, None, None)
    try:
        found = (str(values[0] or ""), str(values[1]), int(values[2]), float(values[3]))
        whole = isinstance(values[2], str) or values[2] == found[2]
        if values[1] is None or not whole:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise Refused(
            f"Row {number} of the scores is {str(row)[:200]}; it needs the columns arm, seed (a whole "
            f"number) and score (or {metric}), and problem if there are several, or to be a tuple of these."
        ) from None
    if not math.isfinite(found[3]):
        raise Refused(
            f"Row {number} has the score {found[3]}: arm {found[1]!r}, seed {found[2]}. Give the score that "
            "the run had at its end; leaving failed runs out would flatter the arm."
        )
    return found


def _family(
    problem: str,
    arms: Mapping[str, Mapping[int, float]],
    reference: str,
    margin: float | None,
    void: Mapping[str, str],
    itself: Mapping[int, float] | None,
) -> Family:
    others = [arm for arm in arms if arm != reference]
    level = level_of(len(others))
    pairs = {arm: _paired(arm, arms[arm], reference, arms[reference]) for arm in others}
    p = {arm: sign_flip(_array(differences)) for arm, differences in pairs.items()}
    adjusted = dict(zip(p, holm(list(p.values())), strict=True))
    differences = []
    for arm in others:
        invalid = bool(void[arm] or void[reference])
        found = _difference(arm, reference, pairs[arm], level, margin, p[arm], adjusted[arm], len(others))
        alone = tuple(sorted(arms[arm].keys() ^ arms[reference].keys()))
        found = replace(found, unpaired=alone)
        differences.append(replace(found, verdict="void", seeds_needed=None) if invalid else found)
    own = None
    if itself:
        matched = zip(arms[reference].items(), itself.values(), strict=False)
        apart = {seed: other - score for (seed, score), other in matched}
        again = sign_flip(_array(apart))
        own = _difference(f"{reference} itself", reference, apart, level_of(1), margin, again, again, 1)
    each = tuple(
        ArmScores(arm, dict(scores), interval(_array(scores)), _sd(_array(scores)), void[arm])
        for arm, scores in arms.items()
    )
    return Family(problem, reference, margin, each, tuple(differences), own)


def _paired(
    arm: str, scores: Mapping[int, float], reference: str, others: Mapping[int, float]
) -> dict[int, float]:
    found = {seed: scores[seed] - others[seed] for seed in sorted(scores.keys() & others.keys())}
    if not found:
        raise Refused(f"The arms {arm!r} and {reference!r} have no seed in common, so they cannot be paired.")
    return found


def _difference(
    arm: str,
    reference: str,
    apart: dict[int, float],
    level: float,
    margin: float | None,
    p: float,
    p_holm: float,
    comparisons: int,
) -> Difference:
    values = _array(apart)
    adjusted, sd = interval(values, level), _sd(values)
    few = len(values) < LEAST_PAIRS
    found: Verdict = "descriptive" if few else verdict(adjusted, margin)
    needed = None
    if found in ("undecided", "descriptive") and len(values) > 1:
        needed = pairs_needed(float(values.mean()), sd, margin, comparisons, LEAST_PAIRS)
        if needed is not None and found == "undecided":
            needed = max(needed, len(values) + 1)
    return Difference(
        arm=arm,
        reference=reference,
        differences=apart,
        mean=interval(values),
        adjusted=adjusted,
        level=level,
        sd=sd,
        p_sign_flip=p,
        p_least=least_p(len(values)),
        p_holm=p_holm,
        improvement=improvement(values),
        verdict=found,
        seeds_needed=needed,
    )


def _array(scores: Mapping[int, float]) -> Array:
    return np.array(list(scores.values()), dtype=np.float64)


def _sd(values: Array) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
