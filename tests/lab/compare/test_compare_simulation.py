"""What judge_scores promises, measured on simulated studies whose truth is known.

A study has four arms over the same seeds. What a seed does to all arms (its prompts, its initialisation) is
as large as what it does to each of them alone, so pairs are correlated by one half. A table holds many
studies, each as a problem of its own.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest

from tokenrl.lab import judge_scores
from tokenrl.lab.compare.statistics.found import Difference, Family
from tokenrl.lab.compare.statistics.power import detectable_difference, equivalence_power, level_of

ARMS = ("reference", "first", "second", "third")
COMPARISONS = len(ARMS) - 1
STUDIES = 1000
SEEDS = (6, 10, 20)
SD = math.sqrt(2)
"""Standard deviation of a paired difference, where what concerns each arm alone has a deviation of 1."""
LEVEL = level_of(COMPARISONS)

Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def lognormal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A long tail upwards (skewness 6.2), with mean 0 and deviation 1."""
    return (rng.lognormal(0, 1, shape) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def ceiling(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Scores near their maximum (beta with a = 20, b = 1; skewness -1.7), with mean 0 and deviation 1."""
    return (rng.beta(20, 1, shape) - 20 / 21) / math.sqrt(20 / (21**2 * 22))


def steady_reference(noise: Noise) -> Noise:
    """The reference hardly varies and the others have this noise: same means, and all skewness is left."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        found = noise(rng, shape)
        found[:, 0] = 0.1 * normal(rng, found[:, 0].shape)
        return found

    return draw


def judged(
    seeds: int,
    *,
    above: float = 0.0,
    sd: float = SD,
    noise: Noise = normal,
    margin: float | None = None,
    studies: int = STUDIES,
    stream: int = 0,
) -> tuple[Family, ...]:
    """Judge studies in which the three arms are truly better than the reference by the same amount."""
    rng = np.random.default_rng([seeds, stream])
    shared = rng.standard_normal((studies, 1, seeds))
    scores = (shared + noise(rng, (studies, len(ARMS), seeds))) * sd / SD
    scores[:, 1:] += above
    table = [
        (arm, seed, score, f"study {number}")
        for number, study in enumerate(scores.tolist())
        for arm, by_seed in zip(ARMS, study, strict=True)
        for seed, score in enumerate(by_seed)
    ]
    return judge_scores(table, margin=margin).families


def each(families: tuple[Family, ...], what: Callable[[Difference], bool]) -> np.ndarray:
    """Whether something holds, by study and comparison."""
    return np.array([[what(one) for one in family.differences] for family in families], dtype=float)


def share(found: np.ndarray) -> tuple[float, float]:
    """Mean over all comparisons with its standard error; comparisons within a study are not independent."""
    return float(found.mean()), float(found.mean(-1).std(ddof=1) / math.sqrt(len(found)))


def error(p: float, studies: int = STUDIES) -> float:
    return math.sqrt(p * (1 - p) / studies)


def differs(one: Difference) -> bool:
    return one.verdict in ("better", "worse")


def covers(truth: float) -> Callable[[Difference], bool]:
    return lambda one: one.mean.low <= truth <= one.mean.high


@lru_cache
def without_difference(seeds: int, noise: Noise) -> tuple[Family, ...]:
    return judged(seeds, noise=noise)


def test_the_level_the_coverage_and_the_power_hold_in_a_few_studies():
    """A guard that runs each time: it notices a level that is not adjusted, and pairs that are none."""
    studies = 200
    alike = judged(6, studies=studies)
    assert each(alike, differs).any(-1).mean() <= 0.05 + 2 * error(0.05, studies)
    assert 0.92 <= share(each(alike, covers(0)))[0] <= 0.98
    least = detectable_difference(6, SD, COMPARISONS)
    apart = judged(6, above=least, studies=studies, stream=1)
    assert share(each(apart, lambda one: one.verdict == "better"))[0] == pytest.approx(0.8, abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [normal, lognormal, ceiling])
@pytest.mark.parametrize("seeds", SEEDS)
def test_arms_that_are_the_same_are_found_different_in_at_most_one_study_in_twenty(seeds, noise):
    """Also with skewed scores: where both arms have the same shape, their differences are symmetric."""
    alike = without_difference(seeds, noise)
    assert each(alike, differs).any(-1).mean() <= 0.05 + 2 * error(0.05)
    assert each(alike, lambda one: one.p_holm <= 0.05).any(-1).mean() <= 0.05 + 2 * error(0.05)
    p, spread = share(each(alike, lambda one: one.p_sign_flip <= 0.05))
    assert 0.02 <= p <= 0.05 + 3 * spread, (
        "exact: never above the level, and below it only for being discrete"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
def test_intervals_of_95_percent_cover_the_true_difference_and_a_family_covers_all_of_its_own(seeds):
    alike = without_difference(seeds, normal)
    assert 0.93 <= share(each(alike, covers(0)))[0] <= 0.97
    adjusted = each(alike, lambda one: one.adjusted.low <= 0 <= one.adjusted.high)
    assert share(adjusted)[0] == pytest.approx(LEVEL, abs=3 * share(adjusted)[1])
    assert adjusted.all(-1).mean() >= 0.95 - 2 * error(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
def test_the_detectable_difference_is_found_with_a_power_of_80_percent_and_the_right_sign(seeds):
    least = detectable_difference(seeds, SD, COMPARISONS)
    apart = judged(seeds, above=least, stream=1)
    found, spread = share(each(apart, lambda one: one.verdict == "better"))
    assert found == pytest.approx(0.8, abs=3 * spread) and spread < 0.02
    assert not each(apart, lambda one: one.verdict == "worse").any()
    assert 0.93 <= share(each(apart, covers(least)))[0] <= 0.97
    half = judged(seeds, above=least / 2, stream=2)
    assert each(half, lambda one: one.verdict == "worse").any(-1).mean() <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
def test_equivalence_is_hardly_ever_wrong_and_found_as_often_as_computed(seeds):
    margin = 1.3 * detectable_difference(seeds, SD, COMPARISONS)
    at_margin = judged(seeds, above=margin, margin=margin, stream=3)
    wrong = each(at_margin, lambda one: one.verdict == "equivalent")
    assert wrong.any(-1).mean() <= 0.05 + 2 * error(0.05)
    assert share(wrong)[0] <= (1 - LEVEL) / 2 + 3 * share(wrong)[1], "only one of the two sides can fail"
    for true in (0.0, margin / 4):
        within = judged(seeds, above=true, margin=margin, stream=4)
        found, spread = share(each(within, lambda one: one.verdict == "equivalent"))
        computed = equivalence_power(seeds, true / SD, margin / SD, LEVEL)
        assert found == pytest.approx(computed, abs=3 * spread + 0.005) and computed > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
def test_the_seeds_that_an_undecided_verdict_asks_for_decide_it_with_a_power_of_80_percent(seeds):
    """If mean and spread are as found: they are taken for the truth, with as many seeds as it asks for."""
    least = detectable_difference(seeds, SD, COMPARISONS)
    first = [one for f in judged(seeds, above=least / 2, margin=least, studies=30) for one in f.differences]
    asked = [one for one in first if one.verdict == "undecided" and (one.seeds_needed or 999) <= 150][:12]
    assert len(asked) == 12 and all(one.seeds_needed > seeds for one in asked)
    decided = []
    for stream, one in enumerate(asked):
        truth = {"above": one.mean.value, "sd": one.sd, "margin": least}
        again = judged(one.seeds_needed, **truth, studies=100, stream=stream)
        decided.append(each(again, lambda one: one.verdict != "undecided"))
    found, spread = share(np.concatenate(decided))
    assert 0.8 - 3 * spread <= found <= 0.84 + 3 * spread, "more, because seeds come in whole numbers"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "found_too_often", "covered"),
    [
        (normal, (0.03, 0.07), (0.93, 0.97)),
        (ceiling, (0.08, 0.18), (0.88, 0.94)),
        (lognormal, (0.19, 0.3), (0.82, 0.89)),
    ],
)
@pytest.mark.parametrize("seeds", SEEDS)
def test_skewed_scores_against_a_steady_reference_of_the_same_mean_are_found_different_too_often(
    seeds, noise, found_too_often, covered
):
    """A limit of few seeds, measured to be known: rare low scores that were not seen seem not to exist.

    The worst that skewness can do, since the reference has none and hardly varies. The sign-flip test is no
    better, because these arms can truly not be exchanged.
    """
    shapes = judged(seeds, noise=steady_reference(noise), stream=5)
    assert found_too_often[0] <= each(shapes, differs).any(-1).mean() <= found_too_often[1]
    assert covered[0] <= share(each(shapes, covers(0)))[0] <= covered[1]
