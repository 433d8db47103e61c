"""The lab lists all completions, and its derivatives are right."""

from __future__ import annotations

import pytest
import torch
from drawing import normals, seeded
from torch.testing import assert_close

from tokenrl.lab.exact.problems import all_completions, tabular_problem


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["binary", "graded", "continuous", "dense"])
def test_chances_sum_to_one_and_scores_to_zero(kind: str, shared: bool):
    problem = tabular_problem(1, prompts=2, rewards=kind, shared=shared)
    assert problem.scores.shape == (2, 15, 3, 21 * (1 if shared else 2))
    assert_close(problem.chances.sum(-1), torch.ones(2).double(), rtol=1e-14, atol=0)
    mean = torch.einsum("pm,pmtd->pd", problem.chances, problem.scores)
    assert mean.abs().max() < 1e-14
    off = problem.mask.expand(2, 15, 3) == 0
    for tensor in (problem.logprobs, problem.ref_logprobs, problem.entropy, problem.values):
        assert (tensor[off] == 0).all() and (tensor[~off] != 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_is_that_of_the_objective(shared: bool):
    """By autograd, through the probabilities of whole completions."""
    every = all_completions(3, 3)
    logits, reference, _ = normals(seeded(3), 3, 2, 7, 3)
    problem = tabular_problem(3, prompts=2, shared=shared)
    beta, entropy_coef = 0.3, 0.7

    def objective(x: torch.Tensor) -> torch.Tensor:
        def whole(y: torch.Tensor) -> torch.Tensor:
            return (y.log_softmax(-1)[:, every.prefix, every.ids] * every.mask).sum(-1)

        log_pi, log_ref = whole(x), whole(reference)
        worth = problem.totals - beta * (log_pi - log_ref) - entropy_coef * log_pi
        return (log_pi.exp() * worth).sum(-1).mean()

    wanted = torch.func.grad(objective)(logits)  # [P, S, V]
    wanted = wanted.sum(0) if shared else wanted
    gradient = problem.gradient(beta=beta, entropy_coef=entropy_coef).sum(0)
    assert_close(gradient, wanted.flatten(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["continuous", "dense"])
def test_true_values_are_the_mean_from_each_prefix(kind: str):
    problem = tabular_problem(5, rewards=kind, true_values=True)
    j = (problem.chances * problem.totals).sum()
    assert_close(problem.values[0, :, 0], j.expand(15))
    assert len(problem.values[0].unique()) == 1 + 7  # the padding, and one value per prefix
