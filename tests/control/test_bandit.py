"""The sigmoid bandit: the recipe's closed forms by enumeration, and the environment."""

from __future__ import annotations

import runpy
from itertools import product

import numpy as np
import pytest
import torch
from folders import RECIPES
from refusals import refused

from tokenrl.control import Bandit
from tokenrl.core import Estimator

RECIPE = runpy.run_path(str(RECIPES / "control" / "1_bandit.py"))
NAMES = ("probability", "gradient_variance", "expected_gradient", "episode_gradients")
probability, variance, expected, episode_gradients = (RECIPE[name] for name in NAMES)
THETAS = (-2.3, -1.0, 0.0, 0.7)


@pytest.mark.parametrize("baseline", ["none", "timestep_mean"])
@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_mean_and_variance_are_those_of_all_episodes(steps, returns, baseline):
    """Over all 2^T episodes, weighed by their chances, with the true mean for a baseline."""
    actions = torch.tensor(list(product((0, 1), repeat=steps)))
    rewards = torch.arange(steps, 0, -1).double()
    if returns == "total":
        rewards = torch.full_like(rewards, steps)
    for theta in THETAS:
        s = probability(theta)
        chances = torch.where(actions == 0, s, 1 - s).prod(-1)
        exact = "none"
        if baseline != "none":
            exact = lambda totals, mask, b=s * rewards, **_: b.expand(mask.shape)  # noqa: E731
        g = episode_gradients(Estimator(returns=returns, baseline=exact), theta, actions)
        mean = chances @ g
        mean_square = chances @ (g - mean).square()
        assert float(mean) == pytest.approx(float(expected(theta, steps)), rel=1e-10, abs=1e-12)
        formula = float(variance(theta, steps, returns, baseline))
        assert float(mean_square) == pytest.approx(formula, rel=1e-10, abs=1e-12)


def test_an_episode():
    environment = Bandit(rewards=(2, -0.5), steps=3)
    for _ in range(2):
        observation, info = environment.reset(seed=1)
        assert observation.tolist() == [1.0] and observation.dtype == np.float32 and info == {}
        rows = [environment.step(np.int64(a)) for a in (0, 1, 0)]
        assert [row[1] for row in rows] == [2.0, -0.5, 2.0]
        assert [row[2] for row in rows] == [False, False, True] and not any(row[3] for row in rows)
    with refused("two actions"):
        Bandit(rewards=(1.0,))
