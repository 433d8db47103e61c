"""Expected gradients and variances against identities and against one group at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.lab.exact.enumeration import exact_moments
from tokenrl.lab.exact.problems import Problem, tabular_problem

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def by_hand(estimator: Estimator, problem: Problem, size: int) -> tuple[torch.Tensor, float]:
    """E[g] and E|g|^2 with one backward pass per group through a linear model of the listed logprobs."""
    prompts, completions = problem.chances.shape
    theta = torch.zeros(problem.scores.shape[-1], dtype=torch.double, requires_grad=True)
    of_row = torch.arange(prompts).repeat_interleave(size)
    greedy = problem.totals[of_row, problem.greedy[of_row]]
    mean = torch.zeros_like(theta).detach()
    second = 0.0
    for chosen in itertools.product(range(completions), repeat=len(of_row)):
        rows = of_row, torch.tensor(chosen)
        old, ref = problem.logprobs[rows], problem.ref_logprobs[rows]
        policy, weights, mask, *_ = estimator.loss_terms(
            problem.rewards[rows],
            problem.mask[rows[1]],
            group_size=size,
            max_length=problem.max_length,
            logprobs=old,
            ref_logprobs=ref,
            baseline_value=problem.baseline_value,
            values=problem.values[rows],
            greedy_rewards=greedy,
            score_norms=problem.scores[rows].square().sum(-1),
        )
        logprobs = old + problem.scores[rows] @ theta
        entropy = problem.entropy[rows] + problem.entropy_slopes[rows] @ theta
        token_kl = problem.token_kl[rows] + problem.kl_slopes[rows] @ theta
        inputs = {
            "old_logprobs": old,
            "ref_logprobs": ref,
            "entropy": entropy,
            "token_kl": token_kl,
        }
        loss = estimator.loss(logprobs, policy, weights, mask, **inputs)
        (slope,) = torch.autograd.grad(loss, theta)
        chance = float(problem.chances[rows].prod())
        mean = mean - chance * slope
        second += chance * float(slope.square().sum())
    return mean, second


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
        {"baseline": "optimal"},
        {"baseline": "value", "returns": "gae", "lam": 0.5},
        {
            "beta": 0.3,
            "kl_estimator": "k2_sequence",
            "kl_placement": "loss",
            "aggregation": "token_mean",
        },
        {"baseline": "remax", "entropy_coef": 0.4, "ratio": "sequence_product"},
        {"beta": 0.3, "kl_estimator": "closed_form_path", "kl_placement": "loss"},
        {"beta": 0.3, "returns": "reward_to_go", "baseline": "running_mean", "gamma": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize(("prompts", "length", "kind"), [(1, 3, "dense"), (2, 2, "graded")])
def test_one_group_at_a_time(fields: dict, prompts: int, length: int, kind: str):
    size = 4 - prompts
    problem = tabular_problem(3, prompts=prompts, vocabulary=2, length=length, rewards=kind)
    assert (problem.greedy > 0).all()  # so that 'remax' uses more than the first completion
    estimator = Estimator(**fields)
    fast = exact_moments(estimator, problem, group_size=size)
    mean, second = by_hand(estimator, problem, size)
    assert_close(fast.mean.sum(0), mean, **CLOSE)
    assert fast.second == pytest.approx(second, rel=1e-10)
    pieces = exact_moments(estimator, problem, group_size=size, chunk=7)
    assert_close(pieces.mean, fast.mean, **CLOSE)
    assert pieces.second == pytest.approx(fast.second, rel=1e-12)
