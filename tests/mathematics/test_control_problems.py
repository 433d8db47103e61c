"""Every trajectory of a control problem: the objective that each return, baseline and bootstrap ascends."""

from __future__ import annotations

import doctest
from math import comb

import pytest
import torch

import tokenrl.lab.exact.discounting as discounting
from tokenrl.core import Estimator
from tokenrl.lab import exact_moments, problem_of_mdp, random_mdp, which_objective
from tokenrl.lab.exact.control_problem import TabularMdp, all_trajectories, expected_rewards
from tokenrl.lab.exact.problems import Problem, tabular_problem
from tokenrl.lab.exact.report import print_objectives

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
TO_GO = {"returns": "reward_to_go"}
VALUE = {**TO_GO, "baseline": "value"}
GAE = {"baseline": "value", "returns": "gae", "lam": 0.5}


def value_by_recursion(mdp: TabularMdp, steps: int, gamma: float, logits: torch.Tensor) -> torch.Tensor:
    """V of the first state with `steps` left, by the Bellman equation and no trajectory [S]."""
    value = torch.zeros(len(mdp.start) + 1).double()
    for _ in range(steps):
        action_values = (mdp.transitions * (mdp.rewards + gamma * value)).sum(-1)  # [S, A]
        value = torch.nn.functional.pad((logits.softmax(-1) * action_values).sum(-1), (0, 1))
    return value[:-1]


def test_every_trajectory_is_listed_and_lengths_and_states_recur() -> None:
    mdp = random_mdp(1)
    every, problem = all_trajectories(mdp, 3), problem_of_mdp(mdp)
    assert every.mask.sum(-1).long().bincount().tolist() == [0, 2, 6, 72]
    rows = torch.cat([every.states, every.actions, every.successors, every.mask.long()], 1)
    assert len(rows.unique(dim=0)) == 80
    torch.testing.assert_close(problem.chances.sum(), torch.ones(()).double(), rtol=1e-14, atol=0)
    assert torch.equal(problem.truncated, every.last < 2) and 0 < problem.truncated.sum() < 72
    assert problem.scores.shape == (1, 80, 3, 4)  # one row of logits per state, the same at all times
    again = (every.states[:, 0] == every.states[:, 1]) & (every.mask[:, 1] > 0)
    same = again & (every.actions[:, 0] == every.actions[:, 1])
    assert same.any() and torch.equal(problem.scores[0, same, 0], problem.scores[0, same, 1])
    assert (problem.chances[0, every.mask.sum(-1) < 3].sum() > 0.1).all()


def test_the_environment_is_in_the_chance_and_not_in_the_score() -> None:
    problem = problem_of_mdp(random_mdp(2))
    per_step = torch.einsum("pm,pmtd->td", problem.chances, problem.scores)
    assert per_step.abs().max() < 1e-15
    policy = problem.logprobs.sum(-1).exp()
    torch.testing.assert_close(problem.chances / policy, problem.environment, **CLOSE)
    assert (problem.environment < 0.8).all()


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("beyond", [0, 2])
def test_the_gradient_is_that_of_the_bellman_equation(gamma: float, beyond: int) -> None:
    """By autograd through the recursion; after a cut the value of the state there is held fixed."""
    mdp = random_mdp(3)
    problem = problem_of_mdp(mdp, steps=2, beyond=beyond)
    fixed = torch.nn.functional.pad(value_by_recursion(mdp, beyond, gamma, mdp.logits), (0, 1))

    def objective(logits: torch.Tensor) -> torch.Tensor:
        value = fixed
        for _ in range(2):
            action_values = (mdp.transitions * (mdp.rewards + gamma * value)).sum(-1)
            value = torch.nn.functional.pad((logits.softmax(-1) * action_values).sum(-1), (0, 1))
        return mdp.start @ value[:-1]

    wanted = torch.func.grad(objective)(mdp.logits).flatten()
    torch.testing.assert_close(problem.gradient(gamma=gamma)[0], wanted, **CLOSE)
    j = (problem.chances * problem.returns(gamma)).sum()
    torch.testing.assert_close(j, objective(mdp.logits), **CLOSE)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_true_values_are_conditional_means_and_those_of_the_recursion(gamma: float) -> None:
    mdp = random_mdp(4)
    problem = problem_of_mdp(mdp, steps=2, beyond=1, critic="true", gamma=gamma)
    every = all_trajectories(mdp, 2)
    for t in range(2):
        wanted = value_by_recursion(mdp, 3 - t, gamma, mdp.logits)[every.states[:, t]] * every.mask[:, t]
        torch.testing.assert_close(problem.values[0, :, t], wanted, **CLOSE)
    assert problem.bootstrap is not None and (problem.bootstrap[0, ~problem.truncated] == 0).all()
    to_go = problem.rewards[0, :, 1] + gamma * problem.bootstrap[0]
    for state in range(2):
        here = (every.states[:, 1] == state) & (every.mask[:, 1] > 0)
        weight = problem.chances[0, here]
        mean = (weight @ to_go[here]) / weight.sum()
        torch.testing.assert_close(problem.values[0, here, 1], mean.expand(int(here.sum())), **CLOSE)
    ahead = expected_rewards(mdp, 1)
    torch.testing.assert_close(problem.after[0, :, 0], ahead[every.last, 0], **CLOSE)


def test_discounted_returns_of_token_problems() -> None:
    for kind in ("dense", "graded"):
        problem = tabular_problem(3, prompts=2, rewards=kind)
        torch.testing.assert_close(problem.returns(), problem.totals, **CLOSE)
        found = exact_moments(Estimator(gamma=0.6), problem, group_size=2)
        torch.testing.assert_close(found.mean, problem.gradient(gamma=0.6), **CLOSE)
        assert found.relative_bias > 0.01


@pytest.mark.parametrize("seed", [2, 5, 7])
@pytest.mark.parametrize(
    ("fields", "world", "ascends", "status"),
    [
        ({}, {}, "J_1", "exact"),
        ({"gamma": 0.9}, {}, "J_gamma", "exact"),
        (TO_GO, {}, "J_1", "exact"),
        ({**TO_GO, "gamma": 0.9}, {}, "neither", "biased"),
        ({"returns": "blame_window", "window": 3}, {}, "J_1", "exact"),
        ({"returns": "blame_window", "window": 2}, {}, "neither", "biased"),
        ({"returns": "blame_window", "window": 3, "gamma": 0.9}, {}, "neither", "biased"),
        (GAE, {"critic": "true"}, "J_1", "exact"),
        (GAE, {}, "neither", "biased"),
        ({**GAE, "gamma": 0.9}, {"critic": "true"}, "neither", "biased"),
        ({**GAE, "lam": 1.0}, {}, "J_1", "exact"),
        (VALUE, {}, "J_1", "exact"),
        ({**VALUE, "gamma": 0.9, "returns": "total"}, {}, "J_gamma", "exact"),
        ({**TO_GO, "baseline": "running_mean"}, {}, "J_1", "exact"),
        ({**TO_GO, "baseline": "batch_mean"}, {}, "J_1", "exact_up_to_scale"),
        ({"gamma": 0.9, "baseline": "batch_mean"}, {}, "J_gamma", "exact_up_to_scale"),
        ({**TO_GO, "baseline": "timestep_mean"}, {}, "J_1", "exact"),
        ({"gamma": 0.9, "baseline": "timestep_mean"}, {}, "J_gamma", "exact"),
        ({**TO_GO, "baseline": "timestep_mean", "leave_one_out": False}, {}, "neither", "biased"),
        ({**TO_GO, "baseline": "episode_mean"}, {}, "neither", "biased"),
        (
            {**TO_GO, "baseline": "episode_mean", "scale": "episode_std", "gamma": 0.99},
            {},
            "neither",
            "biased",
        ),
        (VALUE, {"critic": "true", "steps": 2, "beyond": 2}, "J_1", "exact"),
        (GAE, {"critic": "true", "steps": 2, "beyond": 2}, "J_1", "exact"),
        ({"gamma": 0.9}, {"critic": "true", "steps": 2, "beyond": 2}, "J_gamma", "exact"),
        (VALUE, {"steps": 2, "beyond": 2}, "neither", "biased"),
        (VALUE, {"steps": 2, "beyond": 2, "bootstrap": False}, "neither", "biased"),
    ],
    ids=str,
)
def test_whose_gradient_it_is(fields: dict, world: dict, ascends: str, status: str, seed: int) -> None:
    e = Estimator(**fields)
    found = which_objective(e, problem_of_mdp(random_mdp(seed, one_start=True), gamma=e.gamma, **world))
    assert found.ascends == ascends
    match = found.discounted if ascends == "J_gamma" else found.undiscounted
    assert match.status == status and (match.relative_bias < 1e-10) == (status == "exact")
    if ascends == "J_gamma":
        assert found.undiscounted.status == "biased" and found.undiscounted.relative_bias > 0.01
    if status == "exact_up_to_scale":
        assert match.scale == pytest.approx(0.5, rel=1e-10)


def long_problem(seed: int) -> tuple[TabularMdp, Problem]:
    mdp = random_mdp(seed)
    return mdp, problem_of_mdp(mdp, steps=4)


def test_a_bootstrap_by_the_true_value_gives_the_whole_return_through_the_actions_seen() -> None:
    """The part of the four-step gradient that its first two scores make, from two steps and V^pi."""
    mdp, whole = long_problem(6)
    worth = whole.chances * whole.totals
    parts = torch.einsum("pm,pmtd->td", worth, whole.scores)
    for fields in (TO_GO, GAE, VALUE, {**TO_GO, "baseline": "timestep_mean"}):
        cut = problem_of_mdp(mdp, steps=2, beyond=2, critic="true")
        found = exact_moments(Estimator(**fields), cut).mean[0]
        torch.testing.assert_close(found, parts[:2].sum(0), **CLOSE)
    assert (parts[2:].sum(0).norm() / parts.sum(0).norm()) > 0.05


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_gae_by_the_true_value_is_discounted_reward_to_go_in_the_mean(lam: float) -> None:
    """So lam does not matter there, and the bias of leaving out gamma^t stays."""
    gamma = 0.8
    problem = problem_of_mdp(random_mdp(2), critic="true", gamma=gamma)
    found = exact_moments(Estimator(baseline="value", returns="gae", lam=lam, gamma=gamma), problem)
    plain = exact_moments(Estimator(baseline="none", gamma=gamma, **TO_GO), problem)
    torch.testing.assert_close(found.mean, plain.mean, **CLOSE)
    assert plain.relative_bias > 0.01


@pytest.mark.parametrize(("all_of", "size"), [(False, 2), (False, 3), (True, 2), (True, 3)])
def test_a_timestep_mean_of_the_others_is_exact_though_lengths_differ(all_of: bool, size: int) -> None:
    """With the row inside, step t counts E[1 - 1/n_t], n_t - 1 ~ Binomial(G - 1, P(alive at t))."""
    problem = problem_of_mdp(random_mdp(5, one_start=True), steps=2 if size == 3 else 3)
    estimator = Estimator(baseline="timestep_mean", leave_one_out=not all_of, **TO_GO)
    found = exact_moments(estimator, problem, group_size=size)
    to_go = problem.rewards.flip(-1).cumsum(-1).flip(-1)[0]
    parts = torch.einsum("m,mt,mtd->td", problem.chances[0], to_go, problem.scores[0])
    wanted = torch.zeros(4).double()
    for t, part in enumerate(parts):
        alive = float(problem.chances[0] @ problem.mask[:, t])
        factor = sum(
            comb(size - 1, k) * alive**k * (1 - alive) ** (size - 1 - k) * (1 - 1 / (k + 1))
            for k in range(size)
        )
        wanted += (factor if all_of else 1.0) * part
    torch.testing.assert_close(found.mean[0], wanted, **CLOSE)
    assert (found.relative_bias < 1e-10) == (not all_of) and (found.cosine < 1 - 1e-7) == all_of


@pytest.mark.parametrize("seed", [2, 5])
def test_an_episode_mean_counts_early_rewards_and_not_the_last(seed: int) -> None:
    """E[sum_t s_t (G_t - mean_u G_u)] = grad E[sum_u (1 - u/L) r_u], u = 1..L: one mean a row."""
    problem = problem_of_mdp(random_mdp(seed, one_start=True))
    found = exact_moments(Estimator(baseline="episode_mean", **TO_GO), problem)
    share = 1 - torch.arange(1, 4) / problem.mask.sum(-1, keepdim=True)  # [M, T]
    worth = (problem.rewards[0] * share * problem.mask).sum(-1)
    wanted = torch.einsum("m,mtd->d", problem.chances[0] * worth, problem.scores[0])
    torch.testing.assert_close(found.mean[0], wanted, **CLOSE)
    assert found.cosine < 0.9999


def test_an_episode_mean_halves_the_gradient_where_every_step_is_paid_the_same() -> None:
    """CartPole's case. Discounting and the division by the episode's spread end it."""
    mdp = random_mdp(4)
    alike = problem_of_mdp(mdp._replace(rewards=torch.ones_like(mdp.rewards)))
    found = exact_moments(Estimator(baseline="episode_mean", **TO_GO), alike)
    torch.testing.assert_close(found.mean, alike.gradient() / 2, **CLOSE)
    for more in ({"gamma": 0.9}, {"scale": "episode_std"}):
        other = which_objective(Estimator(baseline="episode_mean", **TO_GO, **more), alike)
        assert other.ascends == "neither" and other.undiscounted.cosine < 1 - 1e-8


def asymmetry(fields: dict, seed: int) -> float:
    """|D - D'| / |D| for the Jacobian D of the expected gradient: 0 for the gradient of any objective."""
    mdp, estimator = random_mdp(seed, one_start=True), Estimator(**fields)

    def field(move: torch.Tensor) -> torch.Tensor:
        moved = mdp._replace(logits=mdp.logits + move.reshape(2, 2))
        return exact_moments(estimator, problem_of_mdp(moved)).mean[0]

    steps = 1e-5 * torch.eye(4).double()
    jacobian = torch.stack([(field(x) - field(-x)) / 2e-5 for x in steps])
    return float((jacobian - jacobian.T).norm() / jacobian.norm())


@pytest.mark.parametrize(
    ("fields", "some"),
    [
        ({}, True),
        ({"gamma": 0.9}, True),
        ({**TO_GO, "baseline": "episode_mean"}, True),
        ({**TO_GO, "gamma": 0.9}, False),
        ({"returns": "blame_window", "window": 2}, False),
        ({**TO_GO, "scale": "episode_std"}, False),
        ({**TO_GO, "baseline": "episode_mean", "scale": "episode_std", "gamma": 0.99}, False),
        (GAE, False),
    ],
    ids=str,
)
def test_what_is_said_to_be_the_gradient_of_no_objective_has_a_curl(fields: dict, some: bool) -> None:
    assert (asymmetry(fields, 2) < 1e-7) == some and (some or asymmetry(fields, 2) > 0.03)
    if not some:
        assert Estimator(**fields).bias_status == "biased"


def test_groups_equal_in_rewards_and_not_in_what_follows_have_a_gradient() -> None:
    """What is declared of dropping them supposes that nothing follows a truncation."""
    mdp = random_mdp(2)
    alike = mdp._replace(rewards=torch.ones_like(mdp.rewards))
    drop = Estimator(zero_spread="drop")
    assert drop.bias_status == "exact_per_prompt"
    whole = problem_of_mdp(alike, steps=2)
    cut = problem_of_mdp(alike, steps=2, beyond=2, critic="true")
    assert which_objective(drop, whole).undiscounted.cosine > 1 - 1e-12
    assert which_objective(drop, cut).undiscounted.relative_bias > 0.05
    assert which_objective(Estimator(), cut).undiscounted.status == "exact"


def test_the_table_and_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    print_objectives()
    lines = capsys.readouterr().out.splitlines()
    rows = {line[2:44].strip(): line.split()[-1] for line in lines if line[:3].strip() and "  " in line[3:]}
    assert rows["total, discounted"] == "J_gamma" and rows["reward to go, discounted"] == "neither"
    assert rows["to go, episode mean, reward 1 per step"] == "J_1" and rows["cut, V^pi follows"] == "J_1"
    assert set(discounting.ROWS) <= set(rows)
    done = doctest.testmod(discounting)
    assert done.attempted >= 4 and done.failed == 0
