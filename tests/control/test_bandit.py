"""The sigmoid bandit: the worked example, formulas by enumeration and autograd, the environment."""

from __future__ import annotations

from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env

from tokenrl.control.worlds import bandit
from tokenrl.core import Estimator
from tokenrl.errors import Refused

THETAS = (-2.3, -1.0, 0.0, 0.7)
REWARDS = ((1.0, 0.0), (2.0, -0.5), (-1.0, 3.0), (1.5, 1.5))
CLOSE = {"rel": 1e-12, "abs": 1e-14}


def test_worked_example() -> None:
    assert float(bandit.probability(-1.0)) == pytest.approx(0.2689, abs=5e-5)
    assert float(bandit.gradient_sample(-1.0, 1)) == 0  # the second action earns nothing and teaches nothing
    assert float(bandit.score(-1.0, 0)) == pytest.approx(0.7311, abs=5e-5)
    theta = -1.0 + float(bandit.gradient_sample(-1.0, 0))
    assert theta == pytest.approx(-0.2689, abs=5e-5)
    assert float(bandit.probability(theta)) == pytest.approx(0.4332, abs=5e-5)
    assert float(bandit.gradient_sample(0.0, 0)) == 0.5
    assert float(bandit.probability(0.5)) == pytest.approx(0.622, abs=5e-4)


def test_signal_and_noise_at_zero() -> None:
    theta = torch.linspace(-4, 4, 801, dtype=torch.double)
    assert float(theta[bandit.expected_gradient(theta).argmax()]) == pytest.approx(0, abs=1e-12)
    assert float(bandit.expected_gradient(0.0)) == 0.25
    assert float(bandit.gradient_variance(0.0)) == 0.0625
    assert float(bandit.gradient_sd(0.0)) == 0.25
    assert float(bandit.standard_error(0.0, 100)) == pytest.approx(0.025, **CLOSE)
    noisiest = theta[bandit.gradient_sd(theta).argmax()]
    assert float(bandit.probability(noisiest)) == pytest.approx(0.25, abs=2e-3)


@pytest.mark.parametrize("action", [0, 1])
@pytest.mark.parametrize("theta", THETAS)
def test_score_is_the_derivative_of_the_logprob(theta: float, action: int) -> None:
    parameter = torch.tensor(theta, dtype=torch.double, requires_grad=True)
    chance = bandit.probability(parameter) if action == 0 else 1 - bandit.probability(parameter)
    (wanted,) = torch.autograd.grad(chance.log(), parameter)
    assert float(bandit.score(theta, action)) == pytest.approx(float(wanted), **CLOSE)
    assert float(bandit.gradient_sample(theta, action, (3.0, -2.0))) == pytest.approx(
        (3.0, -2.0)[action] * float(wanted), **CLOSE
    )


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize("theta", THETAS)
def test_expected_gradient_is_the_derivative_of_the_expected_return(theta: float, rewards: tuple) -> None:
    parameter = torch.tensor(theta, dtype=torch.double, requires_grad=True)
    s = bandit.probability(parameter)
    (wanted,) = torch.autograd.grad(7 * (rewards[0] * s + rewards[1] * (1 - s)), parameter)
    assert float(bandit.expected_gradient(theta, 7, rewards)) == pytest.approx(float(wanted), **CLOSE)


def moments_by_enumeration(
    theta: float, steps: int, rewards: tuple, returns: str, baseline: str
) -> tuple[float, float]:
    """Mean and variance of g, in plain Python over all 2^T episodes."""
    s = float(bandit.probability(theta))
    mean_reward = s * rewards[0] + (1 - s) * rewards[1]
    first = second = 0.0
    for actions in product((0, 1), repeat=steps):
        chance, g = 1.0, 0.0
        for t, action in enumerate(actions):
            chance *= (s, 1 - s)[action]
            since = t if returns == "reward_to_go" else 0
            paid = sum(rewards[a] for a in actions[since:])
            b = mean_reward * (steps - since) if baseline == "mean" else 0.0
            g += (paid - b) * (1 - s, -s)[action]
        first, second = first + chance * g, second + chance * g * g
    return first, second - first**2


@pytest.mark.parametrize("baseline", ["none", "mean"])
@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_variance_is_that_of_all_episodes(steps: int, returns: str, baseline: str) -> None:
    for theta, rewards in product(THETAS, REWARDS):
        mean, variance = moments_by_enumeration(theta, steps, rewards, returns, baseline)
        settings = {"returns": returns, "baseline": baseline}
        found = bandit.gradient_variance(theta, steps, rewards, **settings)
        assert float(found) == pytest.approx(variance, rel=1e-10, abs=1e-10)
        assert float(bandit.expected_gradient(theta, steps, rewards)) == pytest.approx(
            mean, rel=1e-10, abs=1e-10
        )


def test_powers_of_the_horizon() -> None:
    """In the limit T^3 without a baseline and T^2 with; the reward to go has a third, and a quarter."""

    def variance(steps: int, returns: str, baseline: str) -> float:
        return float(bandit.gradient_variance(-1.0, steps, returns=returns, baseline=baseline))

    long = 100_000
    for baseline, power, share in (("none", 3, 1 / 3), ("mean", 2, 1 / 4)):
        for returns in ("total", "reward_to_go"):
            growth = variance(2 * long, returns, baseline) / variance(long, returns, baseline)
            assert growth == pytest.approx(2**power, rel=1e-3)
        ratio = variance(long, "reward_to_go", baseline) / variance(long, "total", baseline)
        assert ratio == pytest.approx(share, rel=1e-3)
    square = float(bandit.expected_gradient(-1.0, long)) ** 2
    assert variance(long, "total", "mean") / square == pytest.approx(2, rel=1e-3)
    assert variance(long, "reward_to_go", "mean") / square == pytest.approx(0.5, rel=1e-3)


def test_functions_take_many_thetas() -> None:
    thetas = torch.tensor(THETAS)
    each = torch.stack([bandit.gradient_variance(float(t), 5, returns="reward_to_go") for t in thetas])
    torch.testing.assert_close(bandit.gradient_variance(thetas, 5, returns="reward_to_go"), each)
    actions = torch.tensor([0, 1, 1, 0])
    each = torch.stack(
        [bandit.gradient_sample(float(t), int(a)) for t, a in zip(thetas, actions, strict=True)]
    )
    torch.testing.assert_close(bandit.gradient_sample(thetas, actions), each)
    assert each.dtype == torch.double


@pytest.mark.parametrize("actions", [[0], [1], [0, 1, 1, 0, 1]])
def test_reinforce_gives_the_samples_mean(actions: list[int]) -> None:
    theta, rewards, e = torch.tensor(0.4, dtype=torch.double), (2.0, -1.0), Estimator.preset("reinforce")
    theta.requires_grad_()
    taken, mask = torch.tensor(actions), torch.ones(len(actions), 1).double()
    earned = torch.tensor([rewards[a] for a in actions], dtype=torch.double)
    s = bandit.probability(theta)
    logprobs = torch.where(taken == 0, s.log(), (1 - s).log())[:, None]
    advantages = e.advantages(earned, mask, group_size=None).policy
    (found,) = torch.autograd.grad(
        e.loss(logprobs, advantages, e.token_weights(mask, max_length=None), mask), theta
    )
    wanted = bandit.gradient_sample(0.4, taken, rewards).mean()
    assert -float(found) == pytest.approx(float(wanted), **CLOSE)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.filterwarnings("error")
def test_gymnasium_accepts_the_environment(steps: int) -> None:
    environment = bandit.Bandit(steps=steps)
    check_env(environment, skip_render_check=True)
    assert environment.action_space.n == 2


def test_an_episode() -> None:
    environment = bandit.Bandit(rewards=(2, -0.5), steps=3)
    with pytest.raises(ResetNeeded):
        environment.step(np.int64(0))
    for _ in range(2):
        observation, info = environment.reset(seed=1)
        assert observation.tolist() == [1.0] and observation.dtype == np.float32 and info == {}
        rows = [environment.step(np.int64(a)) for a in (0, 1, 0)]
        assert [row[1] for row in rows] == [2.0, -0.5, 2.0]
        assert [row[2] for row in rows] == [False, False, True]
        assert not any(row[3] for row in rows)
        assert all(row[0].tolist() == [1.0] for row in rows)
        with pytest.raises(ResetNeeded):
            environment.step(np.int64(0))


def test_one_action_ends_the_default_episode_in_a_vector_too() -> None:
    both = gymnasium.vector.SyncVectorEnv([bandit.Bandit, bandit.Bandit])
    both.reset(seed=0)
    _, rewards, terminated, truncated, _ = both.step(np.array([0, 1]))
    assert rewards.tolist() == [1.0, 0.0]
    assert terminated.all() and not truncated.any()


def test_an_action_that_does_not_exist() -> None:
    environment = bandit.Bandit()
    environment.reset()
    with pytest.raises(InvalidAction, match="knows 0 and 1"):
        environment.step(np.int64(2))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rewards": (1.0,)}, "two actions"),
        ({"rewards": (1.0, float("nan"))}, "finite"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps"),
    ],
)
def test_what_the_bandit_refuses(settings: dict, word: str) -> None:
    with pytest.raises(Refused, match=word):
        bandit.Bandit(**settings)


def test_what_the_variance_refuses() -> None:
    with pytest.raises(Refused, match="reward_to_go"):
        bandit.gradient_variance(0.0, returns="to_go")
    with pytest.raises(Refused, match="baseline"):
        bandit.gradient_variance(0.0, baseline="rloo")
