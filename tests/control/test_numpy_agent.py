"""The recipe without autodiff against autograd, against the estimator it claims to be, and at its task."""

from __future__ import annotations

import runpy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import RECIPES
from torch.testing import assert_close

from tokenrl.core import Estimator

R = SimpleNamespace(**runpy.run_path(str(RECIPES / "control" / "3_numpy.py")))
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
STANDARDISED = {
    "baseline": "episode_mean",
    "scale": "episode_std",
    "scale_ddof": 0,
    "scale_eps": 1e-8,
}
VARIATIONS = {
    "usual": ({}, {**STANDARDISED, "returns": "reward_to_go", "gamma": 0.99}),
    "window": (
        {"window": 3},
        {**STANDARDISED, "returns": "blame_window", "window": 3, "gamma": 0.99},
    ),
    "undiscounted": (
        {"standardise": False, "gamma": 1.0},
        {"baseline": "none", "returns": "reward_to_go"},
    ),
}


def drawn_weights(seed=0, observations=4, hidden=100):
    """Weights with biases that are not 0, as they are after the first update."""
    generator = np.random.default_rng(seed)
    weights = R.initial_weights(observations, hidden, generator)
    return weights._replace(b1=generator.normal(size=hidden) / 3, b2=generator.normal(size=1))


def padded(parts):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(part) for part in parts], batch_first=True)


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_gradient_by_hand_is_autograds_of_the_estimator(name):
    """To 1e-10 in float64, over a step of five episodes of unequal length."""
    changes, fields = VARIATIONS[name]
    settings, weights = replace(R.Settings(), **changes), drawn_weights()
    draw = np.random.default_rng(1)
    episodes = [
        R.Episode(draw.normal(size=(t, 4)), draw.integers(2, size=t), draw.normal(size=t))
        for t in (7, 1, 12, 4, 9)
    ]
    parts = [R.backward(weights, e, R.advantages_of(e.rewards, settings)) for e in episodes]
    gradient = [torch.tensor(np.mean(part, axis=0)) for part in zip(*parts, strict=True)]

    w1, b1, w2, b2 = parameters = [torch.tensor(part, requires_grad=True) for part in weights]
    observations, actions, rewards = map(padded, zip(*episodes, strict=True))
    mask, estimator = padded([np.ones(len(e.actions)) for e in episodes]), Estimator(**fields)
    logits = torch.relu(observations @ w1.T + b1) @ w2 + b2
    logprobs = torch.distributions.Bernoulli(logits=logits).log_prob(actions.double())
    advantages = estimator.advantages(rewards, mask, group_size=None).policy
    token_weights = estimator.token_weights(mask, max_length=None)
    loss = estimator.loss(logprobs, advantages, token_weights, mask)
    for slope, expected in zip(gradient, torch.autograd.grad(-loss, parameters), strict=True):
        assert float(expected.abs().max()) > 1e-3
        assert_close(slope, expected, **CLOSE)
    assert estimator.bias_status == ("exact" if name == "undiscounted" else "biased")


def test_rmsprop_is_that_of_torch():
    settings, generator = R.Settings(), np.random.default_rng(3)
    weights, squares = drawn_weights(), R.Weights(*map(np.zeros_like, drawn_weights()))
    parameters = [torch.tensor(part) for part in weights]
    optimizer = torch.optim.RMSprop(parameters, lr=1e-3, alpha=0.99, eps=1e-5, maximize=True)
    for size in (1.0, 1e-5, 3.0, 1e-6):  # also as small as epsilon, where its place shows
        gradient = R.Weights(*(size * generator.normal(size=part.shape) for part in weights))
        R.ascend(weights, gradient, squares, settings)
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = torch.tensor(part)
        optimizer.step()
    for mine, theirs in zip(weights, parameters, strict=True):
        assert_close(torch.tensor(mine), theirs, **CLOSE)


@pytest.mark.slow
@pytest.mark.timeout(900)  # 80 s on one free core
def test_cartpole_is_learnt_within_3000_episodes():
    best = []
    for seed in range(5):
        returns, _ = R.reinforce(R.Settings(seed=seed), 3000)
        best.append(R.rolling(np.array([returns]), 100).max())
        assert max(returns) == 500
    assert sum(mean >= 475 for mean in best) >= 4, best
