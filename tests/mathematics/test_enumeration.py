"""Expected gradients and variances against identities and against one group at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import comb

import pytest
import torch

from tokenrl.core import Estimator
from tokenrl.lab.exact.enumeration import Moments, exact_moments
from tokenrl.lab.exact.problems import Problem, tabular_problem

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def by_hand(estimator: Estimator, problem: Problem, size: int) -> Moments:
    """The same sums with one backward pass per group through a linear model of the listed logprobs."""
    prompts, completions = problem.chances.shape
    theta = torch.zeros(problem.scores.shape[-1], dtype=torch.double, requires_grad=True)
    of_row = torch.arange(prompts).repeat_interleave(size)
    mean, second = torch.zeros_like(theta).detach(), 0.0
    for chosen in itertools.product(range(completions), repeat=len(of_row)):
        y = torch.tensor(chosen)
        mask, old, ref = (
            problem.mask[y],
            problem.logprobs[of_row, y],
            problem.ref_logprobs[of_row, y],
        )
        logprobs = old + problem.scores[of_row, y] @ theta
        entropy = problem.entropy[of_row, y] + problem.entropy_slopes[of_row, y] @ theta
        advantages = estimator.advantages(
            problem.rewards[of_row, y],
            mask,
            group_size=size,
            logprobs=old,
            ref_logprobs=ref,
            baseline_value=problem.baseline_value,
            values=problem.values[of_row, y],
            greedy_rewards=torch.stack([problem.totals[x, problem.greedy[x]] for x in of_row]),
            score_norms=problem.scores[of_row, y].square().sum(-1),
        ).policy
        weights = estimator.token_weights(mask, max_length=problem.max_length)
        loss = estimator.loss(
            logprobs, advantages, weights, mask, old_logprobs=old, ref_logprobs=ref, entropy=entropy
        )
        (slope,) = torch.autograd.grad(loss, theta)
        chance = float(problem.chances[of_row, y].prod())
        mean, second = mean - chance * slope, second + chance * float(slope.square().sum())
    return Moments(mean[None], problem.gradient(), second)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "baseline": "group_mean",
            "scale": "group_std",
            "aggregation": "sequence_mean",
            "ratio": "token",
        },
        {"aggregation": "token_mean", "entropy_coef": 0.4},
        {"beta": 0.3, "kl_estimator": "k3", "kl_placement": "loss"},
        {"baseline": "optimal"},
        {"baseline": "remax", "aggregation": "fixed_length"},
        {"baseline": "value", "returns": "gae", "lam": 0.5},
        {"ratio": "sequence_mean", "aggregation": "sequence_mean", "returns": "reward_to_go"},
        {
            "beta": 0.3,
            "kl_estimator": "k2_sequence",
            "kl_placement": "loss",
            "aggregation": "token_mean",
        },
        {"entropy_coef": 0.4, "ratio": "sequence_product"},
        {"beta": 0.3, "returns": "reward_to_go", "baseline": "running_mean", "gamma": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize(("prompts", "size", "kind"), [(1, 3, "dense"), (2, 2, "graded")])
def test_one_group_at_a_time(fields: dict, prompts: int, size: int, kind: str) -> None:
    problem = tabular_problem(3, prompts=prompts, vocabulary=2, rewards=kind)
    assert (problem.greedy > 0).all()  # so that 'remax' uses more than the first completion
    estimator = Estimator(**fields)
    fast, slow = (
        exact_moments(estimator, problem, group_size=size),
        by_hand(estimator, problem, size),
    )
    torch.testing.assert_close(fast.mean.sum(0), slow.mean.sum(0), **CLOSE)
    assert fast.second == pytest.approx(slow.second, rel=1e-10)
    pieces = exact_moments(estimator, problem, group_size=size, chunk=7)
    torch.testing.assert_close(pieces.mean, fast.mean, **CLOSE)
    assert pieces.second == pytest.approx(fast.second, rel=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rloo_is_exact_and_its_variance_that_of_a_u_statistic(size: int) -> None:
    """Var = 2/(G(G-1)) [2(G-2) z1 + z2], z1 = Var((R-J)S)/4, z2 = Var((R1-R2)(S1-S2)/2)."""
    problem = tabular_problem(2)
    found = exact_moments(Estimator(), problem, group_size=size)
    assert found.relative_bias < 1e-10 and found.cosine == pytest.approx(1, abs=1e-12)
    assert found.scale == pytest.approx(1, rel=1e-10) and found.mse == pytest.approx(found.variance)
    p, r, s = problem.chances[0], problem.totals[0], problem.scores[0].sum(1)  # [15], [15], [15, D]
    gradient = problem.gradient()[0]

    def variance(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (weight * (x - gradient).square().sum(-1)).sum()

    z1 = (p * (((r - p @ r)[:, None] * s) - gradient).square().sum(-1)).sum() / 4
    pair = (r[:, None] - r)[:, :, None] * (s[:, None] - s) / 2
    z2 = variance(p[:, None] * p, pair)
    wanted = 2 / (size * (size - 1)) * (2 * (size - 2) * z1 + z2)
    assert found.variance == pytest.approx(float(wanted), rel=1e-10)
    assert found.noise == pytest.approx(found.variance / float(gradient.square().sum()), rel=1e-10)


@pytest.mark.parametrize("ddof", [0, 1])
def test_weight_of_difficulty_of_a_group_std(ddof: int) -> None:
    """Binary rewards: E[g] = w_G(p) grad p, w = E[s_K^2/(std_K + eps)]/(p(1 - p)), K ~ Binomial(G, p).

    With RLOO's mean of the others it is G/(G - 1) times that.
    """
    problem = tabular_problem(7, rewards="binary")
    p = float((problem.chances * problem.totals).sum())
    grpo = Estimator(baseline="group_mean", scale="group_std", scale_ddof=ddof, scale_eps=0.01)
    for size in (2, 3, 4):
        wanted = 0.0
        for k in range(size + 1):
            variance = k / size * (1 - k / size)
            std = (variance * size / (size - ddof)) ** 0.5
            wanted += comb(size, k) * p**k * (1 - p) ** (size - k) * variance / (std + 0.01)
        for baseline, factor in (("group_mean", 1.0), ("rloo", size / (size - 1))):
            found = exact_moments(replace(grpo, baseline=baseline), problem, group_size=size)
            weighted = factor * wanted / (p * (1 - p)) * problem.gradient()
            torch.testing.assert_close(found.mean, weighted, **CLOSE)
