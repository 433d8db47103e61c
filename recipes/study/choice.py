"""Judges arms whose learning rates are chosen on the runs that are judged, as in questions 7, 12 and 13.

There every rate has a run on every unit (a seed, a base model or a task), and an arm's score in a unit is the one at
the rate that is best in the other units. Student's t is too small a critical value for such scores. Where all
units choose one rate, the spread of the scores holds nothing of the choice. Where they do not, each score
depends on the other units.

So the critical value is simulated. Units are drawn from a normal distribution with the means and the covariance
of the measured scores, rates are chosen again, and |t| is compared with its quantile at the level of the family.
How far apart an arm's rates truly lie is not known: their measured gaps are simulated, parts of these gaps, and
equal rates. The largest quantile counts. `level.py` measures how often such intervals miss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from judging import half_width, judged_differences, verdict_cell
from scipy import stats

SHARES = (1, 0.75, 0.5, 0.25, 0)
"""Parts of the measured gaps between the rates of an arm that are simulated."""
DRAWS = 50_000


def at_best_rates_of_others(scores: np.ndarray) -> np.ndarray:
    """Return an arm's score in each unit, at the rate that is best in the other units.

    Args:
        scores: [kinds, rates, ..., units]; the first kind of score decides which rate is best, the last counts.
    """
    others = scores[0].sum(-1, keepdims=True) - scores[0]
    return np.take_along_axis(scores[-1], others.argmax(0)[None], 0)[0]


def differences(arms: Iterable[np.ndarray]) -> np.ndarray:
    """Return each later arm's score minus that of the first, [arms - 1, ..., units]."""
    reference, *others = map(at_best_rates_of_others, arms)
    return np.array(others) - reference


def redrawn(scores: np.ndarray, normals: np.ndarray, share: float = 1) -> np.ndarray:
    """Draw units anew, with scores relative to the true score of the arm at its best rate.

    Args:
        scores: [kinds, rates, units].
        normals: standard normal numbers, [units, draws, units drawn].
        share: the part of the measured gaps between rates that is true.
    """
    means = scores.mean(-1, keepdims=True)
    gaps = share * (means - means[:, [means[0].argmax()]])
    noise = np.tensordot(scores - means, normals, 1) / np.sqrt(len(normals) - 1)
    return gaps[..., None] + noise


def half_widths(arms: Collection[np.ndarray], times: int = 1, draws: int = DRAWS) -> np.ndarray:
    """Return half the width of each later arm's interval if there were so many times the units, equally spread.

    It is the |t| that chance exceeds in a comparison's part of 5 %, times the standard error.
    """
    gaps = differences(arms)
    units = times * gaps.shape[1]
    normals = np.random.default_rng(0).standard_normal((gaps.shape[1], draws, units))
    critical = []
    for share in SHARES:
        drawn = differences(redrawn(scores, normals, share) for scores in arms)
        t = np.abs(stats.ttest_1samp(drawn, 0, axis=-1).statistic)
        critical.append(np.quantile(t, 1 - 0.05 / len(gaps), axis=-1))
    return np.max(critical, axis=0) * gaps.std(1, ddof=1) / np.sqrt(units)


def judged_at_best_rates(arms: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, str]]:
    """Judge arms against the first as one family, by simulated critical values.

    `judge_scores` makes intervals by Student's t. So each difference is spread around its mean until that
    interval is the simulated one; means stay, and the rule of verdicts is the study's.

    Returns:
        The differences by arm, and a cell of a table for each arm.
    """
    gaps = pd.DataFrame(differences(arms.values()), [*arms][1:]).T
    student = half_width(gaps.std(), *gaps.shape)
    spread = gaps.mean() + (gaps - gaps.mean()) * half_widths(arms.values()) / student
    against = judged_differences(dict(spread))
    mean = at_best_rates_of_others(next(iter(arms.values()))).mean()
    return against, {arm: verdict_cell(against, arm, f"reference, {mean:.3f}") for arm in arms}
