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
    assert (problem.totals.std(-1) > 0.1).all()
    assert {"binary": 2, "graded": 3}.get(kind, 30) >= len(problem.totals.unique())
    off = problem.mask.expand(2, 15, 3) == 0
    for tensor in (problem.logprobs, problem.ref_logprobs, problem.entropy, problem.values):
        assert (tensor[off] == 0).all() and (tensor[~off] != 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_is_that_of_the_objective(shared: bool):
    """Central differences of J along random directions, through policies drawn anew from moved logits."""
    every = all_completions(3, 3)
    draw = seeded(3)
    logits, reference, _ = normals(draw, 3, 2, 7, 3)
    problem = tabular_problem(3, prompts=2, shared=shared)
    beta, entropy_coef = 0.3, 0.7

    def objective(x: torch.Tensor) -> torch.Tensor:
        def whole(y: torch.Tensor) -> torch.Tensor:
            return (y.log_softmax(-1)[:, every.prefix, every.ids] * every.mask).sum(-1)

        log_pi, log_ref = whole(x), whole(reference)
        worth = problem.totals - beta * (log_pi - log_ref) - entropy_coef * log_pi
        return (log_pi.exp() * worth).sum(-1).mean()

    gradient = problem.gradient(beta=beta, entropy_coef=entropy_coef).sum(0)
    for _ in range(3):
        u = normals(draw, gradient.shape)
        step = 1e-5 * (u.reshape(1, 7, 3) if shared else u.reshape(2, 7, 3))
        slope = (objective(logits + step) - objective(logits - step)) / 2e-5
        assert_close(slope, gradient @ u, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["continuous", "dense"])
def test_true_values_are_the_mean_from_each_prefix(kind: str):
    problem = tabular_problem(5, rewards=kind, true_values=True)
    j = (problem.chances * problem.totals).sum()
    assert_close(problem.values[0, :, 0], j.expand(15))
    assert len(problem.values[0].unique()) == 1 + 7  # the padding, and one value per prefix
