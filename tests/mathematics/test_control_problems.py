"""Every trajectory of a control problem: the objective that each return, baseline and bootstrap ascends."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch.testing import assert_close

import tokenrl.lab.exact.discounting as discounting
from tokenrl.core import Estimator
from tokenrl.core.presets import read_changes
from tokenrl.lab import exact_moments, problem_of_mdp, random_mdp, which_objective
from tokenrl.lab.exact.discounting import ROWS
from tokenrl.lab.exact.report import print_objectives

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
TO_GO = {"returns": "reward_to_go"}


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("beyond", [0, 2])
def test_the_gradient_is_that_of_the_bellman_equation(gamma: float, beyond: int):
    """By autograd through the recursion; after a cut the value of the state there is held fixed."""
    mdp = random_mdp(3)
    problem = problem_of_mdp(mdp, steps=2, beyond=beyond)

    def backed_up(value: torch.Tensor, steps: int, logits: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            action_values = (mdp.transitions * (mdp.rewards + gamma * value)).sum(-1)  # [S, A]
            value = torch.nn.functional.pad((logits.softmax(-1) * action_values).sum(-1), (0, 1))
        return value

    fixed = backed_up(torch.zeros(3).double(), beyond, mdp.logits)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return mdp.start @ backed_up(fixed, 2, logits)[:-1]

    wanted = torch.func.grad(objective)(mdp.logits).flatten()
    assert_close(problem.gradient(gamma=gamma)[0], wanted, **CLOSE)
    j = (problem.chances * problem.returns(gamma)).sum()
    assert_close(j, objective(mdp.logits), **CLOSE)


ASCENDS = {
    "J_gamma": (
        "total, discounted",
        "total, batch mean, discounted",
        "cut, total, V^pi follows, discounted",
    ),
    "neither": (
        "reward to go, discounted",
        "blame window shorter",
        "GAE lam 0.5, any V",
        "GAE lam 0.5, V^pi, discounted",
        "to go, timestep mean of all (of 2 here)",
        "to go, episode mean",
        "to go, episode mean and std",
        "to go, episode mean and std, reward 1",
        "episode normalised, then V",
        "cut, any V follows",
        "cut, taken for an end",
    ),
}
"""Of the rows of the lab's table; all others ascend the return itself."""
HALF = ("batch mean", "reward 1 per step")


@pytest.mark.parametrize("seed", [2, 5, 7])
@pytest.mark.parametrize("name", ROWS)
def test_whose_gradient_it_is(name: str, seed: int):
    (changes, options), mdp = ROWS[name], random_mdp(seed, one_start=True)
    ascends = next((which for which, names in ASCENDS.items() if name in names), "J_1")
    world = read_changes(options)[1] if options else {}
    if "reward" in world:
        mdp = mdp._replace(rewards=torch.full_like(mdp.rewards, world.pop("reward")))
    e = Estimator.preset(changes)
    found = which_objective(e, problem_of_mdp(mdp, gamma=e.gamma, **world))
    assert found.ascends == ascends
    match = found.discounted if ascends == "J_gamma" else found.undiscounted
    scale = 0.5 if any(words in name for words in HALF) else 1.0
    if ascends == "neither":
        assert match.status == "biased" and match.cosine < 1 - 1e-8
    else:
        assert match.cosine > 1 - 1e-12 and match.scale == pytest.approx(scale, rel=1e-10)
    if ascends == "J_gamma":
        assert found.undiscounted.status == "biased" and found.undiscounted.relative_bias > 0.01


def asymmetry(changes: str, seed: int) -> float:
    """|D - D'| / |D| for the Jacobian D of the expected gradient: 0 for the gradient of any objective."""
    mdp, estimator = random_mdp(seed, one_start=True), Estimator.preset(changes)

    def field(move: torch.Tensor) -> torch.Tensor:
        moved = mdp._replace(logits=mdp.logits + move.reshape(2, 2))
        return exact_moments(estimator, problem_of_mdp(moved)).mean[0]

    steps = 1e-5 * torch.eye(4).double()
    jacobian = torch.stack([(field(x) - field(-x)) / 2e-5 for x in steps])
    return float((jacobian - jacobian.T).norm() / jacobian.norm())


@pytest.mark.parametrize("name", [*ROWS, "episode std"])
def test_what_is_said_to_be_the_gradient_of_no_objective_has_a_curl(name: str):
    """But for the episode's mean, which ascends a return of other weights."""
    changes, world = ROWS.get(name, ("returns=reward_to_go,scale=episode_std", ""))
    if not world:
        some = name == "to go, episode mean" or name not in (*ASCENDS["neither"], "episode std")
        assert (asymmetry(changes, 2) < 1e-7) == some, asymmetry(changes, 2)


def test_the_table_and_the_example(capsys: pytest.CaptureFixture[str]):
    print_objectives()
    lines = capsys.readouterr().out.splitlines()
    rows = {
        line[2:44].strip(): line.split()[-1]
        for line in lines
        if line[:3].strip() and "  " in line[3:]
    }
    assert rows["total, discounted"] == "J_gamma" and set(ROWS) <= set(rows)
    done = doctest.testmod(discounting)
    assert done.attempted >= 4 and done.failed == 0
