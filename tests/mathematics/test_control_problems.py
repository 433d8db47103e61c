"""Every trajectory of a control problem: its gradient, and which estimators ascend no objective."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.lab import exact_moments, problem_of_mdp, random_mdp

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


@pytest.mark.parametrize("beyond", [0, 2])
def test_the_gradient_is_that_of_the_bellman_equation(beyond: int):
    """By autograd through the recursion; after a cut the value of the state there is held fixed."""
    mdp = random_mdp(3)
    problem = problem_of_mdp(mdp, steps=2, beyond=beyond)

    def backed_up(value: torch.Tensor, steps: int, logits: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            action_values = (mdp.transitions * (mdp.rewards + value)).sum(-1)  # [S, A]
            value = torch.nn.functional.pad((logits.softmax(-1) * action_values).sum(-1), (0, 1))
        return value

    fixed = backed_up(torch.zeros(3).double(), beyond, mdp.logits)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return mdp.start @ backed_up(fixed, 2, logits)[:-1]

    wanted = torch.func.grad(objective)(mdp.logits).flatten()
    assert_close(problem.gradient()[0], wanted, **CLOSE)
    j = (problem.chances * problem.returns).sum()
    assert_close(j, objective(mdp.logits), **CLOSE)


def asymmetry(changes: str, seed: int) -> float:
    """|D - D'| / |D| for the Jacobian D of the expected gradient: 0 for the gradient of any objective."""
    mdp, estimator = random_mdp(seed, one_start=True), Estimator.preset(changes)

    def field(move: torch.Tensor) -> torch.Tensor:
        moved = mdp._replace(logits=mdp.logits + move.reshape(2, 2))
        return exact_moments(estimator, problem_of_mdp(moved)).mean[0]

    steps = 1e-5 * torch.eye(4).double()
    jacobian = torch.stack([(field(x) - field(-x)) / 2e-5 for x in steps])
    return float((jacobian - jacobian.T).norm() / jacobian.norm())


@pytest.mark.parametrize(
    ("changes", "symmetric"),
    [
        ("gamma=0.9", True),
        ("returns=reward_to_go,baseline=batch_mean", True),
        ("returns=reward_to_go,baseline=episode_mean", True),  # of a return with other weights
        ("returns=reward_to_go,gamma=0.9", False),
        ("returns=blame_window,window=2", False),
        ("baseline=value,returns=gae,lam=0.5", False),
        ("returns=reward_to_go,scale=episode_std", False),
        ("baseline=value,returns=episode_normalized", False),
    ],
)
def test_what_is_said_to_be_the_gradient_of_no_objective_has_a_curl(changes: str, symmetric: bool):
    assert (asymmetry(changes, 2) < 1e-7) == symmetric
