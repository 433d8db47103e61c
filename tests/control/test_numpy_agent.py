"""The agent without autodiff against autograd, against the estimator it claims to be, and at its task."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from tokenrl.control.numpy_agent import (
    Episode,
    NumpySettings,
    Weights,
    advantages_of,
    ascend,
    backward,
    forward,
    initial_weights,
    make,
    play,
    returns_of,
    train_numpy as train,
)
from tokenrl.core import Estimator, returns as core
from tokenrl.errors import Refused

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
STANDARDISED = {"baseline": "episode_mean", "scale": "episode_std", "scale_ddof": 0, "scale_eps": 1e-8}
VARIATIONS = {
    "usual": ({}, {**STANDARDISED, "returns": "reward_to_go", "gamma": 0.99}),
    "gamma": ({"gamma": 0.8}, {**STANDARDISED, "returns": "reward_to_go", "gamma": 0.8}),
    "window": ({"window": 3}, {**STANDARDISED, "returns": "blame_window", "window": 3, "gamma": 0.99}),
    "plain": ({"standardise": False}, {"baseline": "none", "returns": "reward_to_go", "gamma": 0.99}),
    "undiscounted": (
        {"standardise": False, "gamma": 1.0},
        {"baseline": "none", "returns": "reward_to_go"},
    ),
}


def drawn_weights(seed: int = 0, observations: int = 4, hidden: int = 100) -> Weights:
    """Weights with biases that are not 0, as they are after the first update."""
    generator = np.random.default_rng(seed)
    weights = initial_weights(observations, hidden, generator)
    return weights._replace(b1=generator.normal(size=hidden) / 3, b2=generator.normal(size=1))


def drawn_episodes(lengths: tuple[int, ...] = (7, 1, 12, 4, 9), observations: int = 4) -> list[Episode]:
    generator = np.random.default_rng(1)
    return [
        Episode(
            generator.normal(size=(t, observations)), generator.integers(2, size=t), generator.normal(size=t)
        )
        for t in lengths
    ]


def padded(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(part) for part in parts], batch_first=True)


def by_autograd(weights: Weights, episodes: list[Episode], estimator: Estimator) -> list[torch.Tensor]:
    """Gradient of minus the estimator's loss over a step of padded rows."""
    w1, b1, w2, b2 = parameters = [torch.tensor(part, requires_grad=True) for part in weights]
    observations, actions, rewards = (padded(list(part)) for part in zip(*episodes, strict=True))
    mask = padded([np.ones(len(e.actions)) for e in episodes])
    logits = torch.relu(observations @ w1.T + b1) @ w2 + b2
    logprobs = torch.distributions.Bernoulli(logits=logits).log_prob(actions.double())
    advantages = estimator.advantages(rewards, mask, group_size=None).policy
    token_weights = estimator.token_weights(mask, max_length=None)
    loss = estimator.loss(logprobs, advantages, token_weights, mask)
    return list(torch.autograd.grad(-loss, parameters))


@pytest.mark.parametrize("name", VARIATIONS)
def test_gradient_by_hand_is_autograds_of_the_estimator(name: str) -> None:
    changed, fields = VARIATIONS[name]
    settings, weights, episodes = replace(NumpySettings(), **changed), drawn_weights(), drawn_episodes()
    parts = [backward(weights, e, advantages_of(e.rewards, settings)) for e in episodes]
    found = [np.mean(part, axis=0) for part in zip(*parts, strict=True)]
    wanted = by_autograd(weights, episodes, Estimator(**fields))
    assert all(float(part.abs().max()) > 1e-3 for part in wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(mine), theirs, **CLOSE)


def test_the_estimator_it_claims_to_be_is_biased_and_the_plain_one_is_not() -> None:
    assert Estimator(**VARIATIONS["usual"][1]).bias_status == "biased"
    assert Estimator(**VARIATIONS["undiscounted"][1]).bias_status == "exact"


def test_advantages_have_mean_0_and_standard_deviation_1() -> None:
    found = advantages_of(np.ones(200), NumpySettings())
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert found.std() == pytest.approx(1, abs=1e-8)
    assert (np.diff(found) < 0).all()  # paid alike, the early are praised and the late blamed
    assert advantages_of(np.ones(1), NumpySettings()).tolist() == [0.0]


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.8, 0.0])
@pytest.mark.parametrize("window", [None, 1, 5, 50])
def test_returns_are_those_of_core(gamma: float, window: int | None) -> None:
    rewards = np.random.default_rng(2).normal(size=20)
    row = torch.tensor(rewards)[None]
    wanted = core.reward_to_go(row, gamma) if window is None else core.in_window(row, window, gamma)
    found = torch.tensor(returns_of(rewards, gamma, window))
    torch.testing.assert_close(found, wanted[0], **CLOSE)


def test_returns_by_hand() -> None:
    paid_at_the_end = np.eye(101)[100]
    assert returns_of(paid_at_the_end, 0.99)[0] == pytest.approx(0.366, abs=5e-4)  # 0.99^100 = 0.37
    assert returns_of(paid_at_the_end, 0.8)[0] < 1e-9
    rewards = np.array([1, 2, 4, 8])
    assert returns_of(rewards, 0.5).tolist() == [4, 6, 8, 8]
    assert returns_of(rewards, 1.0, window=2).tolist() == [3, 6, 12, 8]
    assert returns_of(rewards, 0.5, window=2).tolist() == [2, 4, 8, 8]
    assert rewards.tolist() == [1, 2, 4, 8]


def test_rmsprop_is_that_of_torch() -> None:
    settings, generator = NumpySettings(), np.random.default_rng(3)
    weights, squares = drawn_weights(), Weights(*map(np.zeros_like, drawn_weights()))
    parameters = [torch.tensor(part) for part in weights]
    optimizer = torch.optim.RMSprop(parameters, lr=1e-3, alpha=0.99, eps=1e-5, maximize=True)
    for size in (1.0, 1e-5, 3.0, 1e-6):  # also as small as epsilon, where its place shows
        gradient = Weights(*(size * generator.normal(size=part.shape) for part in weights))
        ascend(weights, gradient, squares, settings)
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = torch.tensor(part)
        optimizer.step()
    for mine, theirs in zip(weights, parameters, strict=True):
        torch.testing.assert_close(torch.tensor(mine), theirs, **CLOSE)
    tiny = Weights(*(np.full(1, 1e-6) for _ in weights))
    start = Weights(*(np.zeros(1) for _ in weights))
    ascend(start, tiny, Weights(*(np.zeros(1) for _ in weights)), settings)
    assert start.w1[0] == pytest.approx(1e-3 * 1e-6 / (1e-7 + 1e-5), rel=1e-12)


def test_probability_is_a_sigmoid_and_does_not_overflow() -> None:
    weights = Weights(np.array([[1.0], [-1.0]]), np.zeros(2), np.array([2.0, -3.0]), np.array([0.5]))
    hidden, probabilities = forward(weights, np.array([[1.0], [-1.0], [0.0], [1e4], [-1e4]]))
    assert hidden[:2].tolist() == [[1, 0], [0, 1]]
    assert probabilities[:3] == pytest.approx(1 / (1 + np.exp([-2.5, 2.5, -0.5])), rel=1e-12)
    assert probabilities[3:].tolist() == [1, 0]
    with np.errstate(over="raise"):
        forward(weights, np.array([1e5]))


def test_actions_are_drawn_with_their_probability() -> None:
    """On 40 episodes: the standard error of the mean difference is below 0.02, the bound is 4 of them."""
    env, weights, generator = make("CartPole-v1"), drawn_weights(4), np.random.default_rng(5)
    env.reset(seed=6)
    episodes = [play(env, weights, generator) for _ in range(40)]
    for episode in episodes:
        assert len(episode.observations) == len(episode.actions) == episode.rewards.sum()
        assert np.abs(episode.observations[0]).max() <= 0.05  # the first one seen is the one of reset
    actions = np.concatenate([e.actions for e in episodes])
    chances = np.concatenate([forward(weights, e.observations)[1] for e in episodes])
    assert len(actions) > 650
    assert abs((actions - chances).mean()) < 0.08
    assert not 0.45 < chances.mean() < 0.55  # else 1 - p would pass


def test_an_episode_ends_where_the_time_limit_cuts_it_off() -> None:
    import gymnasium

    still = Weights(np.zeros((1, 4)), np.zeros(1), np.zeros(1), np.zeros(1))
    env = gymnasium.make("CartPole-v1", max_episode_steps=5)
    env.reset(seed=0)
    assert len(play(env, still, np.random.default_rng(0)).rewards) == 5


def test_a_run_repeats_and_seeds_differ() -> None:
    def first(seed: int) -> list[np.ndarray]:
        return [e.observations for _, batch in islice(train(NumpySettings(seed=seed)), 3) for e in batch]

    once, again, other = first(0), first(0), first(1)
    assert len(once) == 15
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not np.array_equal(once[0][0], other[0][0])
    assert not np.array_equal(once[0][0], once[1][0])  # nor do the episodes of a run start alike


def test_an_update_is_made_of_the_mean_over_its_own_episodes() -> None:
    settings = NumpySettings(
        hidden=8, episodes_per_update=3, decay=0.0, epsilon=1.0
    )  # no memory, and size counts
    run = train(settings)
    wanted = Weights(*map(np.copy, next(run)[0]))
    found, episodes = next(run)
    parts = [backward(wanted, e, advantages_of(e.rewards, settings)) for e in episodes]
    gradient = Weights(*(np.mean(part, axis=0) for part in zip(*parts, strict=True)))
    ascend(wanted, gradient, Weights(*map(np.zeros_like, wanted)), settings)
    assert len(episodes) == 3
    for mine, part in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, part, rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"env": "CartPole-v99"}, "no environment .CartPole-v99"),
        ({"env": "Acrobot-v1"}, "between two actions"),
        ({"env": "Pendulum-v1"}, "between two actions"),
        ({"env": "Blackjack-v1"}, "reads a vector"),
    ],
)
def test_environments_that_do_not_fit_are_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(Refused, match=said):
        next(train(NumpySettings(**given)))


@pytest.mark.parametrize(
    "given", [{"gamma": 1.1}, {"window": 0}, {"hidden": 0}, {"learning_rate": 0.0}, {"decay": 1.0}]
)
def test_numbers_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(Refused, match=next(iter(given))):
        NumpySettings(**given)


def test_no_autodiff_is_imported() -> None:
    code = "import sys, tokenrl.control.numpy_agent; sys.exit('torch' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def returns_of_run(settings: NumpySettings, episodes: int) -> np.ndarray:
    updates = islice(train(settings), episodes // settings.episodes_per_update)
    return np.array([episode.rewards.sum() for _, batch in updates for episode in batch])


def test_it_learns_to_balance_longer() -> None:
    """A policy that learns nothing stays near its first 22 steps, one that descends falls to 10."""
    found = returns_of_run(NumpySettings(learning_rate=2e-3, seed=3), 200)
    assert found[-50:].mean() > 80


@pytest.mark.slow
@pytest.mark.timeout(900)  # 80 s on one free core
def test_cartpole_is_learnt_within_3000_episodes() -> None:
    best = []
    for seed in range(5):
        found = returns_of_run(NumpySettings(seed=seed), 3000)
        best.append(np.convolve(found, np.ones(100) / 100, mode="valid").max())
        assert found.max() == 500
    assert sum(mean >= 475 for mean in best) >= 4, best
