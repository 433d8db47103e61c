"""The KL with its standard error, and the adaptive weight, against enumeration and formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import test_bias
import torch
from tabular_policy import Problem, expected_gradient, logprobs_of, probabilities_of, relative_error

from tokenrl.core import Estimator
from tokenrl.core.choices import EXACT, KL_EFFECTS
from tokenrl.core.losses import LEAST_BETA, k1, k2, k3, next_beta
from tokenrl.core.statistics import mean_and_error


def sums(kind, problem: Problem, prompt: int = 0) -> torch.Tensor:
    """[15]: an estimate of the KL from each completion, summed over its tokens."""
    return kind(logprobs_of(problem.logits[prompt]), logprobs_of(problem.reference[prompt])).sum(-1)


def whole_kl(problem: Problem) -> torch.Tensor:
    """KL of the first prompt's completions: sum over 15 outcomes of p log(p/q)."""
    p, q = (probabilities_of(x[0]) for x in (problem.logits, problem.reference))
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_k1_and_of_k3_are_unbiased_for_the_kl_of_whole_completions(seed):
    """Each token given its prefix, and the chain rule; k2 is not."""
    problem = Problem.random(seed)
    chance, kl = probabilities_of(problem.logits[0]), whole_kl(problem)
    for kind, same in ((k1, True), (k3, True), (k2, False)):
        mean = (chance * sums(kind, problem)).sum()
        assert (abs(mean - kl) < 1e-12) == same
    assert (sums(k3, problem) > 0).all() and (sums(k1, problem) < 0).any()


def test_k3_varies_less_near_the_reference_and_more_where_they_contradict():
    problem = Problem.random(5)
    for p, reference, least, most in (
        (problem.logits, problem.logits + 0.1 * problem.reference, 0.0, 0.01),
        (problem.logits, problem.logits + 0.5 * problem.reference, 0.0, 0.1),
        # The policy almost never takes the token that the reference takes most of the time.
        (4 * problem.logits, -4 * problem.logits, 10.0, math.inf),
    ):
        pair = Problem(p, reference, problem.rewards)
        chance, kl = probabilities_of(p[0]), whole_kl(pair)
        v1, v3 = ((chance * (sums(kind, pair) - kl).square()).sum() for kind in (k1, k3))
        assert least <= v3 / v1 < most


def test_the_square_of_the_error_is_the_variance_of_the_mean_on_average():
    """Two prompts drawn at random, two completions of each: every outcome, with its probability."""
    problem = Problem.random(6, prompts=2)
    outcomes = []  # a group: its probability and its two estimates
    for prompt in range(2):
        p, kl = probabilities_of(problem.logits[prompt]), sums(k1, problem, prompt) + 3.0 * prompt
        outcomes += [(p[i] * p[j] / 2, (kl[i], kl[j])) for i, j in itertools.product(range(15), repeat=2)]
    chance = torch.stack([c for c, _ in outcomes])  # [450]
    values = torch.tensor([v for _, v in outcomes], dtype=torch.double)  # [450, 2]
    assert chance.sum() == pytest.approx(1)
    means = values.mean(1)
    variance = (chance * means.square()).sum() - (chance @ means) ** 2

    def error(group_size: int) -> torch.Tensor:
        every = torch.cat(torch.broadcast_tensors(values[:, None], values[None]), dim=-1)  # [450, 450, 4]
        squares = torch.func.vmap(lambda rows: mean_and_error(rows, group_size)[1] ** 2)(every.view(-1, 4))
        return (chance[:, None] * chance).flatten() @ squares

    assert error(2) == pytest.approx(float(variance / 2), rel=1e-12)
    assert error(1) < 0.7 * error(2)  # rows treated as independent draws give too small an error


def test_the_error_where_there_is_one_group_or_one_number():
    values = torch.tensor([1.0, 4.0, 4.0, 7.0], dtype=torch.double)
    mean, error = mean_and_error(values, 4)
    assert (mean, error) == (4.0, pytest.approx(math.sqrt(6) / 2))
    assert mean_and_error(values, 2)[1] == pytest.approx(3 / math.sqrt(2) / math.sqrt(2))
    mean, error = mean_and_error(values[:1])
    assert mean == 1 and torch.isnan(error)


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [(6.0, 0.5), (6.6, 0.505), (5.4, 0.495), (60.0, 0.51), (0.0, 0.49), (-3.0, 0.49), (math.inf, 0.51)],
)
def test_beta_moves_by_the_formula(kl, wanted):
    """K = 0.1, target 6: the relative error, at most a fifth either way, times a tenth."""
    assert next_beta(0.5, kl, target=6.0) == pytest.approx(wanted, abs=1e-12)


def test_beta_stays_above_zero_and_an_unknown_kl_moves_nothing():
    assert next_beta(0.5, math.nan, target=6.0) == 0.5
    assert next_beta(0.5, 0.0, target=6.0, gain=4.999) > 0
    assert next_beta(LEAST_BETA, 0.0, target=6.0) == LEAST_BETA


def test_the_loop_settles_at_the_target():
    """A policy that is optimal for its beta: p proportional to q exp(R / beta), whose KL falls in beta."""
    problem = Problem.random(7)
    q, beta, target = probabilities_of(problem.reference[0]), 5.0, 0.5

    def kl(beta: float) -> float:
        p = (q.log() + problem.rewards[0] / beta).softmax(0)
        return float((p * (p / q).log()).sum())

    assert kl(5.0) < target < kl(0.1)
    for _ in range(400):
        beta = next_beta(beta, kl(beta), target=target, gain=0.5)
    assert kl(beta) == pytest.approx(target, rel=1e-6)


def test_every_pair_of_place_and_estimate_is_enumerated():
    proven = [fields for fields in test_bias.SINGLE if "kl_placement" in fields]
    assert {(fields["kl_placement"], fields["kl_estimator"]) for fields in proven} == set(KL_EFFECTS)


@pytest.mark.parametrize("baseline", ["none", "rloo"])
@pytest.mark.parametrize(("place", "name"), KL_EFFECTS)
def test_the_gradient_of_each_pair_at_any_weight_is_exact_or_declared_biased(place, name, baseline):
    """Weights as a controller would choose them, far from one; k1 in the loss has no penalty at all."""
    problem = Problem.random(21)
    for beta in (0.02, 7.0):
        e = Estimator(baseline=baseline, beta=beta, kl_placement=place, kl_estimator=name)
        found, target = expected_gradient(e, problem, 2), problem.target(beta)
        # What is missing of the penalty's gradient, in units of the weight.
        missing = float((found - target).norm()) / beta
        if KL_EFFECTS[place, name].status == EXACT:
            assert relative_error(found, target) < 1e-10
        else:
            assert missing > 1e-3
        if (place, name) == ("loss", "k1"):
            assert relative_error(found, problem.target(0.0)) < 1e-10
