"""What judge_scores promises, measured on simulated studies whose truth is known.

A study has several arms over the same seeds. What a seed does to all arms is as large as what it does to each
of them alone, so pairs are correlated by one half. A table holds many studies, each as a problem of its own.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest

from tokenrl.lab import judge_scores
from tokenrl.lab.compare.intervals import detectable_difference, level_of
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


def share(values: np.ndarray) -> tuple[float, float]:
    """Mean over all comparisons with its standard error; comparisons within a study are not independent."""
    return float(values.mean()), float(values.mean(-1).std(ddof=1) / math.sqrt(len(values)))


def differs(d: PairedDifference) -> bool:
    return d.verdict in ("better", "worse")


def error(studies: int) -> float:
    return math.sqrt(0.05 * 0.95 / studies)


@lru_cache
def alike(seeds: int, noise: Callable) -> tuple[Family, ...]:
    return judged(seeds, SEEDS[seeds], noise=noise)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [normal, lognormal])
@pytest.mark.parametrize("seeds", SEEDS)
def test_arms_that_are_the_same_are_found_different_in_at_most_one_family_in_twenty(seeds, noise):
    same = alike(seeds, noise)
    assert each(same, differs).any(-1).mean() <= 0.05 + 2 * error(len(same))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
def test_intervals_cover_the_true_difference(seeds):
    same = alike(seeds, normal)
    covered, spread = share(each(same, lambda d: d.mean.low <= 0 <= d.mean.high))
    assert covered == pytest.approx(0.95, abs=3 * spread)
    adjusted, spread = share(each(same, lambda d: d.adjusted.low <= 0 <= d.adjusted.high))
    assert adjusted == pytest.approx(level_of(COMPARISONS), abs=3 * spread + 0.005)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
def test_equivalence_is_hardly_ever_wrong(seeds):
    margin = 1.3 * detectable_difference(seeds, SD, COMPARISONS)
    at_margin = judged(seeds, SEEDS[seeds], above=margin, margin=margin, stream=3)
    assert each(at_margin, lambda d: d.verdict == "equivalent").any(-1).mean() <= 0.05 + 2 * error(
        150
    )


CEILING = {6: 0.9**6, 10: 1.0, 20: 0.99}
"""By number of seeds: verdicts where failures are declared."""
RARE = 0.1


def with_failures(
    seeds: int, studies: int, reference: float, sd: float, arm_sd: float, stream: int
) -> np.ndarray:
    """Scores [studies, 2, seeds] of a reference and of an arm that scores 1, but 0 in a tenth of its runs."""
    rng = np.random.default_rng([seeds, stream])
    scores = np.stack([reference + sd * rng.standard_normal((studies, seeds)),
                       1 + arm_sd * rng.standard_normal((studies, seeds))], axis=1)  # fmt: skip
    scores[:, 1][rng.random((studies, seeds)) < RARE] = 0.0
    return scores


def verdicts(scores: np.ndarray, **options: object) -> np.ndarray:
    return np.array([family.differences[0].verdict for family in judge(scores, **options)])


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
def test_rare_failures_near_a_ceiling_are_judged_as_the_page_says(seeds):
    studies = SEEDS[seeds]
    spread = 3 * math.sqrt(0.25 / studies)
    steady = with_failures(seeds, studies, 1.0, 0.0, 0.0, 6)
    for options in ({}, {"failure_below": 0.5}):
        assert not (verdicts(steady, margin=0.02, **options) == "equivalent").any()
    declared_share = CEILING[seeds]
    without = (1 - RARE) ** seeds
    varied = with_failures(seeds, studies, 1.0, 0.005, 0.005, 7)
    declared = verdicts(varied, margin=0.02, failure_below=0.5)
    assert np.mean(declared == "equivalent") == pytest.approx(declared_share, abs=spread)
    assert not np.isin(declared, ("better", "worse")).mean() > 0.05
    assert np.mean(verdicts(varied, margin=0.02) == "equivalent") == pytest.approx(
        without, abs=spread
    )
    means = with_failures(seeds, studies, 0.9, 0.02, 0.0, 8)
    assert np.mean(verdicts(means) == "better") == pytest.approx(without, abs=spread)
    rare_gains = 1 - means
    assert np.mean(verdicts(rare_gains) == "worse") == pytest.approx(without, abs=spread)
    declared = verdicts(means, failure_below=0.5)
    assert np.mean(declared == "better") == pytest.approx(declared_share, abs=spread)
