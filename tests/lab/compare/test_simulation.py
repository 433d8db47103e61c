"""What judge_scores promises, measured on simulated studies whose truth is known.

A study has several arms over the same seeds. What a seed does to all arms is as large as what it does to each
of them alone, so pairs are correlated by one half. A table holds many studies, each as a problem of its own.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from tokenrl.lab import judge_scores
from tokenrl.lab.compare.intervals import detectable_difference
from tokenrl.lab.compare.judgement import Family, PairedDifference

COMPARISONS = 3
SEEDS = {6: 300, 10: 300, 20: 150}
"""Studies by number of seeds."""
SD = math.sqrt(2)
"""Standard deviation of a paired difference, where what concerns each arm alone has a deviation of 1."""


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def lognormal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A long tail upwards (skewness 6.2), with mean 0 and deviation 1."""
    return (rng.lognormal(0, 1, shape) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def judge(scores: np.ndarray, **options: object) -> tuple[Family, ...]:
    """Judge studies [studies, arms, seeds]; the first arm is the reference."""
    indices = np.ndindex(scores.shape)
    table = [(f"arm {i[1]}", i[2], float(scores[i]), f"study {i[0]}") for i in indices]
    return judge_scores(table, **options).families


def judged(
    seeds: int,
    studies: int,
    *,
    above: float = 0.0,
    noise: Callable = normal,
    stream: int = 0,
    **options: object,
) -> tuple[Family, ...]:
    """Judge studies in which three arms are truly better than the reference by the same amount."""
    rng = np.random.default_rng([seeds, stream])
    shared = rng.standard_normal((studies, 1, seeds))
    scores = shared + noise(rng, (studies, 1 + COMPARISONS, seeds))
    scores[:, 1:] += above
    return judge(scores, **options)


def each(families: tuple[Family, ...], predicate: Callable[[PairedDifference], bool]) -> np.ndarray:
    """Whether something holds, by study and comparison."""
    return np.array(
        [[predicate(d) for d in family.differences] for family in families], dtype=float
    )


def differs(d: PairedDifference) -> bool:
    return d.verdict in ("better", "worse")


def error(studies: int) -> float:
    return math.sqrt(0.05 * 0.95 / studies)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [normal, lognormal])
@pytest.mark.parametrize("seeds", SEEDS)
def test_arms_that_are_the_same_are_found_different_in_at_most_one_family_in_twenty(seeds, noise):
    same = judged(seeds, SEEDS[seeds], noise=noise)
    assert each(same, differs).any(-1).mean() <= 0.05 + 2 * error(len(same))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
def test_equivalence_is_hardly_ever_wrong(seeds):
    margin = 1.3 * detectable_difference(seeds, SD, COMPARISONS)
    at_margin = judged(seeds, SEEDS[seeds], above=margin, margin=margin, stream=3)
    assert each(at_margin, lambda d: d.verdict == "equivalent").any(-1).mean() <= 0.05 + 2 * error(
        150
    )
