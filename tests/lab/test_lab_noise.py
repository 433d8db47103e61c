"""Statistics of units, and estimators compared on the same rows, against enumerated truths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from drawing import normals, seeded
from listed_policy import problem_of_policy
from tiny_lab_model import PROMPTS, points_of, tiny_policy

from tokenrl.core import Estimator
from tokenrl.core.statistics import Interval
from tokenrl.lab.exact.enumeration import exact_moments
from tokenrl.lab.measure.contributions import contributions
from tokenrl.lab.measure.measurement import words
from tokenrl.lab.measure.noise import measure_estimators, same_expectation
from tokenrl.lab.measure.unit_statistics import Resampling, interval, reciprocal
from tokenrl.language.commands.samples import Samples
from tokenrl.language.policy.model import Policy

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def test_products_and_variances_are_unbiased():
    """All 4^3 samples of three units from four points of unequal chance."""
    generator = seeded(0)
    values = normals(generator, 4, 5)
    other = normals(generator, 4, 5)
    chance = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.double)
    draw = Resampling(3, 5, replicates=2)
    signal, cross, variance = 0.0, 0.0, 0.0
    for chosen in itertools.product(range(4), repeat=3):
        p, index = chance[list(chosen)].prod(), list(chosen)
        signal += float(p * draw.product(values[index], values[index])[0])
        cross += float(p * draw.product(values[index], other[index])[0])
        variance += float(p * draw.variance(values[index])[0])
    mean = chance @ values
    assert signal == pytest.approx(float(mean @ mean), rel=1e-12)
    assert cross == pytest.approx(float(mean @ (chance @ other)), rel=1e-12)
    second = float(chance @ values.square().sum(-1))
    assert variance == pytest.approx(second - float(mean @ mean), rel=1e-12)


def test_replicates_multiply_no_unit_with_itself():
    """Orthogonal units have products of exactly 0, however often one is drawn."""
    draw = Resampling(6, 6, replicates=50)
    draw.probes[:] = 1
    units = torch.eye(6, dtype=torch.double)
    assert draw.product(units, units).abs().max() < 1e-12
    assert draw.units.sum(-1).eq(6).all() and draw.units[1:].max() > 1


def drawn(problem, chosen: torch.Tensor, group_size: int, prompt: int = 0) -> Samples:
    """The chosen completions of a prompt as samples."""
    ones, old = torch.ones(len(chosen)).bool(), problem.logprobs[prompt, chosen]
    greedy = problem.totals[prompt, problem.greedy[prompt]].expand(len(chosen))
    rewards = problem.totals[prompt, chosen]
    unread = (
        "prompt_ids",
        "prompt_mask",
        "prompt_index",
        "completion_ids",
        "by_function",
        "replayed",
    )
    return Samples(
        **dict.fromkeys((*unread, "sampling_logprobs", "parts"), torch.zeros(0)),
        group_size=group_size,
        mask=problem.mask[chosen].bool(),
        rewards=rewards,
        valid=ones,
        truncated=~ones,
        greedy_rewards=greedy,
        logprobs=old,
        ref_logprobs=old,
    )


def test_what_is_not_told_apart_from_zero_is_not_told():
    assert words(reciprocal(Interval(0.5, -0.1, 1.0))) == "not resolved (> 1)"
    assert words(reciprocal(Interval(-0.5, -1.0, 1.0))) == "not resolved"
    assert words(reciprocal(Interval(-0.5, -1.0, -0.1))) == "not resolved"
    assert words(reciprocal(Interval(0.5, 0.25, 1.0))) == "2 (1 to 4)"
    assert math.isnan(interval(torch.tensor([1.0, 1.0, math.nan]).double()).low)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [256, 512])
def test_compare_agrees_with_the_enumerated_truth(policy: Policy, groups: int):
    """Groups of two of one prompt, exact scores in place of probes: noise and cosine within intervals.

    The standard error of a variance is about 6 % for rloo and 8 % for remax with 512 groups, and falls with
    the square root of their number.
    """
    rows = 2 * groups
    problem = problem_of_policy(policy, PROMPTS[0], points_of, length=2, vocabulary=4)
    generator = seeded(1)
    chosen = torch.multinomial(problem.chances[0], rows, replacement=True, generator=generator)
    samples, seen = drawn(problem, chosen, 2), problem.scores[0, chosen]
    presets = ("reinforce", "rloo", "remax", "grpo")
    estimators = {name: Estimator.preset(name) for name in presets}
    measured = measure_estimators(samples, seen, estimators, prompts_per_step=4, replicates=300)
    truths = [exact_moments(e, problem, group_size=2) for e in estimators.values()]
    for m, exact in zip(measured, truths, strict=True):
        assert (m.coupled, m.units) == (False, groups)
        noise = exact.noise / 4  # of a step of four groups
        assert m.noise.low <= noise <= m.noise.high and m.noise.high / m.noise.low < 3
        error = 0.15 * (512 / groups) ** 0.5
        assert m.variance.value == pytest.approx(exact.variance / 4, rel=error)
        assert m.signal.value == pytest.approx(float(exact.mean.square().sum()), rel=0.5)
        assert m.cosine.low - 1e-9 <= exact.cosine <= m.cosine.high + 1e-9
        ratio = truths[0].noise / exact.noise
        assert m.quieter.low <= ratio <= m.quieter.high
    assert measured[1].cosine.value == pytest.approx(1, abs=1e-12)
    token = Estimator(aggregation="token_mean")  # its units are steps already
    (m,) = measure_estimators(samples, seen, {"token": token}, prompts_per_step=4, replicates=2)
    units = contributions(token, samples, seen, prompts_per_step=4).values
    assert m.units == len(units) == groups // 4
    assert m.variance.value == pytest.approx(float(units.var(0).sum()), rel=1e-10)


def test_same_expectation_needs_the_same_objective():
    assert same_expectation(Estimator()) and same_expectation(Estimator(baseline="none"))
    different = Estimator(beta=0.1), Estimator(overlong_buffer=4), Estimator(baseline="group_mean")
    assert not any(map(same_expectation, different))
