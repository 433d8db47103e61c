"""What the expected gradient of each choice is, as a formula, by summing over every group in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.core.rows import overlong_penalty
from tokenrl.lab import Problem, exact_moments, tabular_problem

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def mean_of(fields: dict, problem: Problem, size: int) -> torch.Tensor:
    return exact_moments(Estimator(**fields), problem, group_size=size).mean


def ascent_by_token(problem: Problem, worth: torch.Tensor) -> torch.Tensor:
    """E[sum_t worth_t grad log pi_t] with worth [P, M, T]."""
    return torch.einsum("pm,pmt,pmtd->pd", problem.chances, worth, problem.scores) / len(worth)


def to_go(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


# KL and entropy


def step_kl(problem: Problem) -> torch.Tensor:
    """The log ratio of each listed token [P, M, T]."""
    return problem.logprobs - problem.ref_logprobs


@pytest.mark.parametrize("beta", [0.02, 1.5])
def test_the_gradient_of_a_kl_in_the_loss(beta: float):
    """Of k2 it is E[sum_t l_t s_t]: the KL of each step with its prefix held fixed; of k1 nothing."""
    problem = tabular_problem(12)
    plain, ratio = problem.gradient(), step_kl(problem)
    wanted = {
        "k1": plain,
        "k2": plain - beta * ascent_by_token(problem, ratio),
        # the forward KL of each step: its gradient is minus that of log pi under the reference
        "k3": plain - beta * ascent_by_token(problem, 1 - (-ratio).exp()),
        "full_path": problem.gradient(beta=beta),
        "k2_sequence": problem.gradient(beta=beta),
        # the KL of each step in closed form has the mean of k2
        "closed_form": plain - beta * ascent_by_token(problem, ratio),
        "closed_form_path": problem.gradient(beta=beta),
    }
    for name, gradient in wanted.items():
        fields = {"beta": beta, "kl_estimator": name, "kl_placement": "loss"}
        assert_close(mean_of(fields, problem, 2), gradient, **CLOSE)
        exact = name in ("full_path", "k2_sequence", "closed_form_path")
        assert ((gradient - problem.gradient(beta=beta)).norm() < 1e-12) == exact
        if name in ("k2", "full_path"):  # the KL of a step as the baseline changes no mean
            fields["kl_baseline"] = "closed_form"
            assert_close(mean_of(fields, problem, 2), gradient, **CLOSE)


def test_closed_forms_of_a_kl_have_the_noise_that_is_computed_by_hand():
    """The direction of a row, listed with every completion: its mean square gives E|g|^2."""
    problem = tabular_problem(14)
    problem = replace(problem, rewards=torch.zeros_like(problem.rewards))
    divergence, log_ratio = problem.token_kl[..., None], step_kl(problem)[..., None]
    to_later = to_go(problem.token_kl)[..., None] - divergence
    following = to_go(step_kl(problem))[..., None]
    directions = {
        ("closed_form", "none"): problem.kl_slopes,
        ("closed_form_path", "none"): problem.kl_slopes + to_later * problem.scores,
        ("k2", "none"): log_ratio * problem.scores,
        ("k2", "closed_form"): (log_ratio - divergence) * problem.scores,
        ("full_path", "closed_form"): (following - divergence) * problem.scores,
    }
    for (name, baseline), slopes in directions.items():
        estimator = Estimator(
            baseline="none",
            beta=1.0,
            kl_placement="loss",
            kl_estimator=name,
            kl_baseline=baseline,
        )
        moments = exact_moments(estimator, problem, group_size=1)
        lengths = slopes.sum(-2).square().sum(-1)  # [P, M]
        assert moments.second == pytest.approx(float((problem.chances * lengths).sum()))


# Rows that are left out


def spread_chances(problem: Problem, size: int) -> torch.Tensor:
    """The probability [P] that the rewards of a group, 0 or 1, are not all equal."""
    p = (problem.chances * problem.totals).sum(-1)
    return 1 - p**size - (1 - p) ** size


def test_dropped_and_refilled_groups_weigh_prompts():
    """Dropped: E[1/kept | it is kept], whatever the other does. Refilled: one number, 1/mean P(kept)."""
    problem = tabular_problem(11, prompts=2, vocabulary=2, rewards="binary")
    kept, target = spread_chances(problem, 2), problem.gradient()
    assert abs(float(kept[0] - kept[1])) > 0.05
    weights = kept.flip(0) / 2 + (1 - kept.flip(0))
    dropped, refilled = (mean_of({"zero_spread": what}, problem, 2) for what in ("drop", "refill"))
    assert_close(dropped, 2 * weights[:, None] * target, **CLOSE)
    assert_close(refilled, target / kept.mean(), **CLOSE)
    alone = tabular_problem(11, vocabulary=2, rewards="binary")
    assert_close(mean_of({"zero_spread": "drop"}, alone, 2), alone.gradient(), **CLOSE)


def test_a_long_row_is_penalised_before_the_baseline():
    penalty = overlong_penalty(torch.tensor([0, 6, 7, 8, 9, 10, 12]), 10, 4)
    assert penalty.tolist() == [0, 0, -0.25, -0.5, -0.75, -1, -1]
    e, mask = Estimator(overlong_buffer=2), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    got = e.advantages(torch.tensor([1.0, 3.0]), mask, group_size=2, max_length=4)
    assert got.policy.tolist() == [-3.0, 3.0] and got.returns.tolist() == [[0] * 4, [3, 3, 0, 0]]
