"""The arithmetic of the grid's recipe: when a run counts as converged, and how variances are compared."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "control_2_gridworld.py"


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


def test_a_run_converges_where_the_rolling_mean_stays_near_the_best(recipe):
    good, late, never, falls, dips = np.full((5, 50), 0.94)
    late[:20], never[:], falls[-1], dips[24] = 0, 0.9, 0, 0
    updates, reached = recipe["converged"](np.stack([good, late, never, falls, dips]))
    assert updates.tolist() == [10, 30, 50, 50, 35]
    assert reached.tolist() == [True, True, False, False, True]


def test_ratios_of_variances_are_of_traces_around_the_mean(recipe):
    noise = np.random.default_rng(0).normal(size=(100, 3))
    ratio, low, high = recipe["variance_ratio"](5 + 2 * noise, 7 - noise)
    assert ratio == pytest.approx(4)
    assert (low, high) == pytest.approx((4, 4))  # the same episodes are drawn for both
    noise[:, 0] *= 3
    assert recipe["variance_ratio"](noise, noise[:, 1:])[0] == pytest.approx(
        noise.var(0).sum() / noise[:, 1:].var(0).sum()
    )


def test_intervals_are_of_the_mean_over_seeds(recipe):
    x = np.random.default_rng(1).normal(2, 1, size=(400, 2))
    mean, low, high = recipe["interval"](x)
    assert mean == pytest.approx(x.mean(0))
    assert (high - low) / 2 == pytest.approx(1.96 * x.std(0) / 20, rel=0.15)
