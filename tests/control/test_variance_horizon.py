"""The estimator's own loss on the repeated bandit has the variance that the formula says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from tokenrl.control.worlds import bandit
from tokenrl.core import Estimator

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "control_variance_horizon.py"))


@pytest.mark.parametrize("baseline", ["none", "mean"])
@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exact_variance_of_the_estimator(steps: int, returns: str, baseline: str) -> None:
    """Over all 2^T episodes, weighed by their chances, with the true mean for a baseline."""
    theta, rewards = -0.6, (1.5, 0.5)
    s = bandit.probability(theta)
    actions = torch.cartesian_prod(*[torch.arange(2)] * steps).reshape(-1, steps)
    chances = torch.where(actions == 0, s, 1 - s).prod(-1)
    length = torch.arange(steps, 0, -1).double() if returns == "reward_to_go" else torch.full((steps,), steps)
    means = length * (rewards[1] + s * (rewards[0] - rewards[1]))
    estimator = Estimator(
        returns=returns,
        baseline="none" if baseline == "none" else lambda totals, mask, **_: means.expand(mask.shape),
    )
    g = RECIPE["episode_gradients"](
        estimator, theta, actions, torch.tensor(rewards, dtype=torch.double)[actions]
    )
    mean = chances @ g
    variance = float(chances @ (g - mean).square())
    wanted = bandit.gradient_variance(theta, steps, rewards, returns=returns, baseline=baseline)
    assert float(mean) == pytest.approx(float(bandit.expected_gradient(theta, steps, rewards)), rel=1e-11)
    assert variance == pytest.approx(float(wanted), rel=1e-10)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_measured_variance_is_the_exact_one(steps: int) -> None:
    """A bound of five standard errors: a false alarm in a million for each of the twelve, were g normal.

    The baseline that the other episodes make adds about 1/N of the variance, far below the error.
    """
    arguments = RECIPE["Arguments"](theta=-0.5, rewards=(1.0, 0.2), episodes=20_000, seed=3)
    found = RECIPE["measure"](arguments, steps, torch.Generator().manual_seed(3))
    assert len(found) == 4
    for kind, g in found.items():
        variance, error = RECIPE["with_error"](g)
        assert abs(variance - RECIPE["exact"](arguments, steps, kind)) < 5 * error
        mean = float(bandit.expected_gradient(-0.5, steps, (1.0, 0.2)))
        assert abs(float(g.mean()) - mean) < 5 * (variance / len(g)) ** 0.5


def test_standard_error_of_a_variance() -> None:
    """Of a coin p, the variance of the sample variance is `p q (1 - 4 p q) / N` up to 1/N^2."""
    coins = (torch.rand(4000, 500, generator=torch.Generator().manual_seed(0)) < 0.2).double()
    _, error = RECIPE["with_error"](coins.flatten())
    assert error * coins.numel() ** 0.5 == pytest.approx((0.16 * (1 - 0.64)) ** 0.5, rel=0.02)
    spread = float(coins.var(-1).std())  # over 4000 samples of 500: known to 1.1 %
    assert error * 4000**0.5 == pytest.approx(spread, rel=0.06)
