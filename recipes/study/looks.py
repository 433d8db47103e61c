"""Simulate comparisons that are looked at after 6, 12 and 18 seeds, beside comparisons of 18 seeds at once.

    python recipes/study/looks.py                                    2,000 comparisons a row
    python recipes/study/looks.py --betting 300                      and the rule of seqbench
    pip install adastop && python recipes/study/looks.py --adastop 300    with AdaStop on the same scores

Two arms run on the same seeds, and a part of their scores is the seed's. What is promised: arms that are the same
are called better or worse in 5 %, and arms whose difference is the margin are called equivalent in 5 %. The scores
have normal errors, errors with long tails (Student's t with three degrees of freedom), unequal variances, ties (a
share of ten right answers), or an arm that fails in a tenth of its runs.

AdaStop (Mathieu et al. 2023, arXiv 2306.10882) tests permutations of unpaired scores and has no margin: what it
calls equal is what it has not told apart.

The package seqbench of R looks after each seed at a confidence sequence for bounded scores, by betting
(Waudby-Smith and Ramdas 2024, arXiv 2010.09686), which assumes no distribution. Its rule is computed here for ties.

Look for: shares above .05 in the columns of errors, and how many seeds a comparison took.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm", "adastop"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import warnings
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


def ties(
    random: np.random.Generator, difference: float, seeds: int = LOOKS[-1]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw shares of ten right answers, in units of the spread of their difference."""
    rates = np.array([0.5, min(1.0, 0.5 + difference * SPREAD)])
    reference, arm = random.binomial(10, rates[:, None], (2, seeds)) / 10 / SPREAD
    return reference, arm


def failing(random: np.random.Generator, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw normal scores; both arms fail in a tenth of their runs."""
    scores = np.array(CASES["normal"](random, difference))
    scores[random.random(scores.shape) < 0.1] = np.nan
    reference, arm = scores
    return reference, arm


SIZE = (2, LOOKS[-1])
CASES: dict[str, Draw] = {
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


def adastop_verdict(reference: np.ndarray, arm: np.ndarray, seed: int) -> tuple[str, int]:
    """Return the verdict of AdaStop with as many looks, and the seeds that it took."""
    from adastop import MultipleAgentsComparator

    size = LOOKS[0]
    comparator = MultipleAgentsComparator(n=size, K=len(LOOKS), B=1000, alpha=0.05, seed=seed)
    for seeds in range(size, LOOKS[-1] + 1, size):
        so_far = {"arm": arm[:seeds], "reference": reference[:seeds]}
        comparator.partial_compare(so_far, verbose=False)
        if comparator.is_finished:
            break
    (decision,) = comparator.decisions.values()
    words = {"larger": "better", "smaller": "worse"}
    return words.get(decision, "undecided"), seeds


def betting_interval(scores: np.ndarray, alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Return after each of some scores [n] from 0 to 1 the limits of their mean, which hold at all n together."""
    number = np.arange(1, len(scores) + 1)
    means = (0.5 + scores.cumsum()) / (number + 1)
    variances = (0.25 + ((scores - means) ** 2).cumsum()) / (number + 1)
    variances = np.append(0.25, variances[:-1])  # of the scores before
    bets = np.sqrt(2 * np.log(2 / alpha) / (variances * number * np.log(number + 1)))[:, None]
    mean = np.linspace(0, 1, 1001)[1:-1]
    gains = scores[:, None] - mean
    long = np.log1p(np.minimum(bets, 0.5 / mean) * gains).cumsum(0)
    short = np.log1p(-np.minimum(bets, 0.5 / (1 - mean)) * gains).cumsum(0)
    inside = np.logical_and.accumulate(np.maximum(long, short) < np.log(2 / alpha))
    return np.where(inside, mean, 1).min(1), np.where(inside, mean, 0).max(1)


def betting_seeds(random: np.random.Generator, difference: float) -> dict[str, float]:
    """Return after how many of 400 seeds with ties betting has each verdict; infinity for none."""
    reference, arm = ties(random, difference, 400)
    low, high = (
        (2 * limit - 1) / SPREAD for limit in betting_interval(((arm - reference) * SPREAD + 1) / 2)
    )
    verdicts = {
        "above 0": low > 0,
        "above the margin": low > MARGIN,
        "equivalent": (low > -MARGIN) & (high < MARGIN),
    }
    return {
        name: 1.0 + reached.argmax() if reached.any() else np.inf
        for name, reached in verdicts.items()
    }


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


def main(comparisons: int = 2000, adastop: int = 0, betting: int = 0, seed: int = 0) -> None:
    """Print a row for each kind of scores, true difference and rule; then what a loop of a program accepts.

    Args:
        comparisons: Simulated comparisons of a row.
        adastop: Of these, comparisons that AdaStop judges too; each takes it a tenth of a second.
        betting: Simulated comparisons by betting.
        seed: Seed of the scores.
    """
    warnings.simplefilter("ignore")  # AdaStop divides by the spread of equal scores
    rows = []
    for case, draw in CASES.items():
        for difference in (0.0, MARGIN, 2 * MARGIN):
            random = np.random.default_rng(seed)
            pairs = [draw(random, difference) for _ in range(comparisons)]
            rules: dict[str, list[tuple[str, int]]] = {
                "looks": [verdict(*pair, LOOKS) for pair in pairs],
                "at once": [verdict(*pair, ()) for pair in pairs],
            }
            if adastop and case != "both fail in a tenth":
                rules["AdaStop"] = [
                    adastop_verdict(*pair, number) for number, pair in enumerate(pairs[:adastop])
                ]
            about = {"scores": case, "difference": difference}
            rows += [about | {"rule": rule} | row(each) for rule, each in rules.items()]
    print(pd.DataFrame(rows).to_string(index=False))
    if betting:
        print("\nScores with ties, median number of seeds until betting has the verdict:")
        medians = {}
        for difference in (0.0, MARGIN, 2 * MARGIN):
            random = np.random.default_rng(seed)
            seeds = pd.DataFrame([betting_seeds(random, difference) for _ in range(betting)])
            medians[difference] = seeds.median()
        print(pd.DataFrame(medians).T.to_string())
    print("\nOf ten changes that do nothing a program accepts as better:")
    print(accepted(10, max(1, comparisons // 10), seed).to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
