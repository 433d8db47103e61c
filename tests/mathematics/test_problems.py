"""The lab lists all completions, and its derivatives are right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from drawing import normals, seeded
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.lab.exact.enumeration import exact_moments
from tokenrl.lab.exact.problems import all_completions, some_completions, tabular_problem


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


@pytest.mark.parametrize("length", [3, 4])
def test_a_masked_policy_writes_the_rows_alone_and_its_gradient_is_that_of_the_objective(
    length: int,
):
    """By autograd over lists of the tokens that some row goes on with, also for KL, entropy and their slopes."""
    rows = some_completions(1, 3, length)
    problem = tabular_problem(3, length=length, rows=rows)
    texts = [tuple(x[m > 0].tolist()) for x, m in zip(rows.ids, rows.mask, strict=True)]
    assert len({*texts}) == len(texts) == 2 ** (length - 1) and all(text[-1] == 0 for text in texts)
    logits, reference, _ = normals(seeded(3), 3, 1, len(rows.prefixes), 3)
    logits.requires_grad_()
    tables = {}
    for prefix in {text[:t] for text in texts for t in range(len(text))}:
        tokens = sorted(
            {x[len(prefix)] for x in texts if len(x) > len(prefix) and x[: len(prefix)] == prefix}
        )
        number = rows.prefixes.index(prefix)
        both = [z[0, number, tokens].log_softmax(-1) for z in (logits, reference)]
        tables[prefix] = (tokens, *both)
    assert any(len(tokens) == 1 for tokens, *_ in tables.values())
    objective, entropies, divergences = 0.0, 0.0, 0.0
    for m, text in enumerate(texts):
        pairs = []
        for t, token in enumerate(text):
            tokens, log_pi, log_ref = tables[text[:t]]
            pairs.append([x[tokens.index(token)] for x in (log_pi, log_ref)])
            entropy, divergence = (
                -(log_pi.exp() * log_pi).sum(),
                (log_pi.exp() * (log_pi - log_ref)).sum(),
            )
            assert_close(problem.entropy[0, m, t], entropy.detach())
            assert_close(problem.token_kl[0, m, t], divergence.detach())
            entropies, divergences = entropies + entropy, divergences + divergence
        log_pi, log_ref = map(sum, zip(*pairs, strict=True))
        assert_close(problem.chances[0, m], log_pi.exp().detach())
        worth = problem.totals[0, m] - 0.3 * (log_pi - log_ref) - 0.7 * log_pi
        objective = objective + log_pi.exp() * worth
    assert float(problem.chances.sum()) == pytest.approx(1, abs=1e-14)
    for total, gradient in (
        (objective, problem.gradient(beta=0.3, entropy_coef=0.7)),
        (entropies, problem.entropy_slopes.sum((1, 2))),
        (divergences, problem.kl_slopes.sum((1, 2))),
    ):
        (wanted,) = torch.autograd.grad(total, logits, retain_graph=True)
        assert_close(gradient[0], wanted.flatten(), rtol=1e-10, atol=1e-12)


def test_a_masked_policy_that_is_scored_without_its_mask_is_biased_and_with_it_exact():
    rows = some_completions(1, 3, 3)
    masked = tabular_problem(3, rows=rows)
    every = all_completions(3, 3)
    whole = tabular_problem(3)
    index = [every.ids.tolist().index(ids) for ids in rows.ids.tolist()]
    unmasked = replace(masked, scores=whole.scores[:, index])
    estimator = Estimator.preset("rloo")
    assert exact_moments(estimator, masked).status == "exact"
    moments = replace(exact_moments(estimator, unmasked), target=masked.gradient())
    assert moments.status == "biased" and moments.relative_bias > 0.1
