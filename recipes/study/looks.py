"""Simulate comparisons that are looked at after 6, 12 and 18 seeds, beside comparisons of 18 seeds at once.

    python recipes/study/looks.py                2,000 comparisons a row

Two arms run on the same seeds, and a part of their scores is the seed's. What is promised: arms that are the same
are called better or worse in 5 %, and arms whose difference is the margin are called equivalent in 5 %. The scores
have normal errors, errors with long tails (Student's t with three degrees of freedom), unequal variances, ties (a
share of ten right answers), or an arm that fails in a tenth of its runs.

Look for: shares above .05 in the columns of errors, and how many seeds a comparison took.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import tyro
from scipy import stats

from tokenrl.lab import judge_scores

LOOKS = (6, 12, 18)
MARGIN = 1.0
"""In standard deviations of a difference of two runs with normal errors."""
Draw = Callable[[np.random.Generator, float], tuple[np.ndarray, np.ndarray]]


def paired(errors: Callable[[np.random.Generator], np.ndarray]) -> Draw:
    """Return what draws the scores of reference and arm, whose errors [2, seeds] are added to the seed's part."""

    def draw(random: np.random.Generator, difference: float) -> tuple[np.ndarray, np.ndarray]:
        of_seed = random.normal(size=LOOKS[-1])
        reference, arm = of_seed + errors(random) / 2**0.5
        return reference, arm + difference

    return draw


SPREAD = (2 * 0.5 * 0.5 / 10) ** 0.5
"""Of the difference of two shares of ten right answers."""


def ties(random: np.random.Generator, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw shares of ten right answers, in units of the spread of their difference."""
    rates = np.array([0.5, min(1.0, 0.5 + difference * SPREAD)])
    reference, arm = random.binomial(10, rates[:, None], (2, LOOKS[-1])) / 10 / SPREAD
    return reference, arm


def failing(random: np.random.Generator, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw normal scores; both arms fail in a tenth of their runs."""
    scores = np.array(CASES["normal"](random, difference))
    scores[random.random(scores.shape) < 0.1] = np.nan
    reference, arm = scores
    return reference, arm


SIZE = (2, LOOKS[-1])
CASES = {
    "normal": paired(lambda random: random.normal(size=SIZE)),
    "long tails": paired(lambda random: random.standard_t(3, size=SIZE) / 3**0.5),
    "unequal variances": paired(lambda random: random.normal(size=SIZE) * np.array([[0.2], [1.4]])),
    "ties": ties,
    "both fail in a tenth": failing,
}


def verdict(reference: np.ndarray, arm: np.ndarray, looks: tuple[int, ...]) -> tuple[str, int]:
    """Return the verdict of the arm, and the seeds that it took."""
    rows = [
        {"arm": name, "seed": seed, "score": score, "failed": bool(np.isnan(score))}
        for name, scores in (("reference", reference), ("arm", arm))
        for seed, score in enumerate(scores)
    ]
    (family,) = judge_scores(rows, margin=MARGIN, looks=looks).families
    return family.differences[0].verdict, family.differences[0].look or LOOKS[-1]


def interval(count: int, total: int) -> str:
    """Return a share with its exact interval at 95 %."""
    low, high = stats.binomtest(count, total).proportion_ci(0.95)
    return f"{count / total:.3f} [{low:.3f}, {high:.3f}]"


def row(verdicts: list[tuple[str, int]]) -> dict[str, Any]:
    """Return the shares of verdicts, and the mean number of seeds."""
    words = [word for word, _ in verdicts]
    different = sum(word in ("better", "worse") for word in words)
    return {
        "different": interval(different, len(words)),
        "equivalent": interval(words.count("equivalent"), len(words)),
        "seeds": f"{np.mean([seeds for _, seeds in verdicts]):.1f}",
    }


def accepted(changes: int, loops: int, seed: int) -> pd.DataFrame:
    """Return how many changes that do nothing are accepted as better, by the rule of a program that tries them.

    Args:
        changes: Changes of settings that are tried in a loop.
        loops: Simulated loops.
        seed: Seed of the scores.
    """
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(loops):
        pairs = [CASES["normal"](random, 0.0) for _ in range(changes)]
        rows.append(
            {
                "one seed, the higher score": sum(arm[0] > old[0] for old, arm in pairs),
                "two seeds, both higher": sum((arm > old)[:2].all() for old, arm in pairs),
                "two seeds, the higher mean": sum(
                    arm[:2].mean() > old[:2].mean() for old, arm in pairs
                ),
                "compare, looks after 6, 12 and 18": sum(
                    verdict(old, arm, LOOKS)[0] == "better" for old, arm in pairs
                ),
            }
        )
    counts = pd.DataFrame(rows)
    return pd.DataFrame(
        {"accepted, mean": counts.mean(), "loops that accept any": (counts > 0).mean()}
    )


def main(comparisons: int = 2000, seed: int = 0) -> None:
    """Print a row for each kind of scores, true difference and rule; then what a loop of a program accepts.

    Args:
        comparisons: Simulated comparisons of a row.
        seed: Seed of the scores.
    """
    rows = []
    for case, draw in CASES.items():
        for difference in (0.0, MARGIN, 2 * MARGIN):
            random = np.random.default_rng(seed)
            pairs = [draw(random, difference) for _ in range(comparisons)]
            for rule, looks in {"looks": LOOKS, "at once": ()}.items():
                about = {"scores": case, "difference": difference, "rule": rule}
                rows.append(about | row([verdict(*pair, looks) for pair in pairs]))
    print(pd.DataFrame(rows).to_string(index=False))
    print("\nOf ten changes that do nothing a program accepts as better:")
    print(accepted(10, max(1, comparisons // 10), seed).to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
